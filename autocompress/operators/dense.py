"""The dense level: the weight as it is, in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autocompress.levels import Dense, Level
from autocompress.operators import Solution, Solver, Statistics, operator
from autocompress.packed import Packed


@operator(Dense)
def keep(
    weights: Sequence[Tensor], statistics: Statistics, levels: Sequence[Level], solver: Solver
) -> list[list[Solution]]:
    """bf16 copies; the error is bf16's own rounding and is called zero."""
    return [[_kept(weight, level) for level in levels] for weight in weights]


def _kept(weight: Tensor, level: Level) -> Solution:
    shape = (weight.shape[0], weight.shape[1])
    packed = Packed(level, shape, {"weight": weight.to(torch.bfloat16)})
    return Solution(packed, 0.0, torch.zeros(shape[0]))
