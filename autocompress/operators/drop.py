"""Dropped levels: all of a dropped output is error, one that nobody reads has none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autocompress.levels import Drop, Level, Unread
from autocompress.operators import Solution, Solver, Statistics, operator
from autocompress.operators.measure import Measure
from autocompress.packed import Packed


@operator(Drop)
def drop(
    weights: Sequence[Tensor], statistics: Statistics, levels: Sequence[Level], solver: Solver
) -> list[list[Solution]]:
    """Zeros in place of every weight."""
    measure = Measure.of(statistics, solver)
    return [
        [measure(weight, Packed(level, (weight.shape[0], weight.shape[1]), {})) for level in levels]
        for weight in weights
    ]


@operator(Unread)
def leave(
    weights: Sequence[Tensor], statistics: Statistics, levels: Sequence[Level], solver: Solver
) -> list[list[Solution]]:
    """No weights, and no error, since nobody reads their outputs."""
    return [
        [
            Solution(
                Packed(level, (len(weight), weight.shape[1]), {}), 0.0, torch.zeros(len(weight))
            )
            for level in levels
        ]
        for weight in weights
    ]
