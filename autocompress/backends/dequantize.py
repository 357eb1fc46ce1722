"""The weight as files hold it; made dense for each multiplication. Slow, and runs everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress.errors import LevelError
from autocompress.levels import Dense, GgufType, Level, Quantize, Shape
from autocompress.packed import Packed, dequantize, pack, unpack
from autocompress.packed.gguf import gguf_dense


@dataclass
class DequantizeOp:
    """A packed weight; activations are not rounded."""

    packed: Packed
    dtype: torch.dtype

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self.packed.tensors)

    @property
    def bytes(self) -> int:
        return self.packed.bits // 8

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.packed.dense().to(x.dtype), bias)

    def rows(self, indices: Tensor) -> Tensor:
        flat = packed_rows(self.packed, indices.flatten()).to(self.dtype)
        return flat.view(*indices.shape, self.packed.shape[1])

    def dense(self) -> Tensor:
        return self.packed.dense()

    def stored(self) -> Packed:
        return self.packed


class Dequantize:
    """Plain torch."""

    name = "dequantize"

    def version(self) -> str:
        return f"{self.name} {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"

    def supports(self, level: Level, shape: Shape, mode: str) -> str | None:
        if isinstance(level, Dense):
            return f"it packs compressed levels only, not '{level}'"
        try:
            level.storage_bits(shape)
        except LevelError as error:
            return str(error).rstrip(".")
        return None

    def prepare(self, packed: Packed, dtype: torch.dtype, mode: str) -> DequantizeOp:
        return DequantizeOp(packed, dtype)

    def place(self, ops: Sequence[DequantizeOp]) -> None:
        """Files' tensors stay where they are."""

    def together(self, ops: Sequence[DequantizeOp]) -> None:
        """Weights are made dense one by one."""


def packed_rows(packed: Packed, indices: Tensor) -> Tensor:  # (indices, in), float32
    """Rows of a packed weight, by number; of codes and GGUF types only they are made dense."""
    level, (rows, width), tensors = packed.level, packed.shape, packed.tensors
    if isinstance(level, GgufType):
        return gguf_dense(level, {"blocks": tensors["blocks"][indices]})
    if not isinstance(level, Quantize) or width % 8:  # rows do not start at a byte
        return packed.dense()[indices]
    bits, groups = level.bits, level.groups(width)
    chosen = {
        "codes": tensors["codes"].view(rows, width * bits // 8)[indices].flatten(),
        "scales": tensors["scales"][indices],
    }
    if not level.symmetric:
        zeros = unpack(tensors["zeros"], bits, rows * groups).view(rows, groups)
        chosen["zeros"] = pack(zeros[indices], bits)
    return dequantize(level, (len(indices), width), chosen)
