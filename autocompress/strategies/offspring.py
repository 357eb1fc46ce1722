"""Offspring of a surrogate search: moves, crosses of elites, and what drawn prices lead to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from autocompress.core import Allocation, Problem
from autocompress.knapsack import Region, solve_knapsack
from autocompress.strategies.grid import Grid, Indices, Numbers
from autocompress.strategies.moves import Moves
from autocompress.strategies.mutation import LevelSwitch
from autocompress.strategies.surrogate_model import Surrogate

ELITES = 6  # parents of crosses, at most
APART = 0.02  # share of the layers in which two elites differ, at least
CROSSES = 0.3  # share of the pool
SOLVED = 8  # knapsacks per pool
TRUST = (0.05, 0.15, 0.5)  # shares of the layers that a knapsack's answer may change, in turns
GAP = 1e-3  # relative, of those knapsacks: their prices are drawn, so closer is no better
TRIES = 2  # draws per wanted offspring before a neighbourhood counts as exhausted


@dataclass(frozen=True, eq=False)
class Offspring:
    """Draws a pool of different allocations within every budget, none of them the parent.

    Args:
        moves: guided by prices.
        switch: not guided by anything.
        random: share of moves that are switches.
    """

    problem: Problem
    grid: Grid
    moves: Moves
    switch: LevelSwitch
    random: float

    @classmethod
    def of(cls, problem: Problem, grid: Grid, moves: Moves, random: float) -> Self:
        """The offspring of a problem."""
        return cls(problem, grid, moves, LevelSwitch.of(problem), random)

    def __call__(
        self,
        parent: Allocation,
        elites: Sequence[Allocation],
        surrogate: Surrogate,
        count: int,
        rng: np.random.Generator,
    ) -> list[Allocation]:
        """`count` allocations, fewer where the space is small."""
        found = dict.fromkeys(self._solved(parent, surrogate, rng))
        crosses = round(CROSSES * count) if len(elites) > 1 else 0
        for draw in range(TRIES * count):
            if len(found) >= count:
                break
            child = self._cross(elites, rng) if draw < crosses else self._move(parent, rng)
            if child is not None and self.problem.fits(child):
                found[child] = None
        found.pop(parent, None)
        return list(found)[:count]

    def _move(self, parent: Allocation, rng: np.random.Generator) -> Allocation | None:
        if rng.random() < self.random:
            return self.switch(parent, rng)
        moved = self.moves(self.grid.encode([parent])[0], rng)
        return None if moved is None else self.grid.decode(moved)

    def _cross(self, elites: Sequence[Allocation], rng: np.random.Generator) -> Allocation | None:
        pair = rng.choice(len(elites), size=2, replace=False)
        one, other = self.grid.encode([elites[index] for index in pair])
        child = cross(one, other, self.moves, rng)
        return None if child is None else self.grid.decode(child)

    def _solved(
        self, parent: Allocation, surrogate: Surrogate, rng: np.random.Generator
    ) -> list[Allocation]:
        """Best allocations near the parent, each by prices that may be true.

        References:
            Thompson, "On the likelihood that one unknown probability exceeds another", 1933.
        """
        limits = [(self.problem.table(it.cost), it.limit) for it in self.problem.budgets]
        found = []
        drawn = surrogate.draw_prices(self.grid.encode([parent])[0], SOLVED, rng)
        for draw, values in enumerate(drawn):
            most = max(2, round(TRUST[draw % len(TRUST)] * len(parent.levels)))
            near = [Region(parent, most=most)]
            prices = self.grid.prices(values)
            found.append(solve_knapsack(self.problem.space, limits, prices, near, GAP))
        return [it for it in found if it is not None]


def cross(one: Indices, other: Indices, moves: Moves, rng: np.random.Generator) -> Indices | None:
    """A child that takes runs of layers from either parent, then is settled within the budgets.

    Half of the draws cut the layers at two places, so that what fits together stays together;
    the others take each layer by chance.
    """
    if rng.random() < 0.5:
        first, last = np.sort(rng.integers(0, len(one) + 1, size=2))
        mine = (np.arange(len(one)) >= first) & (np.arange(len(one)) < last)
    else:
        mine = rng.random(len(one)) < rng.random()
    return moves.settle(np.where(mine, one, other), rng)


def diverse_elites(picks: Indices, losses: Numbers) -> list[int]:
    """Numbers of the best (allocations, layers) that differ enough from the better ones."""
    least = max(1, round(APART * picks.shape[1]))
    chosen: list[int] = []
    for number in np.argsort(losses, kind="stable"):
        if all((picks[number] != picks[better]).sum() >= least for better in chosen):
            chosen.append(int(number))
        if len(chosen) == ELITES:
            break
    return chosen
