"""The kernels as torch operators: eager, `torch.compile(fullgraph=True)` and `inference_mode`.

Modes say how activations meet the weights inside; x and y are float32 or bf16 in all of them:
  a8   int8 with one scale per `Format.segment` inputs (16-bit weights: as a16);
  a16  bf16;
  a32  exact: the float32 or bf16 values themselves, against `scale * (code - zero)` in float32.
In a16 and a32, more than `calls.FEW` rows of x are multiplied by BLAS with a tile of dequantized
weights at a time. There is no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autocompress_kernels.calls import (
    TYPES,
    check_bias,
    check_input,
    matrix,
    multiply,
    multiply_each,
    read_rows,
)
from autocompress_kernels.formats import MODES, Packed
from autocompress_kernels.library import load

Part = Tensor | None
SECOND = {"a8": "a16", "a16": "a16", "a32": "a32"}  # mode -> of the second of two factors

_WEIGHT = (
    "Tensor values, Tensor? scales, Tensor? zeros, Tensor? masks, Tensor? offsets, {}"
    "int rows, int width, int bits, int group, int pattern"
)
# The mode is called `activations` here: torch cannot functionalize a mutable operator that has an
# argument called `mode`.
_library = torch.library.Library("autocompress_kernels", "DEF")
_library.define(f"linear(Tensor x, {_WEIGHT.format('Tensor? bias, ')}, int activations) -> Tensor")
_library.define(
    "linears(Tensor x, Tensor?[] parts, Tensor?[] biases, int[] numbers, int activations)"
    " -> Tensor[]"
)
_library.define(f"add_linear(Tensor(a!) y, Tensor x, {_WEIGHT.format('')}, int activations) -> ()")
_library.define(f"rows(Tensor indices, {_WEIGHT.format('')}, ScalarType dtype) -> Tensor")
_library.define(f"dense({_WEIGHT.format('')}, ScalarType dtype) -> Tensor")
_LINEAR = torch.ops.autocompress_kernels.linear.default  # looked up once: that costs a microsecond
_LINEARS = torch.ops.autocompress_kernels.linears.default
_ADD_LINEAR = torch.ops.autocompress_kernels.add_linear.default
_ROWS = torch.ops.autocompress_kernels.rows.default
_DENSE = torch.ops.autocompress_kernels.dense.default


def linear(x: Tensor, packed: Packed, bias: Part = None, mode: str = "a8") -> Tensor:
    """`x W^T + bias`.

    Args:
        x: (..., width), float32 or bf16.
        packed: the (rows, width) weight.
        bias: (rows,), best in float32: other types are converted at every call.
        mode: 'a8', 'a16' or 'a32'.

    Returns:
        (..., rows), of x's type.

    Raises:
        ValueError: a type, width or size does not fit; nothing is read then.
        RuntimeError: the kernels are missing.
    """
    call: Any = _linear_cpu if unwatched(x) else _LINEAR
    return call(x, *packed.parts, bias, *packed.numbers, MODES[mode])


def linears(
    x: Tensor, weights: Sequence[Packed], biases: Sequence[Part] | None = None, mode: str = "a8"
) -> list[Tensor]:
    """`linear` of several weights that read one x, to the last bit, in one call of the library.

    Args:
        x: (..., width), float32 or bf16.
        weights: (rows, width) each, in any formats.
        biases: (rows,) each, or None where a weight has none.
        mode: 'a8', 'a16' or 'a32'.

    Returns:
        (..., rows) of each weight, of x's type.

    Raises:
        ValueError: as `linear`, or there is no weight, or there are not as many biases.
        RuntimeError: the kernels are missing.
    """
    if biases is None:
        biases = [None] * len(weights)
    if not weights or len(biases) != len(weights):
        raise ValueError(
            "there must be weights, and as many biases or none. "
            f"Got {len(weights)} weights and {len(biases)} biases."
        )
    parts = [part for packed in weights for part in packed.parts]
    numbers = [number for packed in weights for number in packed.numbers]
    call: Any = _linears_cpu if unwatched(x) else _LINEARS
    found: list[Tensor] = call(x, parts, list(biases), numbers, MODES[mode])
    return found


def linears_of(
    weights: Sequence[Packed], mode: str
) -> Callable[[Tensor, Sequence[Part]], list[Tensor]]:
    """`linears` as a function of x and biases, for eager code: the rest is prepared.

    Args:
        weights: of one width; their tensors must stay where they are.

    Raises:
        ValueError: they have several widths.
    """
    width, number = weights[0].format.width, MODES[mode]
    if any(packed.format.width != width for packed in weights):
        raise ValueError(f"weights must have one width. Got {[p.format.width for p in weights]}.")
    described: Any = matrix  # of values, which are always there, and parts that may be None
    made = [(described(*packed.parts, *packed.numbers), packed.format.rows) for packed in weights]

    def call(x: Tensor, biases: Sequence[Part], kept: Sequence[Packed] = weights) -> list[Tensor]:
        check_input(x, width)  # `kept`, because `made` points into it
        return multiply_each(x, made, biases, width, number)

    return call


def unwatched(x: Tensor) -> bool:
    """Whether nothing records operators: plain eager code.

    There the dispatcher would only hand the 13 arguments through: half of the time of a call.
    """
    return not (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or not x.is_cpu
    )


def add_linear(y: Tensor, x: Tensor, packed: Packed, mode: str = "a8") -> Tensor:
    """`y += x W^T` in place; y is contiguous, (..., rows), of x's type. Returns y."""
    _ADD_LINEAR(y, x, *packed.parts, *packed.numbers, MODES[mode])
    return y


def low_rank(
    x: Tensor,  # (..., width)
    first: Packed,  # (rank, width)
    second: Packed,  # (rows, rank)
    bias: Part = None,  # (rows,)
    mode: str = "a8",
    onto: Part = None,  # (..., rows), contiguous, of x's type
) -> Tensor:  # (..., rows)
    """`x A^T B^T + bias`, or added to `onto` in place, which has no bias then.

    In mode 'a8' x is rounded to int8, but the few numbers between the factors to bf16: the errors
    of two roundings to int8 would add up.

    Raises:
        ValueError: as `linear`, or both `bias` and `onto` are given.
    """
    inner = linear(x, first, None, mode)
    if onto is None:
        return linear(inner, second, bias, SECOND[mode])
    if bias is not None:
        raise ValueError("bias must be part of what is added onto. Got both.")
    return add_linear(onto, inner, second, SECOND[mode])


def gather(packed: Packed, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the weight.

    Args:
        packed: the (rows, width) weight.
        indices: any shape, int64 or int32, each in [0, rows).
        dtype: float32 or bf16.

    Returns:
        (*indices.shape, width).

    Raises:
        ValueError: an index is out of range.
    """
    return _ROWS(indices, *packed.parts, *packed.numbers, dtype)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:  # (rows, width)
    """The dense weight in float32 or bf16."""
    return _DENSE(*packed.parts, *packed.numbers, dtype)


def _linear_cpu(  # type: ignore[no-untyped-def]
    x, values, scales, zeros, masks, offsets, bias, rows, width, bits, group, pattern, mode
):
    check_input(x, width)
    y = x.new_empty((*x.shape[:-1], rows))
    if bias is not None:
        bias = check_bias(bias, rows)
    weight = matrix(values, scales, zeros, masks, offsets, rows, width, bits, group, pattern)
    multiply(x, weight, bias, y, rows, width, mode)
    return y


def _linears_cpu(x, parts, biases, numbers, mode):  # type: ignore[no-untyped-def]
    weights = [
        (matrix(*parts[at : at + 5], *numbers[at : at + 5]), numbers[at])
        for at in range(0, len(numbers), 5)
    ]
    for width in numbers[1::5]:
        check_input(x, width)
    return multiply_each(x, weights, biases, numbers[1], mode)


def _add_linear_cpu(y, x, values, scales, zeros, masks, offsets, *numbers):  # type: ignore[no-untyped-def]
    *format, mode = numbers
    rows, width = format[:2]
    check_input(x, width)
    if y.shape != (*x.shape[:-1], rows) or y.dtype != x.dtype or not y.is_contiguous():
        raise ValueError(
            f"y must be contiguous {x.dtype} of shape {(*x.shape[:-1], rows)}. "
            f"Got {y.dtype} of shape {tuple(y.shape)}."
        )
    weight = matrix(values, scales, zeros, masks, offsets, *format)
    multiply(x, weight, None, y, rows, width, mode, add=1)


def _rows_cpu(indices, values, scales, zeros, masks, offsets, *numbers):  # type: ignore[no-untyped-def]
    *format, dtype = numbers
    if indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"indices must be int64 or int32. Got {indices.dtype}.")
    out = _dense_output((*indices.shape, format[1]), dtype)
    if out.numel():
        weight = matrix(values, scales, zeros, masks, offsets, *format)
        flat = indices.reshape(-1).to(torch.int64).contiguous()
        read_rows(load(), weight, flat, 0, out.view(-1, format[1]))
    return out


def _dense_cpu(values, scales, zeros, masks, offsets, *numbers):  # type: ignore[no-untyped-def]
    *format, dtype = numbers
    out = _dense_output(tuple(format[:2]), dtype)
    weight = matrix(values, scales, zeros, masks, offsets, *format)
    read_rows(load(), weight, None, 0, out)
    return out


def _dense_output(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype not in TYPES:
        raise ValueError(f"dtype must be float32 or bfloat16. Got {dtype}.")
    return torch.empty(shape, dtype=dtype)


def _linear_fake(x, values, scales, zeros, masks, offsets, bias, *numbers):  # type: ignore[no-untyped-def]
    check_input(x, numbers[1])
    return x.new_empty((*x.shape[:-1], numbers[0]))


def _linears_fake(x, parts, biases, numbers, mode):  # type: ignore[no-untyped-def]
    for width in numbers[1::5]:
        check_input(x, width)
    return [x.new_empty((*x.shape[:-1], rows)) for rows in numbers[::5]]


def _add_linear_fake(y, x, *weight):  # type: ignore[no-untyped-def]
    return None


def _rows_fake(indices, values, scales, zeros, masks, offsets, *numbers):  # type: ignore[no-untyped-def]
    return values.new_empty((*indices.shape, numbers[1]), dtype=numbers[-1])


def _dense_fake(values, scales, zeros, masks, offsets, *numbers):  # type: ignore[no-untyped-def]
    return values.new_empty(tuple(numbers[:2]), dtype=numbers[-1])


for _name, _cpu, _fake in (
    ("linear", _linear_cpu, _linear_fake),
    ("linears", _linears_cpu, _linears_fake),
    ("add_linear", _add_linear_cpu, _add_linear_fake),
    ("rows", _rows_cpu, _rows_fake),
    ("dense", _dense_cpu, _dense_fake),
):
    _library.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"autocompress_kernels::{_name}", _fake, lib=_library)
