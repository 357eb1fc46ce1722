"""NSGA-II: a population that spreads along the whole front at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autocompress.core import GRADIENT, Allocation, Budget, Problem, Trial
from autocompress.effort import Plan
from autocompress.optuna_storage import quiet
from autocompress.strategies.bayesian import distances
from autocompress.strategies.ilp import solve

if TYPE_CHECKING:
    import numpy as np
    import optuna

FEWEST = 4  # candidates for each limit, the integer programme's answer included


@dataclass(frozen=True)
class NSGAII:
    """Optuna's NSGA-II over the levels of all layers; loss and cost are its two objectives.

    The first population holds the integer programme's answer to every limit. A proposal beyond the
    last limit, or beyond another budget, is replaced by the allocation within them that differs
    least in the sum of sensitivities. At each limit, the best of all that fit is its incumbent.

    Args:
        spending: of each limit, the shared sensitivities included; candidates are scored on as
            many tokens as it compares on, while all that the limits may spend lasts.

    References:
        Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE Trans.
        Evolutionary Computation 2002.
    """

    spending: Plan

    def __call__(
        self, problem: Problem, limits: Sequence[Budget], rng: np.random.Generator
    ) -> Iterator[tuple[int, Trial]]:
        plan = self.spending
        widest = replace(problem, budgets=(limits[-1], *problem.budgets))
        prices = problem.sensitivities(plan.sensitivities).mean
        fidelity = problem.fidelity(plan.compare)
        each = (plan.tokens - GRADIENT * plan.sensitivities) // fidelity.tokens
        starts = [
            solve(problem.space, problem.costs, (limit, *problem.budgets), prices)
            for limit in limits
        ]
        study = _study(problem, starts, rng)
        seen: list[Trial] = []
        for _ in range(len(limits) * max(FEWEST, each)):
            with quiet():
                asked = study.ask()
                wanted = _decode(problem, asked)
            if not widest.fits(wanted):
                nearest = distances(prices, wanted)
                wanted = solve(problem.space, problem.costs, widest.budgets, nearest)
            (trial,) = problem.evaluate([wanted], fidelity, "nsgaii")
            seen.append(trial)
            table = problem.table(limits[0].cost)
            with quiet():
                worst = 1e9 if not math.isfinite(trial.loss) else trial.loss
                study.tell(asked, [worst, table.total(wanted)])
        for number, limit in enumerate(limits):
            within = replace(problem, budgets=(limit, *problem.budgets))
            fitting = [trial for trial in seen if within.fits(trial.allocation)]
            yield number, min(fitting, key=lambda trial: trial.loss)


def _study(
    problem: Problem, starts: Sequence[Allocation], rng: np.random.Generator
) -> optuna.Study:
    """A study in memory that begins with `starts`."""
    import optuna

    with quiet():
        sampler = optuna.samplers.NSGAIISampler(
            population_size=max(8, 2 * len(starts)), seed=int(rng.integers(2**31))
        )
        study = optuna.create_study(sampler=sampler, directions=["minimize", "minimize"])
        for start in starts:
            study.enqueue_trial(_encode(problem, start))
    return study


def _encode(problem: Problem, allocation: Allocation) -> dict[str, Any]:
    rows = enumerate(zip(problem.space.levels, allocation.levels, strict=True))
    return {f"{i}": levels.index(own) for i, (levels, own) in rows if len(levels) > 1}


def _decode(problem: Problem, asked: optuna.Trial) -> Allocation:
    return Allocation(
        tuple(
            levels[asked.suggest_categorical(f"{i}", range(len(levels)))]
            if len(levels) > 1
            else levels[0]
            for i, levels in enumerate(problem.space.levels)
        )
    )
