"""Ends: first and last blocks get more bits, the rule of thumb that many recipes follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.core import Allocation, Layer, Problem, Trial
from autocompress.levels import Level
from autocompress.strategies import check_setting
from autocompress.strategies.uniform import nearest_uniform
from autocompress.summary import block_of

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Ends:
    """Evaluates the nearest uniform allocation with its first and last blocks raised.

    Args:
        tokens: to evaluate it on; whole windows, at most the search split.
    """

    tokens: int = 8192

    def __post_init__(self) -> None:
        check_setting("tokens", self.tokens, 1)

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        yield from problem.evaluate([ends_high(problem)], problem.fidelity(self.tokens), "ends")


def ends_high(problem: Problem) -> Allocation:
    """The nearest uniform allocation, raised a level at a time from both ends while it fits.

    The outermost blocks go first, as far as the budgets allow, then the next ones; layers outside
    of the blocks, such as the head, count as outermost.

    Raises:
        BudgetError: no allocation fits; says the smallest possible budget.
    """
    best = nearest_uniform(problem)
    first = problem.table(problem.budgets[0].cost) if problem.budgets else problem.costs[0]
    for part in _from_the_ends(problem.space.layers):
        while True:
            levels = list(best.levels)
            for i in part:
                levels[i] = _next(first.entries[i], problem.space.levels[i], levels[i])
            raised = Allocation(tuple(levels))
            if raised == best or not problem.fits(raised):
                break
            best = raised
    return best


def _from_the_ends(layers: tuple[Layer, ...]) -> list[list[int]]:
    """Numbers of the layers: outside of blocks; of the outermost two blocks; of the next two; …"""
    blocks = [block_of(layer) for layer in layers]
    last = max((block for block in blocks if block is not None), default=0)
    parts: dict[int, list[int]] = {}
    for i, block in enumerate(blocks):
        parts.setdefault(-1 if block is None else min(block, last - block), []).append(i)
    return [parts[depth] for depth in sorted(parts)]


def _next(costs: Mapping[Level, float], allowed: tuple[Level, ...], own: Level) -> Level:
    """The cheapest level that costs more, or the same where there is none."""
    dearer = [level for level in allowed if costs[level] > costs[own]]
    return min(dearer, key=costs.__getitem__, default=own)
