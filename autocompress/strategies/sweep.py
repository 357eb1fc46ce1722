"""Sweep: one weight between loss and cost, moved along the front, with prices that it learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autocompress.core import Allocation, Budget, Problem, Trial
from autocompress.effort import Plan
from autocompress.predictions import Sensitivities
from autocompress.strategies.ilp import solve
from autocompress.strategies.prices import mix, prices_around
from autocompress.strategies.racing import race

if TYPE_CHECKING:
    import numpy as np

HALVINGS = 60  # of the weight's range on a logarithmic scale: exact to rounding
SHARE = 0.5  # of what gradients say in the prices, as in refinement
CARRY = 0.5  # weight of the first gradients at a limit beside those of the limits before


@dataclass(frozen=True)
class Sweep:
    """Scalarisation: each layer takes the level of least price + weight × cost.

    The weight is bisected until the allocation just fits a limit. Gradients there move the prices,
    which start at those of the limit before: neighbours on the front are alike. Only points on
    the convex hull of what prices predict are found this way, so it may leave room; with other
    budgets beside the limit, the integer programme answers where the weighted sum does not fit.

    Args:
        spending: of each limit, the shared sensitivities included.

    References:
        Shoham, Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE
        Trans. ASSP 1988.
    """

    spending: Plan

    def __call__(
        self, problem: Problem, limits: Sequence[Budget], rng: np.random.Generator
    ) -> Iterator[tuple[int, Trial]]:
        plan = self.spending
        sensitivities = mean = prices = problem.sensitivities(plan.sensitivities)
        before = plan.sensitivities
        for number, limit in enumerate(limits):
            within = replace(problem, budgets=(limit, *problem.budgets))
            answers = [weighted(within, prices.mean)]
            for step in range(plan.steps):
                around = problem.linearize(answers[-1], plan.batch, before)
                there = prices_around(sensitivities, answers[-1], around)
                first = CARRY if number else 1.0
                mean = mix(mean, there, first if step == 0 else 1 / (step + 1))
                prices, before = mix(sensitivities, mean, SHARE), before + plan.batch
                answers.append(weighted(within, prices.mean))
            contenders = [answers[0], *answers[1:][-plan.contenders :]]
            best, *_ = race(within, contenders, plan.compare, "sweep")
            yield number, best


def weighted(problem: Problem, prices: Sensitivities) -> Allocation:
    """The allocation of least price + weight × cost, for the least weight that fits.

    Args:
        problem: its first budget is the limit that the weight belongs to.
    """
    table = problem.table(problem.budgets[0].cost)

    def at(weight: float) -> Allocation:
        rows = zip(problem.space.levels, prices, table.entries, strict=True)
        return Allocation(
            tuple(
                min(levels, key=lambda it: (price[it] + weight * cost[it], cost[it]))
                for levels, price, cost in rows
            )
        )

    if problem.fits(at(0.0)):
        return at(0.0)
    low, high = 1e-30, 1e6  # nats per unit of cost: beyond what any loss and any cost can be
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if problem.fits(at(middle)) else (middle, high)
    found = at(high)
    if problem.fits(found):
        return found
    return solve(problem.space, problem.costs, problem.budgets, prices)
