"""Dense weights, in the type the model computes in, through BLAS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress.levels import Dense, Level, Shape
from autocompress.packed import Packed


@dataclass
class DenseOp:
    """A dense (out, in) weight; activations are not rounded."""

    weight: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight and of its rows."""
        return self.weight.dtype

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    @property
    def bytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def rows(self, indices: Tensor) -> Tensor:
        return self.weight[indices]

    def dense(self) -> Tensor:
        return self.weight.float()

    def stored(self) -> Packed:
        rows, width = self.weight.shape
        return Packed(Dense(), (rows, width), {"weight": self.weight.to(torch.bfloat16)})


class DenseLinear:
    """`torch.nn.functional.linear`."""

    name = "dense"

    def version(self) -> str:
        return f"{self.name} {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"

    def supports(self, level: Level, shape: Shape, mode: str) -> str | None:
        return None if isinstance(level, Dense) else f"it runs dense layers only, not '{level}'"

    def prepare(self, packed: Packed, dtype: torch.dtype, mode: str) -> DenseOp:
        return DenseOp(packed.tensors["weight"].to(dtype))

    def place(self, ops: Sequence[DenseOp]) -> None:
        """Parameters stay where they are."""

    def together(self, ops: Sequence[DenseOp]) -> None:
        """Parameters are multiplied one by one."""
