"""What may be left out of a model together, and how much of a budget that meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autocompress.core import Allocation, Problem, SearchSpace
from autocompress.knapsack import solve_knapsack
from autocompress.levels import Drop, Level
from autocompress.predictions import Sensitivities
from autocompress.summary import block_of

Unit = frozenset[int]  # layers of a space that are left out together
NOTHING: Unit = frozenset()
DROP: Level = Drop()


def removes(space: SearchSpace) -> bool:
    """Whether some layer may be dropped or kept."""
    return any(DROP in allowed and len(allowed) > 1 for allowed in space.levels)


def only_removes(space: SearchSpace) -> bool:
    """Whether layers have no other choice than that."""
    return removes(space) and all(len(keeping(allowed)) <= 1 for allowed in space.levels)


def keeping(allowed: Sequence[Level]) -> tuple[Level, ...]:
    """The levels that keep something."""
    return tuple(level for level in allowed if level != DROP)


def dropped(allocation: Allocation) -> Unit:
    """Layers that an allocation leaves out."""
    return frozenset(i for i, level in enumerate(allocation.levels) if level == DROP)


def find_units(space: SearchSpace, influence: Sequence[float] = ()) -> list[Unit]:
    """Blocks whose layers may all be dropped, each followed by those of its layers.

    Args:
        influence: of every layer's block; those of least come first. () leaves them in order.
    """
    blocks: dict[int, list[int]] = {}
    for index, layer in enumerate(space.layers):
        block = block_of(layer)
        blocks.setdefault(-1 - index if block is None else block, []).append(index)
    order = list(blocks.values())
    if influence:
        order.sort(key=lambda members: influence[members[0]])
    found: dict[Unit, None] = {}
    for members in order:
        free = [i for i in members if DROP in space.levels[i] and len(space.levels[i]) > 1]
        if len(free) == len(members):
            found[frozenset(free)] = None
        found |= {frozenset({i}): None for i in free}
    return list(found)


@dataclass(frozen=True)
class Rest:
    """What becomes of the layers that are not left out.

    Args:
        problem: its space and budgets.
        prices: of every layer's levels, nats/token beside a dense model.
        base: every layer at its best level; beside it removals are measured.
    """

    problem: Problem
    prices: Sensitivities
    base: Allocation

    @classmethod
    def of(cls, problem: Problem, prices: Sensitivities) -> Rest:
        """Behind these prices."""
        rows = zip(problem.space.levels, prices, strict=True)
        best = (min(keeping(allowed) or (DROP,), key=row.__getitem__) for allowed, row in rows)
        return cls(problem, prices, Allocation(tuple(best)))

    def without(self, gone: Unit) -> Allocation:
        """The base less some layers."""
        levels = enumerate(self.base.levels)
        return Allocation(tuple(DROP if i in gone else level for i, level in levels))

    def complete(self, gone: Unit) -> Allocation | None:
        """The best allocation that leaves out just these; None where it is over a budget."""
        bare = self.without(gone)
        if bare.keeps_some and self.problem.fits(bare):
            return bare
        space = self.problem.space
        if only_removes(space):
            return None
        levels = tuple(
            (DROP,) if i in gone else keeping(allowed) or (DROP,)
            for i, allowed in enumerate(space.levels)
        )
        limits = [(self.problem.table(b.cost), b.limit) for b in self.problem.budgets]
        return solve_knapsack(replace(space, levels=levels), limits, self.prices)

    def predicted(self, answer: Allocation) -> float:
        """What an answer's kept layers are predicted to lose beyond the base, nats/token."""
        rows = zip(answer.levels, self.base.levels, self.prices, strict=True)
        return sum(row[own] - row[best] for own, best, row in rows if own != DROP)

    def saving(self, more: Unit, gone: Unit) -> float:
        """The share of what is still over the budgets that leaving out `more` saves."""
        bare = self.without(gone)
        found = 0.0
        for budget in self.problem.budgets:
            table = self.problem.table(budget.cost)
            over = table.total(bare) - budget.limit
            if over > 0:
                saved = sum(
                    table.entries[i][bare.levels[i]] - table.entries[i][DROP] for i in more - gone
                )
                found += min(saved, over) / over
        return found
