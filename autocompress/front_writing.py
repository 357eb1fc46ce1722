"""A front is written: a packed model for every point, then the facts and the report of all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from autocompress.core import Allocation, Budget, Fidelity, Trial
from autocompress.files import write_json
from autocompress.finalists import SEARCH_TOKENS, score_one
from autocompress.front_search import Point
from autocompress.latency_search import predicted_costs, time_finalists
from autocompress.manifest import study_facts
from autocompress.opening import Opened
from autocompress.output import claim_output
from autocompress.pareto import hypervolume, knee
from autocompress.report import write_front_report
from autocompress.result import FRONT, FrontResult, candidate_facts
from autocompress.strategies.racing import SIMPLE
from autocompress.writing import dense_row, verify, write_result

Facts = dict[str, Any]


def write_front(opened: Opened, points: Sequence[Point]) -> FrontResult:
    """Write a packed model for every different winner, the front's report, and last its facts.

    Raises:
        OutputError: the disk refused, or a packed model does not lose what was scored.
    """
    out = opened.config.out
    claim_output(out)
    with opened.session.clock("teacher"):
        opened.evaluator.teacher("test")
    _time(opened, points)
    dense, rows = dense_row(opened), list[Facts]()
    written: dict[Allocation, Facts] = {}
    for point in points:
        allocation = point.trial.allocation
        if allocation not in written:
            written[allocation] = _write_point(opened, point, dense)
        rivals = {role: _validated(opened, trial) for role, trial in point.rivals.items()}
        limit = {"limit": point.limit.text, "role": point.role, "rivals": rivals}
        rows.append({**limit, **written[allocation]})
    opened.mirror.flush()
    facts = {**study_facts(opened), "dense": dense, **front_facts(opened, points, rows)}
    write_front_report(facts, out)
    write_json(out / FRONT, facts)
    return FrontResult(out, facts)


def front_facts(opened: Opened, points: Sequence[Point], rows: list[Facts]) -> Facts:
    """What is said of the points together; losses are those on validation windows."""
    cost = points[0].limit.cost
    table = next(it for it in predicted_costs(opened.session, opened.limit) if it.name == cost)
    scale = opened.session.space.weights if cost == "bits" else 1

    def place(trial: Trial) -> tuple[float, float]:
        return table.total(trial.allocation) / scale, trial.loss

    front = np.array([place(point.trial) for point in points])
    every = np.array([place(trial) for point in points for trial in point.rivals.values()])
    worst = np.where(np.isfinite(every), every, 0.0).max(axis=0)
    return {
        "pareto": opened.config.pareto,
        "cost": cost,
        "strategy": opened.config.strategy,
        "points": rows,
        "knee": knee(front),
        "hypervolume": {"value": hypervolume(front, worst), "reference": worst.tolist()},
    }


def _write_point(opened: Opened, point: Point, dense: Facts) -> Facts:
    """Write, reload and check one point's model."""
    session, trial = opened.session, point.trial
    costs = predicted_costs(session, opened.limit)
    problem = replace(opened.problem, costs=costs, budgets=(point.limit, *opened.problem.budgets))
    within, winner = opened.within(problem), {"search": (trial.allocation, trial.origin)}
    test = Fidelity(int(session.windows.test.size), 0, "test")
    with session.clock("verify"):
        search, final = (
            score_one(within, winner, "search", fidelity)
            for fidelity in (problem.fidelity(SEARCH_TOKENS), test)
        )
    mine = candidate_facts(problem, {"search": search, "validate": trial, "test": final})
    rivals = {
        role: _validated(within, trial) for role, trial in point.rivals.items() if role in SIMPLE
    }
    timed = {} if opened.limit is None else {"latency": opened.limit.finalists[_name(point)]}
    out = opened.config.out / folder_name(point.limit)
    result = write_result(
        within, out, trial.allocation, {"dense": dense, **rivals, "winner": {**mine, **timed}}, {}
    )
    with session.clock("verify"):
        checked = verify(opened, out, trial)
    return {
        **mine,
        **timed,
        "path": out.name,
        "file_bytes": result.file_bytes,
        "reloaded_kl": checked,
        "allocation": result.facts["allocation"],
    }


def _validated(opened: Opened, trial: Trial) -> Facts:
    return candidate_facts(opened.problem, {"validate": trial})


def _name(point: Point) -> str:
    return point.trial.allocation.key


def _time(opened: Opened, points: Sequence[Point]) -> None:
    """Measure the winners where time is limited."""
    if opened.limit is not None:
        with opened.session.clock("latency"):
            allocations = {_name(point): point.trial.allocation for point in points}
            time_finalists(opened.session, opened.evaluator, opened.limit, allocations)


def folder_name(limit: Budget) -> str:
    """'3.2bits'; what no file system minds."""
    return re.sub(r"[^\w.]+", "-", limit.text)
