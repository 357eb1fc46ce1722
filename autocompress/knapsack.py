"""The multiple-choice knapsack: one level per layer, least total price, within every limit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.core import Allocation, CostTable, SearchSpace
from autocompress.errors import BudgetError
from autocompress.levels import Level

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from autocompress.dual import Indices, Numbers, Row

Prices = Sequence[Mapping[Level, float]]  # per layer, level -> what the choice keeps small
Limit = tuple[CostTable, float]  # total cost on the table, inclusive
Pick = tuple[int, Level]  # one variable: this layer at this level

EXACT = 1e-9  # relative gap at which an answer counts as the best
RANGE = 1e3  # of the scaled prices; HiGHS stops at an absolute gap of 1e-6


@dataclass(frozen=True)
class Region:
    """Allocations that differ from `center` in at least `least` and at most `most` layers."""

    center: Allocation
    least: int = 0
    most: int | None = None


def cheapest(space: SearchSpace, table: CostTable) -> Allocation:
    """The allocation of least cost, whatever its loss, that keeps some layer."""
    rows = list(zip(space.levels, table.entries, strict=True))
    found = Allocation(tuple(min(allowed, key=entry.__getitem__) for allowed, entry in rows))
    if found.keeps_some:
        return found
    one = [found.swap(i, lv) for i, (allowed, _) in enumerate(rows) for lv in allowed]
    return min((it for it in one if it.keeps_some), key=table.total)


def solve_knapsack(
    space: SearchSpace,
    limits: Sequence[Limit],
    prices: Prices,
    regions: Sequence[Region] = (),
    gap: float = EXACT,
    seconds: float = math.inf,
) -> Allocation | None:
    """The allocation of least total price within every limit and region, or None if there is none.

    HiGHS works to a tolerance and limits do not: an answer that is over by one bit, or drops every
    layer, is forbidden and the problem solved again. Deterministic, but for `seconds`.

    Args:
        prices: per layer, level -> price. Infinite and NaN prices count as ten times the
            largest finite one.
        gap: relative distance from the optimum at which HiGHS may stop, both measured from the sum
            of every layer's least price.
        seconds: after which each run of HiGHS stops with the best it has, and a warning says how
            good that is. Where it has nothing, dynamic programming with a beam answers, and a
            warning says so.

    Raises:
        BudgetError: HiGHS had no answer and the beam found none, which proves nothing.
    """
    import numpy as np

    picks = [(layer, level) for layer, allowed in enumerate(space.levels) for level in allowed]
    owner = np.array([layer for layer, _ in picks])
    objective = _objective(prices, picks)
    rows = [_row(space, limit, picks) for limit in limits]
    rows += [row for region in regions for row in _region_rows(space, region, picks)]
    while True:
        chosen = _solve(objective, owner, rows, gap, seconds)
        if chosen is None:
            return None
        found = Allocation(tuple(picks[index][1] for index in chosen))
        if found.keeps_some and all(table.total(found) <= limit for table, limit in limits):
            return found
        # Cut off exactly this allocation: a lower limit might cut off the best one too.
        rows += _region_rows(space, Region(found, least=1), picks)


def _solve(
    objective: Numbers, owner: Indices, rows: Sequence[Row], gap: float, seconds: float
) -> Indices | None:
    """The chosen picks, by HiGHS or, where it gives no answer, by the beam, which says so."""
    from autocompress.beam import solve_beam
    from autocompress.highs import SolverError, solve_highs

    try:
        return solve_highs(objective, owner, rows, gap, seconds)
    except SolverError as error:
        found, every = solve_beam(objective, owner, rows)
        if found is None and not every:
            raise BudgetError(
                f"{error} A beam must find an allocation instead. Got none, which does not mean "
                "that there is none. Give the solver more seconds or loosen a budget."
            ) from error
        warnings.warn(f"{error} The answer is a beam's, which may be a little worse.", stacklevel=3)
        return found


def diverse_solutions(
    space: SearchSpace,
    limits: Sequence[Limit],
    prices: Prices,
    count: int,
    distance: int,
    gap: float = EXACT,
) -> list[Allocation]:
    """Good allocations that differ from each other in `distance` layers or more, best first.

    Each is the best of those far enough from the ones before; fewer where no more exist.
    """
    found: list[Allocation] = []
    while len(found) < count:
        apart = [Region(other, least=distance) for other in found]
        another = solve_knapsack(space, limits, prices, apart, gap)
        if another is None:
            break
        found.append(another)
    return found


def _region_rows(space: SearchSpace, region: Region, picks: Sequence[Pick]) -> Iterator[Row]:
    """Limits on the number of layers that keep the center's level, and that leave it."""
    import numpy as np

    center = region.center.levels
    kept = np.array([float(center[layer] == level) for layer, level in picks])
    yield kept, len(space.layers) - region.least
    if region.most is not None:
        yield 1 - kept, region.most


def _row(space: SearchSpace, limit: Limit, picks: Sequence[Pick]) -> Row:
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
