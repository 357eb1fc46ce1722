"""Our own kernels: codes of every width in groups that are multiples of 32 or per channel, sparse
weights in bf16 and 8 bits, and sums and products of these.

Sparse weights run on sparse kernels only where those are faster (`studies/kernels`): never without
the instructions that expand by a mask, in 8 symmetric bits from 60 % dropped on, in fewer bits
never. Elsewhere dropped weights are stored in memory as zeros, and only the file is smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from autocompress.backends.native_ops import NativeOp, NativeProduct, NativeSum
from autocompress.errors import LevelError
from autocompress.levels import Dense, Joint, Level, LowRank, Prune, Quantize, Shape
from autocompress.packed import Packed, Tensors
from autocompress.packed.low_rank import SIDES, side_tensors
from autocompress.packed.outliers import placed_outliers
from autocompress.packed.quantized import stored_codes, stored_zeros
from autocompress.packed.sparse import full_codes, sparse_dense, unpack_mask

STEP = 32  # inputs: kernel groups are multiples of it
EXPANDING = "avx512bf16"  # the instruction set whose kernels expand by a mask in registers
DROPPED = 60  # percent, from which sparse kernels of 8 bits read so much less that they win
KINDS = (torch.float32, torch.bfloat16)  # what the kernels read and write
Op = NativeOp | NativeProduct | NativeSum


class Native:
    """The C library of `autocompress_kernels`."""

    name = "native"

    def version(self) -> str:
        if _missing() is not None:
            return f"{self.name} missing"
        from autocompress_kernels.library import ABI, load

        return f"{self.name} {ABI} {load().isa()}"

    def supports(self, level: Level, shape: Shape, mode: str) -> str | None:
        if not isinstance(level, Quantize | Prune | LowRank | Joint):
            return f"it has no kernels for '{level}'"
        try:
            level.storage_bits(shape)
        except LevelError as error:
            return str(error).rstrip(".")
        for codes, width in _quantized(level, shape):
            size = codes.group_size
            if size is not None and size < width and size % STEP:
                return f"groups must be multiples of {STEP} or per channel, not {size}"
        return _missing()

    def prepare(self, packed: Packed, dtype: torch.dtype, mode: str) -> Op:
        return _op(packed.level, packed.shape, packed.tensors, dtype, mode)

    def place(self, ops: Sequence[Op]) -> None:
        moved = [matrix for op in ops for matrix in op.matrices if not matrix.placed]
        if not moved:
            return
        from autocompress_kernels.memory import arena

        views = iter(arena([t for op in moved for t in op.packed.tensors.values()]))
        for op in moved:
            tensors = {name: next(views) for name in op.packed.tensors}
            op.packed, op.placed = replace(op.packed, tensors=tensors), True

    def together(self, ops: Sequence[Op]) -> NativeTogether | None:
        whole = [op for op in ops if isinstance(op, NativeOp)]
        return NativeTogether(whole) if len(whole) == len(ops) else None


class NativeTogether:
    """Placed ops of one width and mode. Their descriptions for the library are made once."""

    def __init__(self, ops: Sequence[NativeOp]) -> None:
        from autocompress_kernels import calls
        from autocompress_kernels.ops import linears_of, unwatched

        self.ops = tuple(ops)
        self._linears = linears_of([op.packed for op in ops], ops[0].mode)
        self._unwatched, self.same = unwatched, calls.same_bytes

    def __reduce__(self) -> Any:  # a copy has other tensors, and pointers to them
        return NativeTogether, (self.ops,)

    def fits(self, x: Tensor) -> bool:
        return x.dtype in KINDS and x.is_contiguous() and self._unwatched(x)

    def __call__(self, x: Tensor, biases: Sequence[Tensor | None]) -> list[Tensor]:
        return self._linears(x, biases)


def _quantized(level: Level, shape: Shape) -> Iterator[tuple[Quantize, int]]:
    """Every quantized matrix of a level, and its inputs."""
    match level:
        case Quantize():
            yield level, shape[1]
        case LowRank(factors=Quantize() as factors):
            yield from ((factors, width) for _, width in level.factor_shapes(shape))
        case Joint():
            for step in level.steps:
                yield from _quantized(step, shape) if isinstance(step, Quantize | LowRank) else ()


def _op(level: Level, shape: Shape, tensors: Tensors, dtype: torch.dtype, mode: str) -> Op:
    """A weight in the kernels' layout."""
    match level:
        case LowRank():
            return _product(level, shape, tensors, dtype, mode)
        case Joint(low_rank=LowRank() as added):
            base = _op(level.base, shape, tensors, dtype, mode)
            assert not isinstance(base, NativeProduct)
            return NativeSum(level, shape, base, _product(added, shape, tensors, dtype, mode))
        case Joint(outliers=outliers, quantize=Quantize() as codes) if outliers is not None:
            return NativeSum(
                level,
                shape,
                _matrix(codes, shape, tensors, dtype, mode),
                _outliers(shape, tensors, dtype, mode),
                {name: tensors[name] for name in ("outliers", "places", "counts")},
            )
    return _matrix(level, shape, tensors, dtype, mode)


def _matrix(
    level: Level, shape: Shape, tensors: Tensors, dtype: torch.dtype, mode: str
) -> NativeOp:
    """A weight that one kernel multiplies."""
    from autocompress_kernels.pack import pack_bf16, pack_sparse

    match level:
        case Dense():
            made = pack_bf16(tensors["weight"].bfloat16())
        case Prune():
            keep = unpack_mask(level, shape, tensors["mask"])
            weight = sparse_dense(level, shape, tensors).bfloat16()
            sparse = sparse_is_faster(level, None)
            made = pack_sparse(weight, keep, _pattern(level)) if sparse else pack_bf16(weight)
        case Joint(prune=Prune() as prune, quantize=Quantize() as codes) if sparse_is_faster(
            prune, codes
        ):
            keep = unpack_mask(prune, shape, tensors["mask"])
            scales, group = tensors["scales"].to(torch.float16), _group(codes, shape[1])
            made = pack_sparse(
                full_codes(level, shape, tensors), keep, _pattern(prune), scales, group
            )
        case Joint(quantize=Quantize() as codes):
            made = _full(codes, shape, full_codes(level, shape, tensors), tensors)
        case _:
            assert isinstance(level, Quantize)
            made = _full(level, shape, stored_codes(level, shape, tensors), tensors)
    mask = tensors["mask"].clone() if isinstance(level, Prune | Joint) else None
    return NativeOp(level, shape, made, dtype, mode, mask=mask)


def sparse_is_faster(level: Prune, codes: Quantize | None) -> bool:
    """Whether a sparse weight, in bf16 or in codes, runs on a sparse kernel here."""
    from autocompress_kernels.library import load

    if load().isa() != EXPANDING:
        return False
    if codes is None:
        return True
    return codes.bits == 8 and codes.symmetric and level.sparsity >= DROPPED


def _full(level: Quantize, shape: Shape, codes: Tensor, tensors: Tensors) -> Any:
    """Codes of all weights."""
    from autocompress_kernels.pack import pack_codes

    zeros = None if level.symmetric else stored_zeros(level, shape, tensors).contiguous()
    scales = tensors["scales"].to(torch.float16)
    return pack_codes(codes.contiguous(), scales, zeros, level.bits, _group(level, shape[1]))


def _group(level: Quantize, width: int) -> int | None:
    return level.group_size if level.groups(width) > 1 else None


def _pattern(level: Prune) -> str:
    """The kernels have a faster layout for 2:4; other n:m are masks like any."""
    return "2:4" if (level.kept_of, level.of) == (2, 4) else "bitmask"


def _product(
    level: LowRank, shape: Shape, tensors: Tensors, dtype: torch.dtype, mode: str
) -> NativeProduct:
    part: Level = level.factors or Dense()
    left, right = (
        _matrix(
            part,
            size,
            {"weight": tensors[side]} if level.factors is None else side_tensors(side, tensors),
            dtype,
            mode,
        )
        for side, size in zip(SIDES, level.factor_shapes(shape), strict=True)
    )
    return NativeProduct(level, shape, left, right)


def _outliers(shape: Shape, tensors: Tensors, dtype: torch.dtype, mode: str) -> NativeOp:
    """The outliers as a sparse bf16 matrix to add."""
    from autocompress_kernels.pack import pack_sparse

    rows, columns, values = placed_outliers(shape, tensors)
    weight, keep = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bool)
    weight[rows, columns], keep[rows, columns] = values, True
    return NativeOp(Dense(), shape, pack_sparse(weight, keep, "bitmask"), dtype, mode)


def _missing() -> str | None:
    """Why the kernels cannot be used here, or None."""
    if find_spec("autocompress_kernels") is None:
        return "the package autocompress_kernels is not installed; install autocompress again"
    from autocompress_kernels.library import missing

    return missing()
