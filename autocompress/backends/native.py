"""Our own kernels: every width of codes, groups that are multiples of 32 or per channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from autocompress.levels import Level, Quantize, Shape
from autocompress.packed import Packed, pack_quantized, unpack

STEP = 32  # inputs: kernel groups are multiples of it
KINDS = (torch.float32, torch.bfloat16)  # what the kernels read and write


@dataclass
class NativeOp:
    """A weight in the kernels' layout.

    Args:
        level, shape: what it stands for.
        packed: `autocompress_kernels.Packed`.
        placed: whether it lies on huge pages beside the others of its model.
    """

    level: Quantize
    shape: Shape
    packed: Any
    dtype: torch.dtype
    mode: str
    placed: bool = False

    def __post_init__(self) -> None:
        from autocompress_kernels.ops import linear

        self._linear = linear

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self.packed.tensors)

    @property
    def bytes(self) -> int:
        return int(self.packed.bytes)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype is torch.float16:  # the kernels read and write float32 and bf16
            return self._linear(x.float(), self.packed, bias, self.mode).half()
        return self._linear(x, self.packed, bias, self.mode)

    def rows(self, indices: Tensor) -> Tensor:
        from autocompress_kernels.ops import gather

        kind = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        return gather(self.packed, indices, kind).to(self.dtype)

    def dense(self) -> Tensor:
        from autocompress_kernels.ops import dequantize

        return dequantize(self.packed, torch.float32)

    def stored(self) -> Packed:
        from autocompress_kernels.pack import unpack_codes

        codes, scales, zeros = unpack_codes(self.packed)
        return pack_quantized(self.level, codes, scales, scales if zeros is None else zeros)


class Native:
    """The C library of `autocompress_kernels`."""

    name = "native"

    def version(self) -> str:
        if _missing() is not None:
            return f"{self.name} missing"
        from autocompress_kernels.library import ABI, load

        return f"{self.name} {ABI} {load().isa()}"

    def supports(self, level: Level, shape: Shape, mode: str) -> str | None:
        if not isinstance(level, Quantize):
            return f"it packs quantized levels only, not '{level}'"
        size = level.group_size
        if size is not None and size < shape[1] and size % STEP:
            return f"groups must be multiples of {STEP} or per channel, not {size}"
        return _missing()

    def prepare(self, packed: Packed, dtype: torch.dtype, mode: str) -> NativeOp:
        from autocompress_kernels.pack import pack_codes

        level, (rows, width) = packed.level, packed.shape
        assert isinstance(level, Quantize)
        bits, groups = level.bits, level.groups(width)
        codes = unpack(packed.tensors["codes"], bits, rows * width).view(rows, width)
        scales = packed.tensors["scales"].to(torch.float16)
        zeros = None
        if not level.symmetric:
            zeros = unpack(packed.tensors["zeros"], bits, rows * groups).view(rows, groups)
        group = level.group_size if groups > 1 else None
        made = pack_codes(codes, scales, zeros, bits, group)
        return NativeOp(level, packed.shape, made, dtype, mode)

    def place(self, ops: Sequence[NativeOp]) -> None:
        moved = [op for op in ops if not op.placed]
        if not moved:
            return
        from autocompress_kernels.memory import arena

        views = iter(arena([t for op in moved for t in op.packed.tensors.values()]))
        for op in moved:
            tensors = {name: next(views) for name in op.packed.tensors}
            op.packed, op.placed = replace(op.packed, tensors=tensors), True

    def together(self, ops: Sequence[NativeOp]) -> NativeTogether:
        return NativeTogether(ops)


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


def _missing() -> str | None:
    """Why the kernels cannot be used here, or None."""
    if find_spec("autocompress_kernels") is None:
        return "the package autocompress_kernels is not installed; install autocompress again"
    from autocompress_kernels.library import missing

    return missing()
