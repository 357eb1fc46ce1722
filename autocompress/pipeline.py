"""The straight line: session -> database -> strategy -> validation race -> packed model, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autocompress.config import StudyConfig
from autocompress.core import Allocation, Problem, Trial
from autocompress.cost import check_budgets, parse_budget
from autocompress.database import LevelDatabase
from autocompress.errors import BudgetError
from autocompress.estimates import linearize, sensitivities
from autocompress.evaluator import Evaluator
from autocompress.exporters.native import save_native
from autocompress.finalists import (
    Finalists,
    find_finalists,
    race_finalists,
    score_finalists,
)
from autocompress.latency_search import (
    TRIES,
    Limit,
    add_latencies,
    calibrate,
    holds,
    limited,
    not_held,
    open_limit,
    predicted_costs,
    runtime_facts,
    tighten,
    tightened,
    time_finalists,
)
from autocompress.manifest import dense_bytes, manifest_facts
from autocompress.mirror import JOURNAL, Mirror
from autocompress.output import check_output, claim_output, write_manifest
from autocompress.progress import Progress, Silent
from autocompress.quality_search import find_smallest, rank, split_goal
from autocompress.report import write_report
from autocompress.result import Result, dense_facts, goal_facts
from autocompress.session import Session, complete_database, open_session, undominated
from autocompress.smallest import Goal
from autocompress.strategies import configured
from autocompress.study import Study
from autocompress.targets import find_target


def build_database(config: StudyConfig, progress: Progress | None = None) -> LevelDatabase:
    """The level database of a configuration; resumes, and does nothing twice.

    Raises:
        AutocompressError: any input is wrong.
    """
    session = open_session(config, progress or Silent())
    complete_database(session)
    return session.database


def search(
    budget: str | Sequence[str], *, progress: Progress | None = None, **settings: Any
) -> Result:
    """Find the best allocation within the budgets and write it as a packed model.

    Args:
        budget: one limit or several, such as '3.5bits' or '90MB'.
        progress: told what happens; None is silent.
        settings: fields of `StudyConfig`, such as model, space, calibration, seed and out.

    Raises:
        AutocompressError: any input is wrong; the folder `out` is then untouched.
    """
    budgets = (budget,) if isinstance(budget, str) else tuple(budget)
    for name, value in settings.items():
        if isinstance(value, str | Path):  # either will do, whatever the field's type
            settings[name] = Path(value) if name in ("out", "run") else str(value)
    return run_search(StudyConfig(budgets=budgets, **settings), progress)


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
    session = open_session(config, progress or Silent())
    limit = open_limit(session)
    dense_ms = None if limit is None else limit.latency.dense_ms
    wanted = [parse_budget(text, session.space, dense_ms) for text in config.budgets]
    goal, wanted = split_goal(wanted, config.minimize)
    space = limited(limit, session.space)
    costs = session.costs if limit is None else (*session.costs, limit.table())
    budgets = check_budgets(space, costs, wanted)
    evaluator = Evaluator(
        session.loaded.model,
        session.space,
        session.database,
        session.windows,
        config.run_folder,
        session.progress,
    )
    recorded = predicted_costs(session, limit)
    with Study(config.run_folder, session.space, recorded, session.facts(), evaluator) as study:
        complete_database(session)
        problem = Problem(
            space=undominated(session, space, costs),
            costs=costs,
            budgets=budgets,
            evaluate=study.evaluate,
            sensitivities=lambda tokens: sensitivities(session, evaluator, study, tokens),
            linearize=lambda *at: linearize(session, evaluator, study, *at),
            window=config.window,
            tokens=int(session.windows.search.size),
        )
        return _conclude(session, problem, study, evaluator, limit, goal)


def _conclude(
    session: Session,
    problem: Problem,
    study: Study,
    evaluator: Evaluator,
    limit: Limit | None,
    goal: Goal | None,
) -> Result:
    """Search, race the finalists on validation windows, score on test windows, write."""
    config = session.config
    storage = config.storage or config.run_folder / JOURNAL
    mirror = Mirror.open(storage, "autocompress", session.space, problem.costs)
    with session.clock("teacher"):
        evaluator.teacher("search")
    best, finalists, raced = _winner(session, problem, study, mirror, evaluator, limit, goal)
    with session.clock("teacher"):
        evaluator.teacher("test")
    with session.clock("verify"):
        results = score_finalists(session, problem, study, mirror, finalists, best, raced)
        results = {"dense": _dense(session, problem, evaluator), **results}
    problem = replace(problem, costs=predicted_costs(session, limit))  # without the margin
    if limit is not None:
        roles = {"uniform": "uniform", "ilp": "ilp", "winner": best}
        add_latencies(results, limit, roles)
    timed = {} if limit is None else {"latency": limit.facts(), **runtime_facts(limit, best)}
    kept = {} if goal is None else {"goal": goal_facts(goal.budget, goal.objective, raced[best])}
    others = {**timed, **kept}
    return _write(session, problem, study, evaluator, finalists[best][0], results, others)


def _winner(
    session: Session,
    problem: Problem,
    study: Study,
    mirror: Mirror,
    evaluator: Evaluator,
    limit: Limit | None,
    goal: Goal | None,
) -> tuple[str, Finalists, dict[str, Trial]]:
    """Role of the winner, finalists and their trials; searches again while it is too slow.

    Raises:
        BudgetError: no search met the limit on latency when it was measured, or nothing in the
            space keeps the loss.
    """
    while True:
        with session.clock("teacher"):
            evaluator.teacher("validate")
        with session.clock("search"):
            finalists = (
                find_finalists(session, problem, study, mirror)
                if goal is None
                else find_smallest(session, problem, study, mirror, goal)
            )
        with session.clock("verify"):
            raced = race_finalists(session, study, mirror, finalists)
        ranked = rank(raced, problem, goal)
        if limit is None:
            return ranked[0], finalists, raced
        with session.clock("latency"):
            allocations = {role: allocation for role, (allocation, _) in finalists.items()}
            time_finalists(session, evaluator, limit, allocations)
        last = limit.tries == TRIES
        held = [role for role in ranked if holds(limit, role, problem.budgets)]
        if held and (last or held[0] == ranked[0]):
            calibrate(limit)
            return held[0], finalists, raced
        if last:
            raise not_held(limit, ranked[0], problem.budgets)
        tighten(limit, ranked[0])
        session.progress.say("the winner is slower than predicted: searching below the limit")
        problem = tightened(problem, limit)


def _dense(session: Session, problem: Problem, evaluator: Evaluator) -> dict[str, Any]:
    splits = {}
    for split in ("search", "validate", "test"):
        reference = evaluator.teacher(split)
        splits[split] = (reference.perplexity, reference.windows.numel())
    return dense_facts(problem, dense_bytes(session), splits)


def _write(
    session: Session,
    problem: Problem,
    study: Study,
    evaluator: Evaluator,
    winner: Allocation,
    results: dict[str, Any],
    others: dict[str, Any],
) -> Result:
    config, loaded = session.config, session.loaded
    model = evaluator.stitched.restore()
    claim_output(config.out)  # not before: until here a former result stays whole
    weights = save_native(
        model,
        loaded.tokenizer,
        session.space,
        winner,
        session.database,
        config.out,
        config.activations,
    )
    facts = {**manifest_facts(session, problem, study, winner, results, weights), **others}
    write_report(facts, config.out)
    write_manifest(config.out, facts)
    return Result(config.out, facts, winner)
