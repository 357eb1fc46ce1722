"""Auto: ILP, refinement, exchanges, evolution, each from the best so far, within a token budget.

Where layers may be left out, removal comes before all of them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autocompress.core import GRADIENT, Evaluate, Problem, Trial
from autocompress.effort import EFFORTS, Plan, plan, share
from autocompress.predictions import Estimate, Sensitivities
from autocompress.strategies.exchange import Exchange, Rounds
from autocompress.strategies.harms import measured_prices
from autocompress.strategies.ilp import solve
from autocompress.strategies.metering import metered
from autocompress.strategies.racing import FIRST, race
from autocompress.strategies.record import Record
from autocompress.strategies.refinement import Refinement
from autocompress.strategies.removal import Removal
from autocompress.strategies.surrogate import SurrogateSearch
from autocompress.strategies.uniform import nearest_uniform, uniform_origin
from autocompress.strategies.units import only_removes, removes

if TYPE_CHECKING:
    import numpy as np

ROUNDS = 12  # windows that removal must have to measure anything


@dataclass(frozen=True)
class Auto:
    """The default search: every phase starts from the best so far and must beat it in a race.

    Sensitivities and the integer program, raced against the nearest uniform allocation; refinement
    by gradients at the answers; exchanges of a few layers by the refined prices, while they bring
    what they promise; then, with what is left, evolution whose surrogate learns from every trial
    what prices do not say.

    In a space that drops layers half of what sensitivities leave is spent on removal first, and all
    of it where layers can only be kept or dropped: there gradients say nothing.

    Args:
        spending: tokens and what they are for; None is what the normal effort affords.
        generations: of evolution, at most; None is no limit.
        offspring: scored per generation.
    """

    spending: Plan | None = None
    generations: int | None = None
    offspring: int = 6

    def __post_init__(self) -> None:
        self._evolution(plan(EFFORTS["normal"], 1, 1), None)  # checks its settings

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        problem = metered(problem)
        record, measure = Record(problem), problem.evaluate
        problem = replace(problem, evaluate=record.evaluate)
        spending = self.spending or plan(EFFORTS["normal"], problem.window, problem.tokens)
        known: Trial | None = None
        if only_removes(problem.space):
            yield from _shorten(problem, measure, spending.tokens, rng)
            return
        if removes(problem.space):
            problem, spending, known = yield from _remove(problem, measure, spending, rng)
        incumbent = _start(problem, spending, known)
        yield incumbent
        prices = None
        if spending.steps:
            prices, incumbent = _refine(problem, spending, incumbent)
            yield incumbent
            incumbent, prices = yield from _exchange(problem, spending, incumbent, prices)
        evolution = self._evolution(spending, prices)
        yield from evolution.evolve(problem, record, incumbent, rng)

    def _evolution(self, spending: Plan, prices: Estimate | None) -> SurrogateSearch:
        return SurrogateSearch(
            generations=self.generations,
            tokens=spending.tokens,
            offspring=self.offspring,
            screen=max(1, min(SurrogateSearch.screen, spending.compare // 4)),
            race_tokens=spending.compare,
            sensitivity_tokens=spending.sensitivities,
            prices=None if prices is None else prices.mean,
        )


def _shorten(
    problem: Problem, measure: Evaluate, tokens: int, rng: np.random.Generator
) -> Iterator[Trial]:
    """Removal alone."""
    nothing: Sensitivities = tuple(dict.fromkeys(allowed, 0.0) for allowed in problem.space.levels)
    yield from Removal(tokens).search(problem, measure, Estimate(nothing, nothing), rng)


def _remove(
    problem: Problem, measure: Evaluate, spending: Plan, rng: np.random.Generator
) -> Generator[Trial, None, tuple[Problem, Plan, Trial | None]]:
    """Removal; what follows knows how much dropping costs, and has the other half of the tokens."""
    prices = problem.sensitivities(spending.sensitivities)
    half = (spending.tokens - GRADIENT * spending.sensitivities) // 2
    if half < ROUNDS * problem.window:
        return problem, spending, None
    incumbent: Trial | None = None
    search = Removal(problem.spent() + half).search(problem, measure, prices, rng)
    while True:
        try:
            incumbent = next(search)
        except StopIteration as end:
            priced = measured_prices(prices, end.value)
            break
        yield incumbent
    rest = share(spending, half, problem.window, problem.tokens)
    problem = replace(problem, sensitivities=lambda tokens: priced)
    return problem, replace(rest, tokens=spending.tokens), incumbent


def _start(problem: Problem, spending: Plan, known: Trial | None) -> Trial:
    """The integer program's answer, or what is known or uniform where that is better."""
    uniform = nearest_uniform(problem)
    origin = uniform_origin(problem, uniform)
    first = problem.fidelity(min(FIRST * problem.window, spending.compare))
    problem.evaluate([uniform], first, origin)  # the race's first stage, under its own name
    prices = problem.sensitivities(spending.sensitivities).mean
    answer = solve(problem.space, problem.costs, problem.budgets, prices)
    before = [] if known is None else [known.allocation]
    best, *_ = race(problem, [*before, answer, uniform], spending.compare, "ilp")
    if known is not None and best.allocation == known.allocation:
        return replace(best, origin=known.origin)
    if best.allocation == uniform:
        return replace(best, origin=origin)
    return best


def _refine(problem: Problem, spending: Plan, incumbent: Trial) -> tuple[Estimate, Trial]:
    """Refined prices, and the best of the incumbent and the last answers they gave."""
    descent = Refinement(
        steps=spending.steps,
        sensitivity_tokens=spending.sensitivities,
        batch=spending.batch,
    )
    prices, answers = descent.descend(problem, incumbent.allocation)
    afford = (spending.tokens - problem.spent()) // spending.compare
    latest = answers[::-1][: min(spending.contenders, afford)]
    best, *_ = race(problem, [incumbent.allocation, *latest], spending.compare, "refinement")
    return prices, incumbent if best.allocation == incumbent.allocation else best


def _exchange(problem: Problem, spending: Plan, incumbent: Trial, prices: Estimate) -> Rounds:
    """Exchanges, with gradients on the windows behind refinement's."""
    exchange = Exchange(batch=spending.batch, tokens=spending.compare)
    return exchange.rounds(
        problem,
        incumbent,
        problem.sensitivities(spending.sensitivities),
        prices,
        before=spending.sensitivities + spending.steps * spending.batch,
        spend=spending.tokens,
    )
