"""What every stored form is made of: named tensors of known types and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.levels import Level, Shape

Sizes = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> (dtype, shape)
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Packed:
    """A weight at a level, as it is stored.

    Args:
        level: how to read `tensors`.
        shape: (out, in) of the dense weight.
        tensors: those of `tensor_shapes(level, shape)`; the files of this package say what they
            hold.
        kept: (in,) or (out,), bool: where the inputs or outputs of a narrower weight were; None
            puts them first. Not stored in models, which have no others.
    """

    level: Level
    shape: Shape
    tensors: Tensors
    kept: Tensor | None = None

    @property
    def bits(self) -> int:
        """Bits of all tensors: equals `level.storage_bits(shape)`."""
        return sum(t.numel() * t.element_size() * 8 for t in self.tensors.values())

    def dense(self) -> Tensor:  # (out, in), float32
        """The dense weight."""
        from autocompress.packed import dense_weight

        return dense_weight(self.level, self.shape, self.tensors, self.kept)
