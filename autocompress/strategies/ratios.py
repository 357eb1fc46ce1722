"""Ratios: baselines that say how much of each layer to keep, by a rule instead of a search.

A rule gives every layer a share of its dense cost; the shares of a budget are their mean. Published
rules draw ratios from a continuum, so the levels that come nearest are taken: what rounding adds
or takes at one layer, the next ones make up for, and the budgets hold exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.core import Allocation, CostTable, Problem, Trial
from autocompress.cost import choose
from autocompress.levels import Level
from autocompress.strategies import check_setting
from autocompress.summary import block_of

if TYPE_CHECKING:
    import numpy as np

SPREAD = 0.08  # of the dense cost, half the range of a layer's share: lambda of OWL for LLaMA
DENSE = {"bits": 16.0, "bytes": 2.0, "parameters": 1.0}  # cost of a dense weight, by cost


@dataclass(frozen=True)
class Arithmetic:
    """Shares fall from the first block to the last in equal steps.

    Args:
        spread: share of the dense cost by which the first block is above the mean and the last
            below it; negative keeps more of the last ones.
        tokens: to evaluate the answer on; whole windows, at most the search split.
    """

    spread: float = SPREAD
    tokens: int = 8192

    def __post_init__(self) -> None:
        check_setting("spread", self.spread, -1, 1)
        check_setting("tokens", self.tokens, 1)

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        offsets = _scaled(_depths(problem), -self.spread)
        found = nearest(problem, offsets)
        yield from problem.evaluate([found], problem.fidelity(self.tokens), "arithmetic")


@dataclass(frozen=True)
class OutlierWeighed:
    """Blocks with more outliers keep more: OWL.

    Args:
        outliers: per layer, the share of outliers in its block, see `outlier_shares`.
        spread: share of the dense cost, half of what the blocks differ by at most.
        tokens: to evaluate the answer on; whole windows, at most the search split.

    References:
        Yin et al., Outlier Weighed Layerwise Sparsity (OWL), arXiv:2310.05175, section 3.
    """

    outliers: Sequence[float]
    spread: float = SPREAD
    tokens: int = 8192

    def __post_init__(self) -> None:
        check_setting("spread", self.spread, 0, 1)
        check_setting("tokens", self.tokens, 1)

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        found = nearest(problem, _scaled(self.outliers, self.spread))
        yield from problem.evaluate([found], problem.fidelity(self.tokens), "owl")


@dataclass(frozen=True)
class RandomRatios:
    """The best of a few allocations whose shares are drawn evenly around the mean.

    Args:
        candidates: drawn and scored; one is a plain random allocation.
        spread: share of the dense cost by which a layer is above or below the mean, at most.
        tokens: to evaluate each on; whole windows, at most the search split.
    """

    candidates: int = 8
    spread: float = SPREAD
    tokens: int = 8192

    def __post_init__(self) -> None:
        check_setting("candidates", self.candidates, 1)
        check_setting("spread", self.spread, 0, 1)
        check_setting("tokens", self.tokens, 1)

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        layers, fidelity = len(problem.space.layers), problem.fidelity(self.tokens)
        best: Trial | None = None
        for _ in range(self.candidates):
            found = nearest(problem, rng.uniform(-self.spread, self.spread, layers).tolist())
            (trial,) = problem.evaluate([found], fidelity, "random ratios")
            best = trial if best is None else min(best, trial, key=lambda it: it.loss)
            yield best


def _depths(problem: Problem) -> list[float]:
    """The block of every layer; layers outside of blocks stand in the middle."""
    found = [block_of(layer) for layer in problem.space.layers]
    numbers = [block for block in found if block is not None] or [0]
    middle = (min(numbers) + max(numbers)) / 2
    return [middle if block is None else float(block) for block in found]


def _scaled(values: Sequence[float], spread: float) -> list[float]:
    """Values moved and stretched to reach from -spread to spread."""
    low, high = min(values), max(values)
    if low == high:
        return [0.0] * len(values)
    return [spread * (2 * (value - low) / (high - low) - 1) for value in values]


def nearest(problem: Problem, offsets: Sequence[float]) -> Allocation:
    """The allocation within every budget whose layers' shares are nearest to the mean's.

    Args:
        offsets: per layer, what its share of the dense cost should be above the mean.

    Raises:
        BudgetError: no allocation meets every budget.
    """
    space = problem.space
    table = problem.table(problem.budgets[0].cost) if problem.budgets else problem.costs[0]
    sizes = [layer.weights for layer in space.layers]
    dense = DENSE.get(table.name, _dearest(table, sizes))
    limit = problem.budgets[0].limit if problem.budgets else table.base + dense * sum(sizes) / 2
    middle = sum(size * offset for size, offset in zip(sizes, offsets, strict=True)) / sum(sizes)
    mean = (limit - table.base) / sum(sizes)
    wanted = [mean + dense * (offset - middle) for offset in offsets]
    rounded = _rounded(problem, table, wanted, sizes)
    prices = [
        {level: abs(entry[level] - entry[near]) for level in allowed}
        for entry, allowed, near in zip(table.entries, space.levels, rounded, strict=True)
    ]
    return choose(space, problem.costs, problem.budgets, prices)


def _dearest(table: CostTable, sizes: Sequence[int]) -> float:
    """The highest cost of a weight."""
    rows = zip(table.entries, sizes, strict=True)
    return max(cost / size for entry, size in rows for cost in entry.values())


def _rounded(
    problem: Problem, table: CostTable, wanted: Sequence[float], sizes: Sequence[int]
) -> list[Level]:
    """Per layer, the level nearest to the cost per weight wanted and what others left over."""
    found, left = [], 0.0
    rows = zip(problem.space.levels, table.entries, wanted, sizes, strict=True)
    for allowed, entry, share, size in rows:
        goal = share * size + left
        level = min(allowed, key=lambda it: abs(entry[it] - goal))
        found.append(level)
        left = max(-size, min(size, goal - entry[level]))
    return found
