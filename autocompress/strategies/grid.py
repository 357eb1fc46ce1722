"""A problem as arrays: layers by levels, so that many allocations are worked on at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from autocompress.beam import multipliers
from autocompress.core import Allocation, Problem
from autocompress.knapsack import Prices
from autocompress.levels import Level

Numbers = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Grid:
    """Costs of every (layer, level), and how allocations are written as numbers of levels.

    Args:
        levels: per layer, in the order of the space.
        exists: (layers, levels), false behind the last level of a layer.
        costs: (budgets, layers, levels), above each layer's least; 0 where no level is.
        room: (budgets,), what the costs may sum to.
    """

    levels: tuple[tuple[Level, ...], ...]
    exists: npt.NDArray[np.bool_]
    costs: Numbers
    room: Numbers

    @classmethod
    def of(cls, problem: Problem) -> Self:
        """The grid of a problem; one layer at least has a level."""
        levels = problem.space.levels
        most = max(map(len, levels))
        exists = np.array([[k < len(row) for k in range(most)] for row in levels])
        limits = [(problem.table(budget.cost), budget.limit) for budget in problem.budgets]
        costs = np.zeros((len(limits), *exists.shape))
        for cost, (table, _) in zip(costs, limits, strict=True):
            cost[exists] = _flat(levels, table.entries)
        least = np.where(exists, costs, np.inf).min(axis=2, keepdims=True)
        room = np.array([limit - table.base for table, limit in limits]) - least.sum(axis=(1, 2))
        return cls(levels, exists, np.where(exists, costs - least, 0.0), room)

    def array(self, prices: Prices) -> Numbers:  # (layers, levels)
        """Prices as an array, 0 where no level is; what is not finite is ten times the largest."""
        found = np.zeros(self.exists.shape)
        found[self.exists] = _flat(self.levels, prices)
        finite = np.isfinite(found)
        return np.where(finite, found, 10 * np.abs(found[finite]).max(initial=0.0))

    def prices(self, values: Numbers) -> Prices:
        """An array (layers, levels) as prices."""
        rows = zip(self.levels, values.tolist(), strict=True)
        return [dict(zip(allowed, row[: len(allowed)], strict=True)) for allowed, row in rows]

    def encode(self, allocations: Sequence[Allocation]) -> Indices:  # (allocations, layers)
        """The number of every layer's level."""
        rows = [
            [number[level] for number, level in zip(self._numbers, it.levels, strict=True)]
            for it in allocations
        ]
        return np.array(rows, dtype=np.intp).reshape(len(rows), len(self.levels))

    @cached_property
    def _numbers(self) -> list[dict[Level, int]]:
        return [{level: k for k, level in enumerate(row)} for row in self.levels]

    def decode(self, picks: Indices) -> Allocation:
        """The allocation that (layers,) numbers of levels stand for."""
        rows = zip(self.levels, picks.tolist(), strict=True)
        return Allocation(tuple(allowed[pick] for allowed, pick in rows))

    def worth(self, prices: Numbers) -> Numbers:  # (budgets,), price per unit of cost
        """What a unit of each budget is worth: multipliers of the knapsack's Lagrangian dual."""
        owner, _ = np.nonzero(self.exists)
        costs = [cost[self.exists] for cost in self.costs]
        return multipliers(prices[self.exists], owner, list(zip(costs, self.room, strict=True)))


def _flat(levels: Sequence[Sequence[Level]], entries: Prices) -> list[float]:
    """What every (layer, level) is priced at, in order."""
    return [
        entry[level] for allowed, entry in zip(levels, entries, strict=True) for level in allowed
    ]
