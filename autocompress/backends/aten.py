"""The two packed kernels that PyTorch itself has: 4 bits in groups, 8 bits per channel.

Both read bf16 activations and bf16 scales. Others they accept run up to 100 times slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.backends.dequantize import packed_rows
from autocompress.levels import Level, Quantize, Shape
from autocompress.packed import Packed, unpack

INT4_GROUPS = (32, 64, 128, 256)  # all that the kernel has
INT4_ROWS = 16  # outputs must be a multiple
INT8_WIDTH = 16  # inputs must be a multiple: the kernel checks nothing and reads past the end


@dataclass
class AtenOp:
    """A weight in ATen's layout, and beside it as files hold it: scales in bf16 are not exact.

    Args:
        kernel: what multiplies, with `parts`.
        parts: its tensors.
    """

    packed: Packed
    dtype: torch.dtype
    kernel: str
    parts: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self.parts)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.parts.values())

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows, width = self.packed.shape
        # A copy, always: the 8-bit kernel crashes where x does not begin at 32 bytes.
        flat = x.reshape(-1, width).to(
            torch.bfloat16, copy=True, memory_format=torch.contiguous_format
        )
        values, scales = self.parts["values"], self.parts["scales"]
        if not len(flat):
            y = flat.new_empty(0, rows)
        elif self.kernel == "int4":
            level = self.packed.level
            assert isinstance(level, Quantize) and level.group_size is not None
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, values, level.group_size, scales)
        else:
            y = torch.ops.aten._weight_int8pack_mm(flat, values, scales)
        y = y.view(*x.shape[:-1], rows).to(x.dtype)
        return y if bias is None else y + bias

    def rows(self, indices: Tensor) -> Tensor:
        flat = packed_rows(self.packed, indices.flatten()).to(self.dtype)
        return flat.view(*indices.shape, self.packed.shape[1])

    def dense(self) -> Tensor:
        return self.packed.dense()

    def stored(self) -> Packed:
        return self.packed


class Aten:
    """`_weight_int4pack_mm_for_cpu` and `_weight_int8pack_mm`."""

    name = "aten"

    def version(self) -> str:
        return f"{self.name} {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"

    def supports(self, level: Level, shape: Shape, mode: str) -> str | None:
        rows, width = shape
        if not isinstance(level, Quantize) or level.bits not in (4, 8):
            return f"it has kernels of 4 and 8 bits, not of '{level}'"
        if mode == "a32":
            return "it rounds activations to bf16"
        if level.bits == 4:
            return _int4_reason(level, rows, width)
        if not level.symmetric or level.groups(width) > 1:
            return f"its 8-bit kernel is symmetric and per channel, '{level}' is not"
        if width % INT8_WIDTH:
            return f"its 8-bit kernel needs a multiple of {INT8_WIDTH} inputs, not {width}"
        return None

    def prepare(self, packed: Packed, dtype: torch.dtype, mode: str) -> AtenOp:
        level, (rows, width) = packed.level, packed.shape
        assert isinstance(level, Quantize)
        codes = unpack(packed.tensors["codes"], level.bits, rows * width).view(rows, width)
        scales = packed.tensors["scales"].float()
        if level.bits == 8:
            values = (codes.to(torch.int16) - 128).to(torch.int8)
            parts = {"values": values, "scales": scales[:, 0].to(torch.bfloat16)}
            return AtenOp(packed, dtype, "int8", parts)
        zeros = torch.full_like(scales, 8.0)
        if not level.symmetric:
            zeros = unpack(packed.tensors["zeros"], 4, scales.numel()).view(scales.shape).float()
        # ATen's weight is (code - 8) * scale + offset.
        pairs = torch.stack([scales, (8 - zeros) * scales], 2).transpose(0, 1)
        values = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        parts = {"values": values, "scales": pairs.to(torch.bfloat16).contiguous()}
        return AtenOp(packed, dtype, "int4", parts)

    def place(self, ops: Sequence[AtenOp]) -> None:
        """ATen's layouts stay where they were made."""

    def together(self, ops: Sequence[AtenOp]) -> None:
        """ATen has no call for several weights."""


def _int4_reason(level: Quantize, rows: int, width: int) -> str | None:
    size = level.group_size
    if size not in INT4_GROUPS:
        return f"its 4-bit kernel has groups of {', '.join(map(str, INT4_GROUPS))}, not '{level}'"
    if width % size:
        return f"its 4-bit kernel needs whole groups of {size}, not {width} inputs"
    if rows % INT4_ROWS:
        return f"its 4-bit kernel needs a multiple of {INT4_ROWS} outputs, not {rows}"
    return None
