"""Level switches: small random changes of an allocation that stay within every budget."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from autocompress.core import Allocation, CostTable, Problem
from autocompress.levels import Level

if TYPE_CHECKING:
    import numpy as np

MOST_SWITCHES = 3  # of one mutation; the smaller of two draws counts, so that few are likely

Ladder = dict[Level, Level]  # level -> the next one


class Mutation(Protocol):
    """Changes an allocation by chance."""

    def __call__(self, parent: Allocation, rng: np.random.Generator) -> Allocation | None:
        """A changed copy within every budget, or None when this draw leads to none."""


@dataclass(frozen=True)
class LevelSwitch:
    """The mutation of a problem: which level comes next, for every layer and direction.

    Levels are ranked by cost, never by their place in a file: fewer bits can cost more time.

    Args:
        up: per layer, level -> the next in rank of the first budget's cost.
        limits: table, limit, and per layer, level -> the next that costs less in that table.

    References:
        Sieberling et al., "EvoPress", arXiv 2410.14649, section 3 (level-switch mutation).
    """

    up: tuple[Ladder, ...]
    limits: tuple[tuple[CostTable, float, tuple[Ladder, ...]], ...]

    @classmethod
    def of(cls, problem: Problem) -> Self:
        """The mutation of `problem`; without a budget, levels rank by its first cost."""
        limited = [(problem.table(budget.cost), budget.limit) for budget in problem.budgets]
        ranking = limited[0][0] if limited else problem.costs[0]

        def entries(table: CostTable) -> list[dict[Level, float]]:
            rows = zip(table.entries, problem.space.levels, strict=True)
            return [{level: entry[level] for level in allowed} for entry, allowed in rows]

        return cls(
            tuple(map(_up, entries(ranking))),
            tuple((table, limit, tuple(map(_down, entries(table)))) for table, limit in limited),
        )

    def __call__(self, parent: Allocation, rng: np.random.Generator) -> Allocation | None:
        """A changed copy within every budget, or None when this draw leads to none.

        Each switch raises one layer by one level; when the budgets have no room for that, it
        lowers others until they are met.
        """
        levels = list(parent.levels)
        raised: set[int] = set()
        for _ in range(draw_switches(rng)):
            candidates = [
                layer
                for layer, level in enumerate(levels)
                if level in self.up[layer] and (layer in raised or level == parent.levels[layer])
            ]
            if not candidates:
                break
            layer = pick(candidates, rng)
            levels[layer] = self.up[layer][levels[layer]]
            raised.add(layer)
            if not self._repair(levels, raised, rng):
                return None
        return Allocation(tuple(levels))

    def lowered(self, above: Allocation, rng: np.random.Generator) -> Allocation | None:
        """`above` with layers lowered by chance until every budget is met; None if that fails."""
        levels = list(above.levels)
        for _ in range(self._steps()):
            broken = self._broken(levels)
            if broken is None:
                return Allocation(tuple(levels))
            *_, down = broken
            lowerable = [layer for layer, level in enumerate(levels) if level in down[layer]]
            if not lowerable:
                return None
            layer = pick(lowerable, rng)
            levels[layer] = down[layer][levels[layer]]
        return None

    def _repair(self, levels: list[Level], raised: set[int], rng: np.random.Generator) -> bool:
        """Lower layers that were not raised until every budget is met; False when none can."""
        for _ in range(self._steps()):
            broken = self._broken(levels)
            if broken is None:
                return True
            excess, table, down = broken
            freed = {
                layer: table.entries[layer][level] - table.entries[layer][down[layer][level]]
                for layer, level in enumerate(levels)
                if layer not in raised and level in down[layer]
            }
            if not freed:
                return False
            layer = pick(_lowering(freed, excess, rng), rng)
            levels[layer] = down[layer][levels[layer]]
        return False

    def _steps(self) -> int:
        """Layers to lower before giving up: what helps one budget may break another, in turns."""
        return 1 + sum(len(ladder) for *_, down in self.limits for ladder in down)

    def _broken(self, levels: list[Level]) -> tuple[float, CostTable, tuple[Ladder, ...]] | None:
        """The first budget that is not met: by how much, its table and the ways down."""
        allocation = Allocation(tuple(levels))
        for table, limit, down in self.limits:
            excess = table.total(allocation) - limit
            if excess > 0:
                return excess, table, down
        return None


def _lowering(freed: Mapping[int, float], excess: float, rng: np.random.Generator) -> Sequence[int]:
    """Layers to pick from: every other time all, else those that free enough with least waste.

    Where layers differ in size, a random partner of a small raise is mostly a large layer, and
    most of what it frees would be thrown away; EvoPress pairs layers of equal size only.
    """
    enough = [amount for amount in freed.values() if amount >= excess]
    if rng.random() < 0.5 or not enough:
        return list(freed)
    return [layer for layer, amount in freed.items() if amount == min(enough)]


def _up(entry: Mapping[Level, float]) -> Ladder:
    """Level -> the next in rank of cost; equal costs keep their order."""
    ranked = sorted(entry, key=entry.__getitem__)
    return dict(itertools.pairwise(ranked))


def _down(entry: Mapping[Level, float]) -> Ladder:
    """Level -> the dearest of those that cost less."""
    ranked = sorted(entry, key=entry.__getitem__)
    return {
        level: next(lower for lower in reversed(ranked) if entry[lower] < entry[level])
        for level in ranked
        if entry[level] > entry[ranked[0]]
    }


def draw_switches(rng: np.random.Generator) -> int:
    """How many layers a mutation raises: 1 to 3 with chances 5, 3 and 1 out of 9."""
    return int(min(rng.integers(1, MOST_SWITCHES + 1, size=2)))


def pick(layers: Sequence[int], rng: np.random.Generator) -> int:
    """One of them, each with the same chance."""
    return layers[int(rng.integers(len(layers)))]
