"""The multiple-choice knapsack without a solver: Lagrangian prices, then a beam over the layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autocompress.dual import Indices, Numbers, Row, lower_bound

WIDTH = 2048  # states kept per layer
NEAREST = 8  # picks of a layer that are considered, those of least price at the multipliers first
SWEEPS, HALVINGS = 12, 40  # of the search for multipliers


def solve_beam(
    prices: Numbers, owner: Indices, rows: Sequence[Row], width: int = WIDTH
) -> tuple[Indices | None, bool]:
    """One pick per layer: a good answer within every limit, not proven to be the best.

    Layers are decided in order; of the states that can still be completed, those of least price
    plus the worth of what they used are kept. What a unit of each limit is worth comes from the
    Lagrangian dual.

    Args:
        prices: (picks,), finite.
        owner: (picks,), the layer of each pick, rising from 0.
        rows: limits: costs (picks,), not negative, and what one pick per layer may sum to.

    Returns:
        The picks, None where none were found; and whether nothing was left out, so that the
        answer is the best, or none the proof that there is none.

    References:
        Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, chapters 5.3 and 11.
    """
    costs = np.stack([row for row, _ in rows], axis=1) if rows else np.zeros((len(prices), 0))
    room = np.array([most for _, most in rows], dtype=np.float64)
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    worth = multipliers(prices, owner, rows)
    least = np.minimum.reduceat(costs, starts, axis=0)
    left = np.cumsum(least[::-1], axis=0)[::-1] - least  # of the layers behind each
    near = _near(prices + costs @ worth, costs, owner, starts)
    price, used, every = np.zeros(1), np.zeros((1, len(room))), len(near) == len(prices)
    history: list[tuple[Indices, Indices]] = []
    for layer, picks in enumerate(
        np.split(near, np.searchsorted(owner[near], range(1, len(left))))
    ):
        sums = used[:, None] + costs[picks]
        parent, choice = np.nonzero((sums + left[layer] <= room).all(axis=2))
        if not len(parent):
            return None, every
        pick = picks[choice]
        price, used = price[parent] + prices[pick], sums[parent, choice]
        if len(price) > width:
            best = np.argpartition(price + used @ worth, width)[:width]
            parent, pick, price, used = parent[best], pick[best], price[best], used[best]
            every = False
        history.append((parent, pick))
    return _trace(history, int(price.argmin())), every


def _near(values: Numbers, costs: Numbers, owner: Indices, starts: Indices) -> Indices:
    """The picks of every layer of least value, and the cheapest in each limit."""
    order = np.lexsort((values, owner))
    keep = np.zeros(len(values), dtype=bool)
    keep[order] = np.arange(len(order)) - starts[owner] < NEAREST
    for row in costs.T:
        keep[_best(row, starts)] = True
    return np.flatnonzero(keep)


def _trace(history: list[tuple[Indices, Indices]], state: int) -> Indices:
    """The picks that led to a state."""
    chosen = []
    for parent, pick in reversed(history):
        chosen.append(pick[state])
        state = int(parent[state])
    return np.array(chosen[::-1])


def multipliers(prices: Numbers, owner: Indices, rows: Sequence[Row]) -> Numbers:  # (limits,)
    """Worth of a unit of each limit at which the best pick of every layer about fits."""
    try:
        return lower_bound(prices, owner, rows).worth
    except ImportError:  # without scipy: limit by limit, which ends early where limits clash
        return _bisected(prices, owner, rows)


def _bisected(prices: Numbers, owner: Indices, rows: Sequence[Row]) -> Numbers:  # (limits,)
    """The same by bisection of one multiplier after the other."""
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    worth, values = np.zeros(len(rows)), prices
    for _ in range(SWEEPS if len(worth) > 1 else 1):
        for place, (costs, room) in enumerate(rows):
            others = values - worth[place] * costs
            low, high = 0.0, float(np.ptp(prices)) / _smallest_step(costs)
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                if costs[_best(others + middle * costs, starts)].sum() > room:
                    low = middle
                else:
                    high = middle
            worth[place], values = high, others + high * costs
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
