"""Uniform: one level everywhere, the baseline every search must beat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.core import Allocation, Problem, Trial
from autocompress.cost import choose
from autocompress.levels import Drop, Level
from autocompress.strategies import check_setting

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Uniform:
    """Evaluates the nearest uniform allocation at or under the budget.

    Args:
        tokens: to evaluate it on; whole windows, at most the search split.
    """

    tokens: int = 8192

    def __post_init__(self) -> None:
        check_setting("tokens", self.tokens, 1)

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        allocation = nearest_uniform(problem)
        fidelity = problem.fidelity(self.tokens)
        yield from problem.evaluate([allocation], fidelity, uniform_origin(problem, allocation))


def nearest_uniform(problem: Problem) -> Allocation:
    """The uniform allocation that uses most of the budget.

    Where none fits: with the last layers dropped, or the cheapest allocation that fits.

    Raises:
        BudgetError: no allocation fits; says the smallest possible budget.
    """
    fitting = uniforms_that_fit(problem)
    if not fitting:
        fitting = [it for it in _shortened(problem) if problem.fits(it)]
    return fitting[0] if fitting else choose(problem.space, problem.costs, problem.budgets)


def _shortened(problem: Problem) -> Iterator[Allocation]:
    """Every uniform allocation, the dearest first, with ever more of its last layers dropped.

    References:
        Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, arXiv:2403.17887.
    """
    space = problem.space
    drop: Level = Drop()
    first = problem.table(problem.budgets[0].cost) if problem.budgets else problem.costs[0]
    every = [space.uniform(level) for level in space.uniform_levels()]
    for allocation in sorted(every, key=first.total, reverse=True):
        for index in reversed(range(len(space.layers))):
            if any(level == drop for level in space.levels[index]):
                allocation = allocation.swap(index, drop)
                if allocation.keeps_some:
                    yield allocation


def uniforms_that_fit(problem: Problem) -> list[Allocation]:
    """Uniform allocations within every budget, different ones only.

    In falling order of the first budget's cost; where that is equal, the lower other costs first.
    """
    first = problem.table(problem.budgets[0].cost) if problem.budgets else problem.costs[0]
    space = problem.space
    every = dict.fromkeys(space.uniform(level) for level in space.uniform_levels())
    return sorted(
        filter(problem.fits, every),
        key=lambda it: (-first.total(it), *(table.total(it) for table in problem.costs)),
    )


def uniform_origin(problem: Problem, allocation: Allocation) -> str:
    """'uniform w3g64', or 'uniform' when the cheapest mixed allocation stands in."""
    space = problem.space
    for level in space.uniform_levels():
        if space.uniform(level) == allocation:
            return f"uniform {level}"
    return "uniform"
