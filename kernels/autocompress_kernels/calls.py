"""From tensors to calls of the C library: what it cannot check, and what it leaves to BLAS."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress_kernels.formats import MODES
from autocompress_kernels.library import Library, failure, load

FEW = 32  # rows of x up to which the kernels themselves are used in every mode
TILE_BYTES = 1 << 20  # dequantized weights at a time: they stay in the L2 cache
TYPES = {torch.float32: 0, torch.bfloat16: 1}  # of x and y
MATRIX = struct.Struct("@qqiiiiPqPqPqPqPq")  # struct ack_matrix
MOST = 8  # matrices of one call: ACK_MOST_MATRICES
POINTERS = [struct.Struct(f"@{count}P") for count in range(MOST + 1)]
Part = Tensor | None


def matrix(
    values: Tensor,
    scales: Part,
    zeros: Part,
    masks: Part,
    offsets: Part,
    rows: int,
    width: int,
    bits: int,
    group: int,
    pattern: int,
) -> bytes:
    """A `struct ack_matrix`. The library checks sizes and numbers, types are checked here.

    Raises:
        ValueError: a tensor has another type, or is not contiguous.
    """
    if values.dtype is not torch.uint8 or not values.is_contiguous():
        raise _wrong("values", values, torch.uint8)
    numbers = (rows, width, bits, group, pattern, 0, values.data_ptr(), values.nbytes)
    if masks is None and offsets is None:  # full: the usual case, kept short
        if scales is None:
            return MATRIX.pack(*numbers, 0, 0, 0, 0, 0, 0, 0, 0)
        if scales.dtype is not torch.float16 or not scales.is_contiguous():
            raise _wrong("scales", scales, torch.float16)
        if zeros is None:
            return MATRIX.pack(*numbers, scales.data_ptr(), scales.nbytes, 0, 0, 0, 0, 0, 0)
    rest = (
        *_part("scales", scales, torch.float16),
        *_part("zeros", zeros, torch.uint8),
        *_part("masks", masks, torch.uint8),
        *_part("offsets", offsets, torch.int64),
    )
    return MATRIX.pack(*numbers, *rest)


def _part(name: str, tensor: Part, dtype: torch.dtype) -> tuple[int, int]:
    if tensor is None:
        return 0, 0
    if tensor.dtype is not dtype or not tensor.is_contiguous():
        raise _wrong(name, tensor, dtype)
    return tensor.data_ptr(), tensor.nbytes


def _wrong(name: str, tensor: Tensor, wanted: object) -> ValueError:
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    return ValueError(
        f"{name} must be contiguous and of type {wanted}. "
        f"Got {tensor.dtype} of shape {tuple(tensor.shape)}{layout}."
    )


def check_input(x: Tensor, width: int) -> None:
    """Check x against a weight of `width` inputs.

    Raises:
        ValueError: x is neither float32 nor bf16, or not (..., width).
    """
    if x.dtype not in TYPES:
        raise ValueError(f"x must be float32 or bfloat16. Got {x.dtype}.")
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(f"x must have {width} inputs in its last dimension. Got {tuple(x.shape)}.")


def check_bias(bias: Tensor, rows: int) -> Tensor:
    """The bias in float32.

    Raises:
        ValueError: it has another shape than (rows,).
    """
    if bias.shape != (rows,):
        raise ValueError(f"bias must have shape {(rows,)}. Got {tuple(bias.shape)}.")
    return bias.float().contiguous()


def multiply(
    x: Tensor,  # (..., width), checked
    weight: bytes,  # of `matrix`
    bias: Part,  # (rows,), float32, contiguous
    y: Tensor,  # (..., rows), contiguous, of x's type
    rows: int,
    width: int,
    mode: int,
    add: int = 0,
) -> None:
    """y = x W^T + bias, or with `add`, y += x W^T + bias.

    Raises:
        ValueError: a buffer of the weight is too small, or its numbers do not go together.
    """
    x, stride = _by_rows(x, width)
    count = x.numel() // width
    if not count:
        return
    library = load()
    if count > FEW and mode:
        _by_tiles(library, x.view(-1, width), weight, bias, y.view(-1, rows), mode, add)
        return
    kind = TYPES[x.dtype]
    code = library.linear(
        weight,
        mode,
        count,
        x.data_ptr(),
        kind,
        stride,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        kind,
        rows,
        add,
        library.parallel,
        torch.get_num_threads(),
    )
    if code:
        raise failure(code, _described(weight))


def multiply_each(
    x: Tensor,  # (..., width), checked
    weights: Sequence[tuple[bytes, int]],  # of `matrix`, and its rows
    biases: Sequence[Part],  # (rows,), one of each weight
    width: int,
    mode: int,
) -> list[Tensor]:  # (..., rows) of each weight, of x's type
    """x W^T + bias for each weight, with few calls of the library.

    Raises:
        ValueError: as `multiply`, or a bias has another shape than (rows,).
    """
    ys = [x.new_empty((*x.shape[:-1], rows)) for _, rows in weights]
    biases = [
        None if bias is None else check_bias(bias, rows)
        for bias, (_, rows) in zip(biases, weights, strict=True)
    ]
    if mode and x.numel() > FEW * width:  # left to BLAS, one by one
        for (weight, rows), bias, y in zip(weights, biases, ys, strict=True):
            multiply(x, weight, bias, y, rows, width, mode)
        return ys
    for at in range(0, len(weights), MOST):
        some = slice(at, at + MOST)
        packed = b"".join(weight for weight, _ in weights[some])
        _multiply_together(x, packed, biases[some], ys[some], width, mode)
    return ys


def _multiply_together(
    x: Tensor,  # (..., width), checked
    weights: bytes,  # of `matrix`, at most MOST side by side
    biases: Sequence[Part],  # (rows,), float32, contiguous, one of each weight
    ys: Sequence[Tensor],  # (..., rows), contiguous, of x's type
    width: int,
    mode: int,
) -> None:
    """y = x W^T + bias for each weight, in one call."""
    x, stride = _by_rows(x, width)
    count = x.numel() // width
    if not count:
        return
    library, kind = load(), TYPES[x.dtype]
    pointers = POINTERS[len(ys)]
    code = library.linears(
        weights,
        len(ys),
        mode,
        count,
        x.data_ptr(),
        kind,
        stride,
        pointers.pack(*(0 if bias is None else bias.data_ptr() for bias in biases)),
        pointers.pack(*(y.data_ptr() for y in ys)),
        kind,
        library.parallel,
        torch.get_num_threads(),
    )
    if code:
        raise failure(code, _described(weights[: MATRIX.size]))


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors have one type, one shape and the same bytes."""
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    return bool(load().equal(a.data_ptr(), b.data_ptr(), a.nbytes))


def _by_rows(x: Tensor, width: int) -> tuple[Tensor, int]:
    """x as the library reads it, and the elements from one row to the next."""
    if x.is_contiguous():
        return x, width
    x = x.reshape(-1, width)
    if x.stride(1) != 1 or x.stride(0) < width:
        x = x.contiguous()
    return x, x.stride(0)


def _by_tiles(
    library: Library,
    x: Tensor,  # (count, width)
    weight: bytes,
    bias: Part,  # (rows,)
    y: Tensor,  # (count, rows)
    mode: int,
    add: int,
) -> None:
    """y (+)= x W^T + bias through BLAS, a tile of dequantized rows at a time.

    bf16 products go to BLAS in bf16 only where the CPU multiplies bf16 itself; elsewhere the
    rounded activations are multiplied in float32.
    """
    (rows, width), half = (y.shape[1], x.shape[1]), mode == MODES["a16"]
    rounded = x.to(torch.bfloat16) if half else x
    inside = torch.bfloat16 if half and library.isa() == "avx512bf16" else torch.float32
    rounded = rounded.to(inside)
    step = max(16, TILE_BYTES // (width * inside.itemsize) // 16 * 16)
    tile = x.new_empty((min(step, rows), width), dtype=inside)
    for start in range(0, rows, step):
        size = min(step, rows - start)
        read_rows(library, weight, None, start, tile[:size])
        part = F.linear(rounded, tile[:size])
        target = y[:, start : start + size]
        if bias is not None:
            part = part + bias[start : start + size]
        target.copy_(target + part if add else part)


def read_rows(
    library: Library,
    weight: bytes,  # struct ack_matrix
    indices: Part,  # (count,), int64, contiguous; None is begin ... begin + count - 1
    begin: int,
    out: Tensor,  # (count, width), float32 or bf16, contiguous
) -> None:
    """Dense rows of a weight, into `out`.

    Raises:
        ValueError: an index is out of range, or a buffer of the weight too small.
    """
    code = library.rows(
        *(weight, None if indices is None else indices.data_ptr(), begin, out.shape[0]),
        *(out.data_ptr(), TYPES[out.dtype], out.stride(0)),
        *(library.parallel, torch.get_num_threads()),
    )
    if code:
        raise failure(code, _described(weight))


def _described(weight: bytes) -> str:
    """A matrix in words, for an error."""
    rows, width, bits, group, pattern, *rest = MATRIX.unpack(weight)
    names = ("values", "scales", "zeros", "masks", "offsets")
    sizes = ", ".join(f"{n} {b}" for n, b in zip(names, rest[2::2], strict=True) if b)
    return (
        f"a {rows} x {width} weight of {bits} bits, group {group}, pattern {pattern}; "
        f"bytes: {sizes or 'none'}"
    )
