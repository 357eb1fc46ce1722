"""The multiple-choice knapsack by HiGHS, on the few picks that can be in a best answer."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from autocompress.dual import Indices, Numbers, Row, lower_bound

CORE = 64  # picks beside the best of every layer that are tried first, per limit and once more
WIDER = 4  # times as many where they hold no answer
TOLERANCE = 1e-6  # of the total price: HiGHS stops at this distance whatever the gap
STOPPED, INFEASIBLE = 1, 2  # scipy's status: out of time, no solution exists


class SolverError(Exception):
    """No answer, neither a solution nor that there is none."""


class Answer(NamedTuple):
    """What HiGHS found among some picks.

    Args:
        chosen: one pick per layer.
        price: their total.
        least: that no solution is below.
        late: whether the time ran out before that was within the gap.
    """

    chosen: Indices
    price: float
    least: float
    late: bool


def solve_highs(
    prices: Numbers, owner: Indices, rows: Sequence[Row], gap: float, seconds: float
) -> Indices | None:
    """The chosen picks, proven to be within `gap` of the best; None when nothing fits.

    HiGHS is given the picks of least excess over the Lagrangian bound. A solution with any other
    pick costs the bound and the excess of that pick at least, so an answer below this is an
    answer to the whole problem; otherwise all picks that could beat it are added. Of 1,000 layers
    with 40 levels, some 200 picks decide. With several limits this is as exact as with one, while
    dropping levels above the lower hull of price and cost would not be.

    Args:
        prices: (picks,), finite and not negative.
        owner: (picks,), the layer of each pick, rising from 0.
        rows: limits: costs (picks,), not negative, and what one pick per layer may sum to.
        gap: relative to the total price.
        seconds: after which the best found so far is the answer, and a warning says how good.

    Raises:
        SolverError: HiGHS is missing, or stopped without an answer.

    References:
        Pisinger, "A Minimal Algorithm for the Multiple-Choice Knapsack Problem", 1995: the core.
    """
    end = time.perf_counter() + seconds
    try:
        least, excess, _ = lower_bound(prices, owner, rows)
    except ImportError as error:
        raise SolverError(f"HiGHS must come with scipy. Got {error}.") from error
    layers, extra = int(owner[-1]) + 1, CORE * (1 + len(rows))
    reach = _nth(excess, layers + extra)
    while True:
        core = np.flatnonzero(excess <= reach)
        inside = [(costs[core], room) for costs, room in rows]
        left = max(0.0, end - time.perf_counter())
        answer = _milp(prices[core], owner[core], inside, gap, left)
        whole = len(core) == len(prices)
        if answer is not None:
            outside = np.inf if whole else least + reach
            distance = answer.price - max(least, min(answer.least, outside))
            proven = distance <= gap * answer.price + TOLERANCE
            if not proven and answer.late:
                _warn(seconds, distance / answer.price)
            if proven or answer.late or whole:
                return core[answer.chosen]
            reach = answer.price - least
        elif whole:
            return None
        else:
            extra *= WIDER
            reach = _nth(excess, layers + extra)


def _nth(values: Numbers, count: int) -> float:
    """The value that `count` others are not above; infinite where there are fewer."""
    return float(np.partition(values, count)[count]) if count < len(values) else math.inf


def _warn(seconds: float, distance: float) -> None:
    warnings.warn(
        f"HiGHS must prove its answer within {seconds:g} seconds. Got one that is at most "
        f"{distance:.2%} above the best. Give it more seconds or a wider gap.",
        stacklevel=4,
    )


def _milp(
    prices: Numbers, owner: Indices, rows: Sequence[Row], gap: float, seconds: float
) -> Answer | None:
    """What HiGHS finds among these picks; None when nothing fits.

    Raises:
        SolverError: it stopped without an answer.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    ones = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    limits = [LinearConstraint(costs, -np.inf, room) for costs, room in rows]
    with _silence():
        result = milp(
            prices,
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(ones, 1, 1), *limits],
            options={"mip_rel_gap": gap, "time_limit": seconds},
        )
    if result.x is None:
        if result.status == INFEASIBLE:  # anything else is no answer
            return None
        raise SolverError(f"HiGHS must solve or refuse the knapsack. Got: {result.message}")
    chosen = np.flatnonzero(result.x > 0.5)
    least = -math.inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
    return Answer(chosen, float(prices[chosen].sum()), least, result.status == STOPPED)


@contextmanager
def _silence() -> Iterator[None]:
    """Standard output to nowhere: HiGHS prints there from C++ even when told not to, and what a
    command prints there is for `--json`.
    """
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # C keeps lines for a pipe back until long after this
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
