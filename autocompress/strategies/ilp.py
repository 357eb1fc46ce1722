"""ILP: the allocation of least predicted loss, if the losses of layers added up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.core import Allocation, Budget, CostTable, Problem, SearchSpace, Trial
from autocompress.cost import choose
from autocompress.predictions import Sensitivities
from autocompress.strategies import check_setting

if TYPE_CHECKING:
    import numpy as np

# Sensitivities are off by percents, and the last digits can take a solver minutes, which would also
# make the answer depend on the machine: studies/search/scaling.md.
GAP, SECONDS = 5e-4, 60.0


@dataclass(frozen=True)
class ILP:
    """Solves for the least sum of sensitivities within every budget and evaluates the answer.

    Losses of layers do not add up, least of all at 2 bits, so this is a start and not the end.

    Args:
        sensitivity_tokens: tokens that score every level of every layer; whole windows.
        tokens: to evaluate the answer on; whole windows, at most the search split.
        caution: standard errors by which a level counts as worse than estimated, at least 0.
        gap: relative distance from the least sum that is near enough, 0 to 1.
        seconds: of the solver, at most; the best it has by then is taken, with a warning.
    """

    sensitivity_tokens: int = 4096
    tokens: int = 8192
    caution: float = 0.0
    gap: float = GAP
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        check_setting("sensitivity_tokens", self.sensitivity_tokens, 1)
        check_setting("tokens", self.tokens, 1)
        check_setting("caution", self.caution, 0)
        check_setting("gap", self.gap, 0, 1)
        check_setting("seconds", self.seconds, 0)

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        predicted = problem.sensitivities(problem.fidelity(self.sensitivity_tokens).tokens)
        prices = predicted.bound(self.caution)
        allocation = solve(
            problem.space, problem.costs, problem.budgets, prices, self.gap, self.seconds
        )
        yield from problem.evaluate([allocation], problem.fidelity(self.tokens), "ilp")


def solve(
    space: SearchSpace,
    costs: Sequence[CostTable],
    budgets: Sequence[Budget],
    sensitivities: Sensitivities,
    gap: float = GAP,
    seconds: float = SECONDS,
) -> Allocation:
    """The allocation of least total sensitivity within every budget, to `gap`.

    Args:
        sensitivities: per layer, level -> predicted loss increase in nats/token; infinite and NaN
            count as ten times the largest finite one.
        gap: relative distance from the least total that is near enough.
        seconds: of the solver, at most; what it has by then is taken, with a warning.

    Raises:
        BudgetError: no allocation meets every budget; says the smallest possible one.
    """
    return choose(space, costs, budgets, sensitivities, gap, seconds)
