"""The Lagrangian dual of the multiple-choice knapsack: what no solution can be better than."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Row = tuple[Numbers, float]  # costs of all picks, and what those of one per layer may sum to

CUTS = 200  # at most; two limits take 10 to 30
EXACT = 1e-7  # relative distance from the best bound at which the search for it stops


class Bound(NamedTuple):
    """What no solution can be better than.

    Args:
        least: total price of a solution, at least.
        excess: (picks,), not negative; a solution with this pick costs `least + excess` or more.
        worth: (limits,), price of a unit of each limit that this follows from.
    """

    least: float
    excess: Numbers
    worth: Numbers


def lower_bound(prices: Numbers, owner: Indices, rows: Sequence[Row]) -> Bound:
    """The bound of the best multipliers, by Kelley's cutting planes.

    With a price per unit of each limit in place of the limit, every layer takes its own best
    pick. What that costs is concave in the prices per unit; each answer is a plane above it, and
    the next prices are those at which the planes so far leave the highest bound. Any prices per
    unit give a valid bound, so one that stops early only costs time later.

    Args:
        prices: (picks,), finite.
        owner: (picks,), the layer of each pick, rising from 0.
        rows: limits: costs (picks,), not negative, and what one pick per layer may sum to.

    References:
        Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, chapters 3.8 and 11.2.
        Kelley, "The Cutting-Plane Method for Solving Convex Programs", 1960.
    """
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    # In shares of each limit, so that prices per unit are of one magnitude.
    shares = np.array([1 / room if room > 0 else 1.0 for _, room in rows])
    costs = np.zeros((len(rows), len(prices)))
    for place, ((row, _), share) in enumerate(zip(rows, shares, strict=True)):
        costs[place] = row * share
    room = np.array([most * share for (_, most), share in zip(rows, shares, strict=True)])
    worth, highest, best = np.zeros(len(rows)), np.inf, Bound(-np.inf, prices, shares)
    planes: list[Numbers] = []
    for _ in range(CUTS):
        value = prices + worth @ costs
        least = np.minimum.reduceat(value, starts)
        excess = value - least[owner]
        total = float(least.sum() - worth @ room)
        if total > best.least:
            best = Bound(total, excess, worth * shares)
        if not rows or highest - best.least <= EXACT * max(1.0, abs(best.least)):
            break
        chosen = _first_zeros(excess, owner)
        planes.append(np.array([prices[chosen].sum(), *costs[:, chosen].sum(axis=1) - room]))
        top = _top(np.array(planes), float(np.ptp(prices)) * len(starts))
        if top is None:
            break
        worth, highest = top
    return best


def _first_zeros(excess: Numbers, owner: Indices) -> Indices:
    """The first pick of every layer whose excess is 0."""
    hits = np.flatnonzero(excess == 0)
    return hits[np.flatnonzero(np.diff(owner[hits], prepend=-1))]


def _top(
    planes: Numbers,  # (planes, 1 + limits): constant and slopes
    most: float,  # of each coordinate
) -> tuple[Numbers, float] | None:  # (limits,), height
    """Where the least of the planes is highest; None where numbers of many magnitudes forbid it."""
    from scipy.optimize import linprog

    limits = planes.shape[1] - 1
    result = linprog(
        np.array([*np.zeros(limits), -1.0]),
        A_ub=np.column_stack([-planes[:, 1:], np.ones(len(planes))]),
        b_ub=planes[:, 0],
        bounds=[*[(0.0, most)] * limits, (None, None)],
    )
    return None if result.x is None else (result.x[:-1], float(result.x[-1]))
