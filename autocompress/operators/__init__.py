"""Operators: weight x input statistics x levels -> packed weights, found by the level's type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from autocompress.levels import Level
from autocompress.packed import Packed


@dataclass(frozen=True, slots=True)
class Solver:
    """How weights are rounded to a level; part of a database's identity.

    Args:
        method: 'gptq' compensates rounding errors (Frantar et al., arXiv:2210.17323), 'rtn' not.
        damping: added to the Hessian's diagonal, as a fraction of its mean, in (0, 1].
        activation_order: solve columns by falling Hessian diagonal; group scales are fixed before,
            in the stored column order, so the layout does not change.
        search_scales: shrink each group's range to the least Hessian-weighted squared error
            instead of taking minimum and maximum.
    """

    method: str = "gptq"
    damping: float = 0.01
    activation_order: bool = True
    search_scales: bool = True


@dataclass(frozen=True, slots=True)
class Statistics:
    """What an operator may know of a layer's inputs.

    Args:
        hessian: (in, in) float32, mean of x xT over calibration tokens; None means identity.
        tokens: how many tokens it was averaged over.
    """

    hessian: Tensor | None
    tokens: int


@dataclass(frozen=True, slots=True)
class Solution:
    """One weight at one level, with its error.

    Args:
        packed: the stored form.
        error: tr(dW H dWT) / tr(W H WT), relative squared error of the layer's output.
        rows: (out,) float32, diagonal of dW H dWT: mean squared error of every output.
    """

    packed: Packed
    error: float
    rows: Tensor


Operator = Callable[[Sequence[Tensor], Statistics, Sequence[Level], Solver], list[list[Solution]]]
OPERATORS: dict[type, Operator] = {}


def operator(level_type: type) -> Callable[[Operator], Operator]:
    """Register the operator of a level family."""

    def register(function: Operator) -> Operator:
        OPERATORS[level_type] = function
        return function

    return register


def solve(
    weights: Sequence[Tensor],  # each (out_i, in), float32, modules that share one input
    statistics: Statistics,
    levels: Sequence[Level],
    solver: Solver,
) -> list[list[Solution]]:  # [module][level]
    """Every weight at every level; levels of one family are solved together."""
    from autocompress.operators import dense, quantize  # noqa: F401  (they register themselves)

    rows: list[dict[Level, Solution]] = [{} for _ in weights]
    for family in dict.fromkeys(map(type, levels)):
        wanted = [level for level in levels if type(level) is family]
        for row, found in zip(
            rows, OPERATORS[family](weights, statistics, wanted, solver), strict=True
        ):
            row.update(zip(wanted, found, strict=True))
    return [[row[level] for level in levels] for row in rows]


def output_energy(weight: Tensor, hessian: Tensor | None) -> Tensor:  # (out,)
    """Mean squared output of each row: w H wT, or w wT without statistics."""
    return ((weight if hessian is None else weight @ hessian) * weight).sum(1)
