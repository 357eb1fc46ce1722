"""The straight line: session -> database -> strategy -> validation race -> packed model, report.

`search` goes along it for one set of budgets, `search_front` for every limit in a range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from autocompress.config import StudyConfig, plain_settings
from autocompress.core import Budget
from autocompress.database import LevelDatabase
from autocompress.errors import BudgetError
from autocompress.finalists import find_finalists, race_finalists, score_finalists
from autocompress.front_search import find_points, front_limits
from autocompress.front_writing import write_front
from autocompress.latency_search import (
    Held,
    add_latencies,
    better,
    calibrate,
    has_spare,
    holds,
    is_last,
    loosen,
    not_held,
    predicted_costs,
    runtime_facts,
    tighten,
    tightened,
    time_finalists,
)
from autocompress.opening import Opened, open_search
from autocompress.output import check_output
from autocompress.progress import Progress, Silent
from autocompress.quality_search import find_smallest, rank
from autocompress.result import FrontResult, Result, goal_facts
from autocompress.run_record import recalled
from autocompress.session import complete_database, open_session
from autocompress.strategies import configured
from autocompress.strategies.fronts import find_front
from autocompress.targets import find_target
from autocompress.workers import open_pool
from autocompress.writing import dense_row, write_result


def build_database(
    config: StudyConfig | None = None, *, progress: Progress | None = None, **settings: Any
) -> LevelDatabase:
    """The level database of a configuration; resumes, and does nothing twice.

    Args:
        config: everything at once; None takes `settings`.
        progress: told what happens; None is silent.
        settings: fields of `StudyConfig`, such as model, space, calibration and run.

    Raises:
        AutocompressError: any input is wrong.
    """
    config = config or StudyConfig(**plain_settings(settings))
    progress = progress or Silent()
    with open_pool(config.parsed_workers(), progress.say) as pool:
        session = open_session(config, progress)
        complete_database(session, pool)
    return session.database


def search(
    budget: str | Budget | Sequence[str | Budget],
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Find the best allocation within the budgets and write it as a packed model.

    Args:
        budget: one limit or several, such as '3.5bits', '90MB' or '0.05KL'; of a `Budget`, its
            text counts.
        progress: told what happens; None is silent.
        settings: fields of `StudyConfig`, such as model, space, calibration, seed and out; with a
            `run` that an earlier search made, its settings are the defaults. A `Target` as target
            sets all that it says.

    Raises:
        AutocompressError: any input is wrong; the folder `out` is then untouched.
    """
    limits = [budget] if isinstance(budget, str | Budget) else budget
    texts = tuple(it.text if isinstance(it, Budget) else it for it in limits)
    given = {"budgets": texts, **plain_settings(settings)}
    return run_search(StudyConfig(**recalled(given)), progress)


def search_front(
    pareto: str, points: int = 6, *, progress: Progress | None = None, **settings: Any
) -> FrontResult:
    """Find a whole front in one run: the best allocation at every limit in a range.

    Args:
        pareto: a cost and its range, 'bits=2.5..6'.
        points: limits, both ends included.
        progress: told what happens; None is silent.
        settings: fields of `StudyConfig`, likewise; `budgets` limit other costs at every point.

    Raises:
        AutocompressError: any input is wrong; the folder `out` is then untouched.
    """
    given = {"pareto": pareto, "points": points, **plain_settings(settings)}
    return run_front(StudyConfig(**recalled(given)), progress)


def run_search(config: StudyConfig, progress: Progress | None = None) -> Result:
    """Find the best allocation within the budgets and write it as a packed model.

    Raises:
        AutocompressError: any input is wrong; `config.out` is then untouched.
    """
    if not config.budgets:
        raise BudgetError("a search must have a budget. Got none. Add --budget 3.5bits.")
    check_output(config.out)
    configured(config, config.spending(config.tokens.search))  # must not wait for the database
    find_target(config.target)
    with open_search(config, progress or Silent()) as opened:
        return _conclude(opened)


def run_front(config: StudyConfig, progress: Progress | None = None) -> FrontResult:
    """Find the best allocation at every limit of `config.pareto` and write each as a packed model.

    Raises:
        AutocompressError: any input is wrong; `config.out` is then untouched.
    """
    check_output(config.out)
    find_front(config.strategy, config.spending(config.tokens.search))
    with open_search(config, progress or Silent()) as opened:
        return write_front(opened, find_points(opened, front_limits(opened)))


def _conclude(opened: Opened) -> Result:
    """Search, race the finalists on validation windows, score on test windows, write."""
    session, evaluator, limit = opened.session, opened.evaluator, opened.limit
    found = _winner(opened)
    best, finalists, raced = found.role, found.finalists, found.raced
    with session.clock("teacher"):
        evaluator.teacher("test")
    with session.clock("verify"):
        results = score_finalists(opened, finalists, best, raced)
        results = {"dense": dense_row(opened), **results}
    # Reported without the margin that the search saw.
    problem = replace(opened.problem, costs=predicted_costs(session, limit))
    if limit is not None:
        roles = {"uniform": "uniform", "ilp": "ilp", "winner": best}
        add_latencies(results, limit, roles)
    others = {} if limit is None else {"latency": limit.facts(), **runtime_facts(limit, best)}
    if opened.goal is not None:
        kept = goal_facts(opened.goal.budget, opened.goal.objective, raced[best])
        others = {**others, "goal": kept}
    opened.mirror.flush()
    return write_result(
        opened.within(problem), opened.config.out, finalists[best][0], results, others
    )


def _winner(opened: Opened) -> Held:
    """The winner; searches again while it is too slow, or so fast that more would fit.

    Raises:
        BudgetError: no search met the limit on latency when it was measured, or nothing in the
            space keeps the loss.
    """
    limit, say = opened.limit, opened.session.progress.say
    best: Held | None = None
    while True:
        found, ranked = _try(opened)
        if limit is None:
            return found
        budgets = opened.problem.budgets
        held = [role for role in ranked if holds(limit, role, budgets)]
        last = is_last(limit) or opened.stop.requested
        if held:
            found = replace(found, role=held[0])
            best = better(best, found) if opened.goal is None else found
        elif best is None and last:
            raise not_held(limit, ranked[0], budgets)
        too_slow = not held or held[0] != ranked[0]
        spare = opened.goal is None and not too_slow and has_spare(limit, held[0], budgets)
        if best is not None and (last or not (too_slow or spare)):
            opened.stop.ended |= opened.stop.requested and too_slow
            limit.finalists = best.timed
            calibrate(limit)
            return best
        if spare:
            say("the winner is faster than predicted: searching for what else fits")
            loosen(limit, held[0])
        else:
            say("the winner is slower than predicted: searching below the limit")
            tighten(limit, ranked[0])
        opened = opened.within(tightened(opened.problem, limit))


def _try(opened: Opened) -> tuple[Held, list[str]]:
    """One search, its best finalist and the ranks of all; measured where time is limited."""
    session, limit, goal = opened.session, opened.limit, opened.goal
    with session.clock("teacher"):
        opened.evaluator.teacher("validate")
    with session.clock("search"):
        finalists = find_finalists(opened) if goal is None else find_smallest(opened, goal)
    with session.clock("verify"):
        raced = race_finalists(opened, finalists)
    ranked = rank(raced, opened.problem, goal)
    if limit is not None:
        with session.clock("latency"):
            allocations = {role: allocation for role, (allocation, _) in finalists.items()}
            time_finalists(session, opened.evaluator, limit, allocations)
    timed = {} if limit is None else limit.finalists
    return Held(ranked[0], finalists, raced, timed), ranked
