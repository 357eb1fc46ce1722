"""Auto: ILP, refinement, exchanges, evolution, each from the best so far, within a token budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autocompress.core import Problem, Trial
from autocompress.effort import EFFORTS, Plan, plan
from autocompress.strategies.exchange import Exchange
from autocompress.strategies.ilp import solve
from autocompress.strategies.metering import metered
from autocompress.strategies.racing import race
from autocompress.strategies.refinement import Refinement
from autocompress.strategies.uniform import nearest_uniform, uniform_origin

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Auto:
    """The default search: every phase starts from the best so far and must beat it in a race.

    Sensitivities and the integer program, raced against the nearest uniform allocation; refinement
    by gradients at the answers; exchanges of a few layers by the refined prices; then, with what
    is left, evolution whose surrogate learns from every trial what prices do not say.

    Args:
        spending: tokens and what they are for; None is what the normal effort affords.
    """

    spending: Plan | None = None

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        problem = metered(problem)
        normal = plan(EFFORTS["normal"], problem.window, problem.tokens)
        spending = self.spending or normal
        incumbent = _start(problem, spending)
        yield incumbent
        sensitivities = problem.sensitivities(spending.sensitivities)
        descent = Refinement(
            steps=spending.steps,
            sensitivity_tokens=spending.sensitivities,
            batch=spending.batch,
        )
        prices, answers = descent.descend(problem, incumbent.allocation)
        afford = (spending.tokens - problem.spent()) // spending.compare
        contenders = answers[::-1][: min(spending.contenders, afford)]
        best, *_ = race(
            problem, [incumbent.allocation, *contenders], spending.compare, "refinement"
        )
        if best.allocation != incumbent.allocation:
            incumbent = best
            yield incumbent
        exchange = Exchange(batch=spending.batch, tokens=spending.compare)
        seen = spending.sensitivities + spending.steps * spending.batch
        rounds = exchange.rounds(problem, incumbent, sensitivities, prices, seen, spending.tokens)
        for incumbent, _ in rounds:
            yield incumbent


def _start(problem: Problem, spending: Plan) -> Trial:
    """The integer program's answer, or the nearest uniform allocation where that is better."""
    prices = problem.sensitivities(spending.sensitivities).mean
    answer = solve(problem.space, problem.costs, problem.budgets, prices)
    uniform = nearest_uniform(problem)
    best, *_ = race(problem, [answer, uniform], spending.compare, "ilp")
    if best.allocation == uniform:
        return replace(best, origin=uniform_origin(problem, uniform))
    return best
