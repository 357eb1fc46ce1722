"""A search that is opened: session, budgets, study, mirror and problem, ready to propose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from autocompress.config import StudyConfig
from autocompress.core import Budget, CostTable, Problem, SearchSpace
from autocompress.cost import check_budgets, parse_budget
from autocompress.estimates import influence, linearize, sensitivities
from autocompress.evaluator import Evaluator
from autocompress.files import fingerprint
from autocompress.interrupt import Stop
from autocompress.latency_search import Limit, limited, open_limit, predicted_costs
from autocompress.mirror import Mirror
from autocompress.optuna_storage import JOURNAL
from autocompress.progress import Progress
from autocompress.run_record import recorded_study, write_record
from autocompress.session import Session, complete_database, open_session, undominated
from autocompress.smallest import Goal, split_goal
from autocompress.study import Study
from autocompress.worker_scoring import Setup, SharedEvaluator
from autocompress.workers import Pool, open_pool


@dataclass(frozen=True)
class Opened:
    """What the steps of a search share.

    Args:
        problem: what strategies see.
        limit: on latency; None where no budget limits it.
        goal: what is made small while a loss is kept; None where costs are limited.
        stop: where Ctrl-C is heard.
    """

    session: Session
    problem: Problem
    study: Study
    mirror: Mirror
    evaluator: Evaluator
    limit: Limit | None
    goal: Goal | None
    stop: Stop

    @property
    def config(self) -> StudyConfig:
        """The search's settings."""
        return self.session.config

    def within(self, problem: Problem) -> Opened:
        """The same search of another problem."""
        return replace(self, problem=problem)


@contextmanager
def open_search(config: StudyConfig, progress: Progress) -> Iterator[Opened]:
    """Open everything, complete the database and the dense model's distributions.

    Inside, the run folder belongs to this process, and the first Ctrl-C is heard by `stop`.

    Raises:
        AutocompressError: any input is wrong; nothing but the run folder was written.
    """
    with open_pool(config.parsed_workers(), progress.say) as pool:
        session = open_session(config, progress)
        yield from _opened(session, pool)


def _opened(session: Session, pool: Pool | None) -> Iterator[Opened]:
    config, progress, stop = session.config, session.progress, Stop()
    limit = open_limit(session)
    (goal, budgets), costs = _budgets(session, limit), _costs(session, limit)
    evaluator = make_evaluator(session)
    recorded = predicted_costs(session, limit)
    scoring = evaluator if pool is None else SharedEvaluator(evaluator, _setup(session, pool), pool)
    with Study(
        config.run_folder,
        session.space,
        recorded,
        session.facts(),
        scoring,
        pause=stop.check,
        workers=1 if pool is None else pool.size,
    ) as study:
        mirror = _open_mirror(session, recorded)
        complete_database(session, pool)
        space = undominated(session, limited(limit, session.searched), costs)
        problem = make_problem(session, evaluator, study, space, costs, budgets)
        with session.clock("teacher"):
            evaluator.teacher("search")
        with stop.on_interrupt(progress.say):
            yield Opened(session, problem, study, mirror, evaluator, limit, goal, stop)


def make_evaluator(session: Session) -> Evaluator:
    """What scores allocations of a session's space."""
    return Evaluator(
        session.loaded.model,
        session.space,
        session.database,
        session.windows,
        session.config.run_folder,
        session.progress,
        session.config.parsed_workers().own_threads,
    )


def _setup(session: Session, pool: Pool) -> Setup:
    """What the pool's workers open of a session."""
    loaded, folder = session.loaded, session.config.run_folder.resolve()
    return Setup(
        key=f"{folder} {fingerprint(session.facts())}",
        model=source_of(session.config.model),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        fingerprint=loaded.fingerprint,
        space=session.space,
        database=session.database.path.resolve(),
        identity=session.database.identity,
        folder=folder,
        share=pool.size,
    )


def make_problem(
    session: Session,
    evaluator: Evaluator,
    study: Study,
    space: SearchSpace,
    costs: Sequence[CostTable],
    budgets: Sequence[Budget],
) -> Problem:
    """What strategies see of a session: everything they ask is kept in its study and run folder.

    Args:
        space: what is searched, the session's or a part of it.
        costs: over at least the levels of `space`.
    """
    return Problem(
        space=space,
        costs=tuple(costs),
        budgets=tuple(budgets),
        evaluate=study.evaluate,
        sensitivities=lambda tokens: sensitivities(session, evaluator, study, tokens),
        linearize=lambda *at: linearize(session, evaluator, study, *at),
        window=session.config.window,
        tokens=int(session.windows.search.size),
        influence=lambda tokens: influence(session, evaluator, study, tokens),
    )


def _costs(session: Session, limit: Limit | None) -> tuple[CostTable, ...]:
    """What a search sees: latencies with a margin."""
    return session.costs if limit is None else (*session.costs, limit.table())


def _budgets(session: Session, limit: Limit | None) -> tuple[Goal | None, tuple[Budget, ...]]:
    """What is to be made small, if a loss is limited, and the budgets that count.

    Raises:
        BudgetError: one, or a limit of the range, cannot be read or met.
    """
    config = session.config
    goal, wanted = split_goal(parsed(config.budgets, session, limit), config.minimize)
    space, costs = limited(limit, session.searched), _costs(session, limit)
    for one in parsed(config.range_limits, session, limit):
        check_budgets(space, costs, [one, *wanted])
    return goal, check_budgets(space, costs, wanted)


def parsed(texts: Sequence[str], session: Session, limit: Limit | None) -> tuple[Budget, ...]:
    """Limits as they are written -> budgets; a speed-up is one over the target's dense model.

    Raises:
        BudgetError: one cannot be read.
    """
    dense_ms = None if limit is None else limit.latency.dense_ms
    return tuple(parse_budget(text, session.space, dense_ms) for text in texts)


def _open_mirror(session: Session, costs: Sequence[CostTable]) -> Mirror:
    """The Optuna study of a run folder, whose name tells runs in one storage apart."""
    config = session.config
    storage = config.storage or config.run_folder / JOURNAL
    name = recorded_study(config.run_folder)  # a folder may have been moved since
    if name is None:
        stem, facts = config.run_folder.resolve().name, fingerprint(session.facts())[:8]
        numbers = (f" {number}" for number in count(2))
        names = (f"{stem}{number} {facts}" for number in chain([""], numbers))
        mirror, name = Mirror.create(storage, names, session.space, costs)
    else:
        mirror = Mirror.open(storage, name, session.space, costs)
    windows = session.windows.fingerprint
    write_record(config, session.space, costs, model_facts(session), windows, name)
    return mirror


def model_facts(session: Session) -> dict[str, Any]:
    """What was compressed."""
    loaded = session.loaded
    return {
        "name": loaded.name,
        "source": source_of(session.config.model),
        "parameters": loaded.parameters,
        "fingerprint": loaded.fingerprint,
    }


def source_of(name: str | None) -> str | None:
    """Where a dense model or a text is found again, from any current directory."""
    path = Path(name or "").expanduser()
    return str(path.resolve()) if name and path.exists() else name
