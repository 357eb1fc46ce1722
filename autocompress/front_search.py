"""One run, one front: a model at every limit, each raced against the simple answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autocompress.core import Budget, Fidelity, Trial
from autocompress.effort import front_plan
from autocompress.finalists import NOTHING_YET, baselines, score_one
from autocompress.opening import Opened, parsed
from autocompress.strategies.fronts import FrontStrategy, find_front
from autocompress.strategies.racing import SIMPLE, ranked


@dataclass(frozen=True)
class Point:
    """What won at one limit.

    Args:
        trial: on validation windows.
        role: 'search', or the baseline that nothing beat.
        rivals: role -> trial of every candidate at this limit, on the same windows.
    """

    limit: Budget
    trial: Trial
    role: str
    rivals: dict[str, Trial]


def front_limits(opened: Opened) -> tuple[Budget, ...]:
    """The limits of a front's points, which were checked when the search was opened."""
    return parsed(opened.config.range_limits, opened.session, opened.limit)


def front_strategy(opened: Opened) -> FrontStrategy:
    """The strategy that a configuration names for fronts, with what each point may spend."""
    config, session = opened.config, opened.session
    tokens = int(session.windows.search.size)
    spending = front_plan(config.full_tokens, config.points, config.window, tokens)
    if config.sensitivity_tokens is not None:
        spending = replace(spending, sensitivities=config.sensitivity_tokens)
    return find_front(config.strategy, spending)


def find_points(opened: Opened, limits: Sequence[Budget]) -> list[Point]:
    """The winner at every limit that the search came to, on validation windows.

    Where Ctrl-C comes before it has an answer to the first, the best baseline there.
    """
    session, strategy = opened.session, front_strategy(opened)
    incumbents: dict[int, Trial] = {}
    with session.clock("search"), opened.stop.search():
        rng = np.random.default_rng(opened.config.seed)
        for number, found in strategy(opened.problem, limits, rng):
            incumbents[number] = found
            session.progress.say(
                f"{limits[number].text}, {found.origin}: KL {found.loss:.4f} on "
                f"{found.fidelity.tokens:,} tokens, {opened.study.tokens:,} spent"
            )
            opened.mirror.report(found, "candidate")
    if not incumbents:
        session.progress.say(NOTHING_YET)
    with session.clock("teacher"):
        opened.evaluator.teacher("validate")
    with session.clock("verify"):
        return list(_race(opened, limits, incumbents))


def _race(
    opened: Opened, limits: Sequence[Budget], incumbents: dict[int, Trial]
) -> Iterator[Point]:
    """Baselines and incumbent of every limit, and the winners of tighter ones, which fit too."""
    fidelity = Fidelity(int(opened.session.windows.validate.size), 0, "validate")
    before: Trial | None = None
    for number, limit in enumerate(limits):
        if number not in incumbents and (incumbents or number):
            continue
        within = opened.within(replace(opened.problem, budgets=(limit, *opened.problem.budgets)))
        candidates = baselines(within)
        if number in incumbents:
            candidates["search"] = incumbents[number].allocation, incumbents[number].origin
        rivals = {role: score_one(within, candidates, role, fidelity) for role in candidates}
        if before is not None:
            rivals["tighter limit"] = before
        role = ranked(rivals, {*SIMPLE, "tighter limit"})[0]
        before = rivals[role]
        yield Point(limit, rivals[role], role, rivals)
