"""Finalists: what a search proposes, raced on validation windows, and scored on test windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from autocompress.core import Allocation, Fidelity, Problem, Trial
from autocompress.mirror import Mirror
from autocompress.result import candidate_facts
from autocompress.session import Session
from autocompress.strategies import configured
from autocompress.strategies.ilp import solve
from autocompress.strategies.uniform import nearest_uniform, uniform_origin
from autocompress.study import Study

NAMES = {"uniform": "uniform", "ilp": "the ILP's answer"}
Finalists = dict[str, tuple[Allocation, str]]  # role -> allocation, origin; simplest first
SEARCH_TOKENS = 8192  # of the search split, on which the report compares winner and baselines


def run_strategy(
    session: Session, problem: Problem, study: Study, mirror: Mirror
) -> dict[str, Trial]:
    """Origin -> what each phase of the configured strategy ended with."""
    phases: dict[str, Trial] = {}
    strategy = configured(session.config, session.spending)
    for found in strategy(problem, np.random.default_rng(session.config.seed)):
        phases[found.origin] = found
        session.progress.say(
            f"{found.origin}: KL {found.loss:.4f} on {found.fidelity.tokens:,} tokens, "
            f"{study.tokens:,} spent"
        )
        for trial in study.at(found.fidelity):  # all of the last stage; known ones are skipped
            mirror.report(trial, "candidate")
    return phases


def find_finalists(session: Session, problem: Problem, study: Study, mirror: Mirror) -> Finalists:
    """Run the strategy: uniform, the ILP's answer, and what each of its phases ended with."""
    phases = run_strategy(session, problem, study, mirror)
    predicted = problem.sensitivities(session.spending.sensitivities).mean
    additive = solve(problem.space, problem.costs, problem.budgets, predicted)
    uniform = nearest_uniform(problem)
    roles = {"uniform": (uniform, uniform_origin(problem, uniform)), "ilp": (additive, "ilp")}
    for origin, found in phases.items():
        if found.allocation not in (uniform, additive):
            roles[origin] = found.allocation, origin
    return roles


def race_finalists(
    session: Session, study: Study, mirror: Mirror, finalists: Finalists
) -> dict[str, Trial]:
    """Role -> trial on validation windows, best first; ties go to the simplest."""
    fidelity = Fidelity(int(session.windows.validate.size), 0, "validate")
    found = {role: _score(session, study, mirror, finalists, role, fidelity) for role in finalists}
    return dict(sorted(found.items(), key=lambda item: item[1].loss))


def _score(
    session: Session,
    study: Study,
    mirror: Mirror,
    finalists: Finalists,
    role: str,
    fidelity: Fidelity,
) -> Trial:
    allocation, origin = finalists[role]
    name = NAMES.get(role, f"the answer of '{role}'")
    session.progress.say(f"scoring {name} on {fidelity.split} windows")
    (trial,) = study.evaluate([allocation], fidelity, origin)
    mirror.report(trial, "baseline" if role in NAMES else "finalist")
    return trial


def score_finalists(
    session: Session,
    problem: Problem,
    study: Study,
    mirror: Mirror,
    finalists: Finalists,
    best: str,
    raced: Mapping[str, Trial],
) -> dict[str, Any]:
    """Scores of uniform, ILP and winner; only here is any test window looked at."""
    search = problem.fidelity(SEARCH_TOKENS)
    test = Fidelity(int(session.windows.test.size), 0, "test")
    results = {}
    for role in dict.fromkeys(("uniform", "ilp", best)):
        before, after = (
            _score(session, study, mirror, finalists, role, fidelity) for fidelity in (search, test)
        )
        trials = {"search": before, "validate": raced[role], "test": after}
        results[role] = candidate_facts(problem, trials)
    return {"uniform": results["uniform"], "ilp": results["ilp"], "winner": results[best]}
