"""The multiple-choice knapsack: one level per layer, least total price, within every limit."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from autocompress.core import Allocation, CostTable, SearchSpace
from autocompress.levels import Level

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Prices = Sequence[Mapping[Level, float]]  # per layer, level -> what the choice keeps small
Limit = tuple[CostTable, float]  # total cost on the table, inclusive
Pick = tuple[int, Level]  # one variable: this layer at this level

RANGE = 1e3  # of the scaled prices; HiGHS stops at an absolute gap of 1e-6


def cheapest(space: SearchSpace, table: CostTable) -> Allocation:
    """The allocation of least cost, whatever its loss."""
    return Allocation(
        tuple(
            min(allowed, key=entry.__getitem__)
            for allowed, entry in zip(space.levels, table.entries, strict=True)
        )
    )


def solve_knapsack(
    space: SearchSpace, limits: Sequence[Limit], prices: Prices
) -> Allocation | None:
    """The allocation of least total price within every limit, or None when there is none.

    HiGHS works to a tolerance and limits do not: an answer that is over by one bit is forbidden
    and the problem solved again. Deterministic.

    Args:
        prices: per layer, level -> price. Infinite and NaN prices count as ten times the
            largest finite one.

    Raises:
        RuntimeError: HiGHS stopped without an answer.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    picks = [(layer, level) for layer, allowed in enumerate(space.levels) for level in allowed]
    owner = np.array([layer for layer, _ in picks])
    ones = csr_array((np.ones(len(picks)), (owner, np.arange(len(picks)))))
    rows = [LinearConstraint(ones, 1, 1)]
    rows += [
        LinearConstraint(row, -np.inf, room)
        for row, room in (_row(space, limit, picks) for limit in limits)
    ]
    objective = _objective(prices, picks)
    binary = {"integrality": np.ones(len(picks)), "bounds": Bounds(0, 1)}
    while True:
        with _silence():
            result = milp(objective, **binary, constraints=rows, options={"mip_rel_gap": 1e-9})
        if result.x is None:
            if result.status == 2:  # infeasible; anything else is no answer
                return None
            raise RuntimeError(f"HiGHS must solve or refuse the knapsack. Got: {result.message}")
        chosen = result.x > 0.5
        found = Allocation(tuple(picks[index][1] for index in np.flatnonzero(chosen)))
        if all(table.total(found) <= limit for table, limit in limits):
            return found
        # Cut off exactly this allocation: a lower limit might cut off the best one too.
        rows.append(LinearConstraint(chosen.astype(float), -np.inf, len(space.layers) - 1))


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


def _row(
    space: SearchSpace, limit: Limit, picks: Sequence[Pick]
) -> tuple[npt.NDArray[np.float64], float]:
    """Coefficients and right-hand side of a limit: every pick's cost above its layer's cheapest.

    Integer costs are divided by their greatest common divisor. Layers of a model share large
    factors, so the row becomes small integers, which the solver's tolerance cannot blur.
    """
    import numpy as np

    table, most = limit
    least = [
        min(entry[level] for level in allowed)  # tables may price levels that a space leaves out
        for entry, allowed in zip(table.entries, space.levels, strict=True)
    ]
    above = [table.entries[layer][level] - least[layer] for layer, level in picks]
    room = most - table.base - sum(least)
    if all(isinstance(cost, int) for cost in above):
        step = math.gcd(*map(int, above)) or 1
        return np.array([int(cost) // step for cost in above], dtype=np.float64), room // step
    scale = max(above) or 1.0
    return np.array(above, dtype=np.float64) / scale, room / scale


def _objective(
    prices: Prices, picks: Sequence[Pick]
) -> npt.NDArray[np.float64]:  # (picks,), 0 to RANGE
    """Prices above each layer's least, scaled against the solver's absolute tolerances."""
    import numpy as np

    raw = np.array([prices[layer][level] for layer, level in picks], dtype=np.float64)
    finite = np.isfinite(raw)
    worst = np.abs(raw[finite]).max(initial=0.0) or 1.0
    raw = np.where(finite, raw, 10 * worst)
    owner = np.array([layer for layer, _ in picks])
    least = np.full(len(prices), np.inf)
    np.minimum.at(least, owner, raw)
    above: npt.NDArray[np.float64] = raw - least[owner]
    return above * (RANGE / (above.max() or 1.0))
