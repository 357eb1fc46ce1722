"""Latency inside a search: when it is measured, what the search sees of it, and whether it held."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from autocompress.core import Allocation, Budget, CostTable, Problem, SearchSpace, Trial
from autocompress.cost import LATENCY, limited_cost, parse_budget
from autocompress.errors import BudgetError
from autocompress.evaluator import Evaluator
from autocompress.knapsack import cheapest
from autocompress.latency import restrict, scaled
from autocompress.session import Session

if TYPE_CHECKING:
    from autocompress.latency_setup import Latency
    from autocompress.latency_timing import Measured

TRIES = 4  # searches, each with a tighter limit than the one before
BEYOND = 1.002  # what a limit is tightened by beyond the measured excess
SPARE = 0.03  # share of a limit that a winner may leave unused before another search
ROUNDING = 1e-9
STEP = 1.005  # least change of a limit from try to try


@dataclass
class Limit:
    """A search's limit on latency, which tightens when measurements break it.

    Args:
        latency: prices and predictions at the target.
        safety: the search sees predictions times this.
        most: of safety; beyond it nothing fits.
        finalists: role -> what was predicted and measured, of the last try.
        tries: searches so far.
    """

    latency: Latency
    safety: float
    most: float = math.inf
    finalists: dict[str, dict[str, Any]] = field(default_factory=dict)
    tries: int = 0

    def table(self) -> CostTable:
        """What the search sees: predictions with a margin, so that predicted errors fit in."""
        return scaled(self.latency.table, self.safety)

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            **self.latency.facts(),
            "safety": self.safety,
            "tries": self.tries,
            "finalists": self.finalists,
        }


@dataclass(frozen=True)
class Held:
    """A try's best finalist that keeps every limit.

    Args:
        role: of it.
        finalists: role -> allocation, origin.
        raced: role -> trial on validation windows.
        timed: role -> what was predicted and measured in that try.
    """

    role: str
    finalists: dict[str, tuple[Allocation, str]]
    raced: dict[str, Trial]
    timed: dict[str, dict[str, Any]]


def better(one: Held | None, other: Held) -> Held:
    """The one of less loss on validation windows; the former of equals."""
    if one is None or other.raced[other.role].loss < one.raced[one.role].loss:
        return other
    return one


def open_limit(session: Session) -> Limit | None:
    """The prices that a session's budgets need; None when time is neither limited nor minimized.

    Raises:
        BudgetError: a budget cannot be read.
        LatencyError: no such target, or a store that does not fit.
    """
    timed = [limited_cost(text) == LATENCY for text in session.config.limits]
    if not any(timed) and session.config.minimize != LATENCY:
        return None
    from autocompress.latency_setup import price

    session.progress.say(f"pricing levels at {session.config.target}")
    with session.clock("profile"):
        target = session.config.parsed_target()
        latency = price(session.loaded, session.space, target, session.progress, fresh=True)
    for entry in latency.dropped:
        session.progress.say(
            f"left out: {entry.level} of {len(entry.layers)} layers, {entry.reason}"
        )
    most = largest_safety(session, latency)
    return Limit(latency, min(1 + latency.margin, most), most)


def largest_safety(session: Session, latency: Latency) -> float:
    """How much slower than predicted the fastest allocation may be and keep every budget.

    At least 1: a budget below every prediction is no case for a margin. The limits of a front's
    range do not count, since all of its points share one margin.
    """
    space, table = restrict(session.searched, latency.dropped), latency.table
    texts = session.config.budgets
    budgets = [parse_budget(text, session.space, latency.dense_ms) for text in texts]
    tightest = _tightest(budgets)
    fastest = table.total(cheapest(space, table))
    return max(1.0, tightest / fastest * (1 - ROUNDING)) if fastest > 0 else math.inf


def limited(limit: Limit | None, space: SearchSpace) -> SearchSpace:
    """The space that is searched: without what is dominated, where time is limited."""
    return space if limit is None else restrict(space, limit.latency.dropped)


def predicted_costs(session: Session, limit: Limit | None) -> tuple[CostTable, ...]:
    """Sizes and, where time is limited, the latency as predicted: without a margin."""
    return session.costs if limit is None else (*session.costs, limit.latency.table)


def tightened(problem: Problem, limit: Limit) -> Problem:
    """The problem with the limit's present table."""
    costs = tuple(limit.table() if table.name == LATENCY else table for table in problem.costs)
    return replace(problem, costs=costs)


def time_finalists(
    session: Session,
    evaluator: Evaluator,
    limit: Limit,
    finalists: Mapping[str, Allocation],
) -> None:
    """Measure finalists end to end where the target is this machine; fills `limit.finalists`."""
    limit.tries += 1
    table = limit.latency.table
    distinct = list(dict.fromkeys(finalists.values()))
    measured: dict[Allocation, Measured] = {}
    if limit.latency.target.is_local:
        found = limit.latency.measure(
            evaluator.stitched.restore(),
            session.space,
            distinct,
            session.database.load,
            session.progress,
        )
        measured = dict(zip(distinct, found, strict=True))
    limit.finalists = {
        role: _row(table.total(allocation), measured.get(allocation))
        for role, allocation in finalists.items()
    }


def _row(predicted: float, measured: Measured | None) -> dict[str, Any]:
    if measured is None:
        return {"predicted_ms": predicted, "measured_ms": None}
    return {
        "predicted_ms": predicted,
        "measured_ms": measured.ms,
        "low_ms": measured.low,
        "high_ms": measured.high,
        "error": predicted / measured.ms - 1,
        "decoder": measured.decoder,
        "backends": dict(measured.backends),
    }


def runtime_facts(limit: Limit, role: str) -> dict[str, Any]:
    """What the winner's latency was measured on, for whoever runs it elsewhere."""
    backends = limit.finalists[role].get("backends")
    return {} if backends is None else {"runtime": {"backends": backends}}


def holds(limit: Limit, role: str, budgets: Sequence[Budget]) -> bool:
    """Whether a finalist's measured interval is within every limit on time.

    Where nothing can be measured, the prediction stands.
    """
    row = limit.finalists[role]
    reached = row.get("high_ms", row["predicted_ms"])
    return all(reached <= budget.limit for budget in budgets if budget.cost == LATENCY)


def is_last(limit: Limit) -> bool:
    """Whether another search could not change anything."""
    return limit.tries == TRIES or limit.safety >= limit.most


def tighten(limit: Limit, role: str) -> None:
    """Lower what the search may use by what the finalist exceeded its prediction.

    But not below the fastest allocation, whose measurement decides whether anything holds.
    """
    row = limit.finalists[role]
    least = limit.safety * STEP
    if row["predicted_ms"] > 0:
        least = max(least, row["high_ms"] / row["predicted_ms"] * BEYOND)
    limit.safety = min(least, limit.most)


def has_spare(limit: Limit, role: str, budgets: Sequence[Budget]) -> bool:
    """Whether the search used all the time it saw, and a finalist takes less than was allowed."""
    row = limit.finalists[role]
    if "high_ms" not in row:
        return False
    reached, allowed = float(row["high_ms"]), (1 - SPARE) * _tightest(budgets)
    return reached < allowed < float(row["predicted_ms"]) * limit.safety


def _tightest(budgets: Sequence[Budget]) -> float:  # ms per token
    return min((it.limit for it in budgets if it.cost == LATENCY), default=math.inf)


def loosen(limit: Limit, role: str) -> None:
    """Raise what the search may use by what the finalist stayed below its prediction."""
    row = limit.finalists[role]
    limit.safety = (1 + limit.latency.margin) * row["high_ms"] / row["predicted_ms"]


def not_held(limit: Limit, role: str, budgets: Sequence[Budget]) -> BudgetError:
    """The error of a limit that no search met when measured."""
    row = limit.finalists[role]
    text = next(budget.text for budget in budgets if budget.cost == LATENCY)
    return BudgetError(
        f"the measured latency must be within {text}. Got {row['measured_ms']:.2f} ms "
        f"({row['low_ms']:.2f} to {row['high_ms']:.2f}) after {limit.tries} searches, predicted "
        f"{row['predicted_ms']:.2f}. Raise the budget, or search when the machine is quiet."
    )


def calibrate(limit: Limit) -> None:
    """Keep what the finalists' measurements say about predictions, for later searches."""
    pairs = {
        (row["predicted_ms"], row["measured_ms"])
        for row in limit.finalists.values()
        if row["measured_ms"] is not None
    }
    if pairs:
        limit.latency.calibrate(sorted(pairs))


def add_latencies(results: Mapping[str, Any], limit: Limit, roles: Mapping[str, str]) -> None:
    """Enter each result's predicted and measured latency, and the dense model's.

    Args:
        results: rows by name; changed.
        roles: name of a row -> role of the finalist it is about.
    """
    for name, role in roles.items():
        results[name]["latency"] = limit.finalists[role]
    results["dense"]["latency"] = {"predicted_ms": None, "measured_ms": limit.latency.dense_ms}
