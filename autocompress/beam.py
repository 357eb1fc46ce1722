"""The multiple-choice knapsack without a solver: Lagrangian prices, then a beam over the layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Row = tuple[Numbers, float]  # costs of all picks, and what those of one per layer may sum to

WIDTH = 2048  # states kept per layer
SWEEPS, HALVINGS = 12, 40  # of the search for multipliers


def solve_beam(
    prices: Numbers, owner: Indices, rows: Sequence[Row], width: int = WIDTH
) -> Indices | None:
    """One pick per layer: a good answer within every limit, or None if none was found.

    Not proven to be the best. Layers are decided in order; of the states that can still be
    completed, those of least price plus the worth of what they used are kept. What a unit of each
    limit is worth comes from the Lagrangian dual, by coordinate-wise bisection.

    Args:
        prices: (picks,), finite.
        owner: (picks,), the layer of each pick, rising from 0.
        rows: limits: costs (picks,), not negative, and what one pick per layer may sum to.

    References:
        Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, chapters 5.3 and 11.
    """
    costs = np.stack([row for row, _ in rows], axis=1) if rows else np.zeros((len(prices), 0))
    room = np.array([most for _, most in rows], dtype=np.float64)
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    worth = multipliers(prices, costs, room, starts)
    least = np.minimum.reduceat(costs, starts, axis=0)
    left = np.cumsum(least[::-1], axis=0)[::-1] - least  # of the layers behind each
    price, used = np.zeros(1), np.zeros((1, len(room)))
    history: list[tuple[Indices, Indices]] = []
    for layer, picks in enumerate(np.split(np.arange(len(prices)), starts[1:])):
        sums = used[:, None] + costs[picks]
        parent, choice = np.nonzero((sums + left[layer] <= room).all(axis=2))
        if not len(parent):
            return None
        pick = picks[choice]
        price, used = price[parent] + prices[pick], sums[parent, choice]
        if len(price) > width:
            best = np.argpartition(price + used @ worth, width)[:width]
            parent, pick, price, used = parent[best], pick[best], price[best], used[best]
        history.append((parent, pick))
    return _trace(history, int(price.argmin()))


def _trace(history: list[tuple[Indices, Indices]], state: int) -> Indices:
    """The picks that led to a state."""
    chosen = []
    for parent, pick in reversed(history):
        chosen.append(pick[state])
        state = int(parent[state])
    return np.array(chosen[::-1])


def multipliers(
    prices: Numbers, costs: Numbers, room: Numbers, starts: Indices
) -> Numbers:  # (limits,)
    """Worth of a unit of each limit at which the best pick of every layer just fits."""
    worth = np.zeros(len(room))
    for _ in range(SWEEPS if len(worth) > 1 else 1):
        for row in range(len(worth)):
            low, high = 0.0, float(np.ptp(prices)) / _smallest_step(costs[:, row])
            for _ in range(HALVINGS):
                worth[row] = (low + high) / 2
                best = _best(prices + costs @ worth, starts)
                if costs[best, row].sum() > room[row]:
                    low = worth[row]
                else:
                    high = worth[row]
            worth[row] = high
    return worth


def _smallest_step(costs: Numbers) -> float:
    """The smallest difference between a limit's costs."""
    steps = np.diff(np.unique(costs))
    return float(steps.min()) if len(steps) else 1.0


def _best(values: Numbers, starts: Indices) -> Indices:
    """The first pick of least value in every layer."""
    least = np.repeat(np.minimum.reduceat(values, starts), np.diff(starts, append=len(values)))
    hits = np.flatnonzero(values == least)
    owner = np.searchsorted(starts, hits, side="right")
    return hits[np.flatnonzero(np.diff(owner, prepend=0))]
