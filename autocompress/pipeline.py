"""The straight line: session -> database -> strategy -> validation race -> packed model, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.config import StudyConfig
from autocompress.core import Allocation, Fidelity, Problem, Sensitivities, Trial
from autocompress.cost import check_budgets, parse_budget
from autocompress.database import LevelDatabase
from autocompress.errors import BudgetError
from autocompress.evaluator import Evaluator
from autocompress.exporters.native import save_native
from autocompress.manifest import dense_bytes, manifest_facts
from autocompress.mirror import JOURNAL, Mirror
from autocompress.output import check_output, claim_output, write_manifest
from autocompress.progress import Progress, Silent
from autocompress.report import write_report
from autocompress.result import Result, candidate_facts, dense_facts
from autocompress.sensitivity import stored_sensitivities
from autocompress.session import Session, complete_database, open_session
from autocompress.strategies import configured
from autocompress.strategies.ilp import solve
from autocompress.strategies.uniform import nearest_uniform, uniform_origin
from autocompress.study import Study

NAMES = {"uniform": "uniform", "ilp": "the ILP's answer", "search": "the best candidate"}
SEARCH_TOKENS = 8192  # of the search split, on which the report compares winner and baselines


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
    configured(config)  # an unknown strategy must not wait for the database
    session = open_session(config, progress or Silent())
    wanted = [parse_budget(text, session.space) for text in config.budgets]
    budgets = check_budgets(session.space, session.costs, wanted)
    evaluator = Evaluator(
        session.loaded.model,
        session.space,
        session.database,
        session.windows,
        config.run_folder,
        session.progress,
    )
    with Study(
        config.run_folder, session.space, session.costs, session.facts(), evaluator
    ) as study:
        complete_database(session)
        problem = Problem(
            space=session.space,
            costs=session.costs,
            budgets=budgets,
            evaluate=study.evaluate,
            sensitivities=lambda tokens: _sensitivities(session, evaluator, study, tokens),
            window=config.window,
            tokens=int(session.windows.search.size),
        )
        return _conclude(session, problem, study, evaluator)


def _sensitivities(
    session: Session, evaluator: Evaluator, study: Study, tokens: int
) -> Sensitivities:
    seed = session.config.seed
    path = session.config.run_folder / f"sensitivities-{tokens}-{seed}.json"
    with session.clock("sensitivities"), session.progress.task("sensitivities") as advance:
        return stored_sensitivities(
            path,
            evaluator.stitched,
            session.windows.subset(Fidelity(tokens, seed)),
            seed,
            advance,
            lambda spent: study.spend(spent, "sensitivities"),
        )


def _conclude(session: Session, problem: Problem, study: Study, evaluator: Evaluator) -> Result:
    """Search, race the finalists on validation windows, score on test windows, write."""
    config = session.config
    mirror = Mirror.open(
        config.storage or config.run_folder / JOURNAL, "autocompress", session.space, session.costs
    )
    with session.clock("teacher"):
        evaluator.teacher("search")
    with session.clock("search"):
        finalists = _search(session, problem, study, mirror)
    with session.clock("teacher"):
        evaluator.teacher("validate")
        evaluator.teacher("test")
    with session.clock("verify"):
        winner, results = _race(session, problem, study, mirror, finalists)
        results = {"dense": _dense(session, problem, evaluator), **results}
    return _write(session, problem, study, evaluator, winner, results)


def _search(
    session: Session, problem: Problem, study: Study, mirror: Mirror
) -> dict[str, tuple[Allocation, str]]:
    """Run the strategy; role -> (allocation, origin), simplest first."""
    found: Trial | None = None
    for found in configured(session.config)(problem, np.random.default_rng(session.config.seed)):
        session.progress.say(
            f"{found.origin}: KL {found.loss:.4f} on {found.fidelity.tokens:,} tokens, "
            f"{study.tokens:,} spent"
        )
        for trial in study.at(found.fidelity):  # all of the last stage; known ones are skipped
            mirror.report(trial, "candidate")
    predicted = problem.sensitivities(session.config.sensitivity_tokens)
    additive = solve(problem.space, problem.costs, problem.budgets, predicted)
    uniform = nearest_uniform(problem)
    roles = {"uniform": (uniform, uniform_origin(problem, uniform)), "ilp": (additive, "ilp")}
    if found is not None:
        roles["search"] = (found.allocation, found.origin)
    return roles


def _race(
    session: Session,
    problem: Problem,
    study: Study,
    mirror: Mirror,
    finalists: Mapping[str, tuple[Allocation, str]],
) -> tuple[Allocation, dict[str, Any]]:
    """The finalist of least loss on validation windows; only then is any test window looked at."""
    windows = session.windows
    fidelities = {
        "search": problem.fidelity(SEARCH_TOKENS),
        "validate": Fidelity(int(windows.validate.size), 0, "validate"),
        "test": Fidelity(int(windows.test.size), 0, "test"),
    }

    def score(role: str, split: str) -> Trial:
        allocation, origin = finalists[role]
        session.progress.say(f"scoring {NAMES[role]} on {split} windows")
        (trial,) = study.evaluate([allocation], fidelities[split], origin)
        mirror.report(trial, "finalist" if role == "search" else "baseline")
        return trial

    validated = {role: score(role, "validate") for role in finalists}
    best = min(validated, key=lambda role: validated[role].loss)  # ties: the simplest
    results = {}
    for role in dict.fromkeys(("uniform", "ilp", best)):
        trials = {"search": score(role, "search"), "validate": validated[role]}
        results[role] = candidate_facts(problem, {**trials, "test": score(role, "test")})
    return finalists[best][0], {
        "uniform": results["uniform"],
        "ilp": results["ilp"],
        "winner": results[best],
    }


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
) -> Result:
    config, loaded = session.config, session.loaded
    model = evaluator.stitched.restore()
    claim_output(config.out)  # not before: until here a former result stays whole
    weights = save_native(
        model, loaded.tokenizer, session.space, winner, session.database, config.out
    )
    facts = manifest_facts(session, problem, study, winner, results, weights)
    write_report(facts, config.out)
    write_manifest(config.out, facts)
    return Result(config.out, facts, winner)
