"""Moves: changes of an allocation that stay within every budget, drawn by what they should gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from autocompress.strategies.grid import Grid, Indices, Numbers

Mask = npt.NDArray[np.bool_]

MOST_CHANGES = 6  # that a move begins with; the smaller of two draws counts, so few are likely


@dataclass(frozen=True, eq=False)
class Moves:
    """Draws changes of layers in proportion to exp(-regret / temperature).

    The regret of moving one layer to one level is what the prices say that it costs, plus what
    its change of every budget's cost is worth elsewhere: at the prices' own best allocation no
    regret is negative, whichever way and however far the layer moves, so raises and reductions
    of layers of any size compare in nats.

    Args:
        prices: (layers, levels), nats/token up to a constant of each layer.
        regretted: (layers, levels), prices plus what the costs are worth elsewhere.
        temperature: nats/token, above 0.
    """

    grid: Grid
    prices: Numbers
    regretted: Numbers
    temperature: float

    @classmethod
    def of(cls, grid: Grid, prices: Numbers, temperature: float = 1.0) -> Self:
        """The moves of some prices.

        Args:
            temperature: in regrets of a typical layer's second best level, above 0.
        """
        worth = grid.worth(prices) if len(grid.room) else np.zeros(0)
        total: Numbers = prices + np.tensordot(worth, grid.costs, axes=1)
        best = np.sort(np.where(grid.exists, total, np.inf), axis=1)[:, :2]
        second = best[np.isfinite(best).all(axis=1)]
        typical = float(np.median(np.ptp(second, axis=1))) if second.size else 0.0
        return cls(grid, prices, total, temperature * typical or 1.0)

    def __call__(self, parent: Indices, rng: np.random.Generator) -> Indices | None:
        """A changed copy of (layers,) levels, or None when this draw leads to none."""
        picks, free = parent.copy(), np.ones(len(parent), dtype=np.bool_)
        for _ in range(min(rng.integers(1, MOST_CHANGES + 1, size=2))):
            self._change(picks, free[:, None] & self._others(picks), free, rng)
        return self.settle(picks, rng, free)

    def settle(
        self, picks: Indices, rng: np.random.Generator, free: Mask | None = None
    ) -> Indices | None:
        """Lower layers by chance until every budget holds, then use what room is left.

        Args:
            picks: (layers,), changed in place.
            free: (layers,), those that may still change; None is all.

        Returns:
            `picks`, or None when no free layer can be lowered or budgets break in turns.
        """
        free = np.ones(len(picks), dtype=np.bool_) if free is None else free
        for _ in range(len(picks)):
            broken = np.flatnonzero(self._used(picks) > self.grid.room)
            if not len(broken):
                return self._fill(picks, free)
            freed = -self._steps(picks, self.grid.costs[broken[0]])
            allowed = free[:, None] & self._others(picks) & (freed > 0)
            if not self._change(picks, allowed, free, rng):
                return None
        return None

    def _fill(self, picks: Indices, free: Mask) -> Indices:
        """Take the largest falls in price that the budgets still have room for."""
        for _ in range(len(picks)):
            room = self.grid.room - self._used(picks)
            allowed = free[:, None] & self._others(picks)
            for cost, left in zip(self.grid.costs, room, strict=True):
                allowed &= self._steps(picks, cost) <= left
            gains = np.where(allowed, -self._steps(picks, self.prices), 0.0)
            layer, level = np.unravel_index(int(gains.argmax()), gains.shape)
            if gains[layer, level] <= 0:
                break
            picks[layer] = level
        return picks

    def _change(self, picks: Indices, allowed: Mask, free: Mask, rng: np.random.Generator) -> bool:
        """Draw one allowed (layer, level), and hold it; False when none is."""
        places = np.flatnonzero(allowed)
        if not len(places):
            return False
        regrets = self._steps(picks, self.regretted)
        chances = np.exp(-(regrets.flat[places] - regrets.flat[places].min()) / self.temperature)
        sums = chances.cumsum()
        drawn = np.searchsorted(sums, rng.random() * sums[-1], side="right")
        place = places[min(int(drawn), len(places) - 1)]
        layer, level = np.unravel_index(int(place), allowed.shape)
        picks[layer], free[layer] = level, False
        return True

    def _others(self, picks: Indices) -> Mask:  # (layers, levels)
        """Levels that are not those of `picks`."""
        others: Mask = self.grid.exists & (np.arange(self.grid.exists.shape[1]) != picks[:, None])
        return others

    def _used(self, picks: Indices) -> Numbers:  # (budgets,)
        used: Numbers = self.grid.costs[:, np.arange(len(picks)), picks].sum(axis=1)
        return used

    @staticmethod
    def _steps(picks: Indices, values: Numbers) -> Numbers:  # (layers, levels)
        """What each value is above that of the layer's own level."""
        steps: Numbers = values - values[np.arange(len(picks)), picks, None]
        return steps
