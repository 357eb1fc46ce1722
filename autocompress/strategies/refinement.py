"""Refinement: linearize the loss at the incumbent, solve again, keep what measures better."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.core import Allocation, Problem, Strategy, Trial
from autocompress.predictions import Linearization, Sensitivities
from autocompress.strategies import check_setting, find_strategy
from autocompress.strategies.ilp import solve
from autocompress.strategies.racing import race

if TYPE_CHECKING:
    import numpy as np

STEPS = (0.25, 0.5, 1.0)  # shares of the new prices; all of them often reach too far


@dataclass(frozen=True)
class Refinement:
    """Integer programs whose prices know what the incumbent's layers do to each other.

    Sensitivities say what a layer's level costs beside a dense model. Beside the incumbent it
    costs more or less, because errors of layers add up or cancel out; gradients at the incumbent
    say how much. Every round takes them once and mixes the prices they lead to with those of the
    rounds before, in several shares, because they hold near the incumbent only. The answers race
    the incumbent, and the best and its prices are kept. It ends when that is the incumbent.

    Args:
        start: a strategy or its name; its last incumbent is where the first round starts.
        rounds: at most.
        sensitivity_tokens: tokens of the sensitivities.
        tokens: of a linearization, and to evaluate every answer on.
    """

    start: str | Strategy = "ilp"
    rounds: int = 2
    sensitivity_tokens: int = 8192
    tokens: int = 8192

    def __post_init__(self) -> None:
        check_setting("rounds", self.rounds, 0)
        check_setting("sensitivity_tokens", self.sensitivity_tokens, 1)
        check_setting("tokens", self.tokens, 1)
        if isinstance(self.start, str):
            find_strategy(self.start)

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        start = find_strategy(self.start)() if isinstance(self.start, str) else self.start
        for incumbent in start(problem, rng):
            yield incumbent
        fidelity = problem.fidelity(self.tokens)
        (incumbent,) = problem.evaluate([incumbent.allocation], fidelity, incumbent.origin)
        tokens = problem.fidelity(self.sensitivity_tokens).tokens
        prices = sensitivities = problem.sensitivities(tokens).mean
        for _ in range(self.rounds):
            around = problem.linearize(incumbent.allocation, fidelity.tokens)
            there = around_incumbent(sensitivities, incumbent.allocation, around)
            mixtures = [mix(prices, there, step) for step in STEPS]
            answers = [
                solve(problem.space, problem.costs, problem.budgets, mixture)
                for mixture in mixtures
            ]
            contenders = [incumbent.allocation, *answers]
            best, *_ = race(problem, contenders, self.tokens, "refinement")
            if best.allocation == incumbent.allocation:
                return
            prices, incumbent = mixtures[answers.index(best.allocation)], best
            yield incumbent


def around_incumbent(
    sensitivities: Sensitivities, incumbent: Allocation, around: Linearization
) -> Sensitivities:
    """Prices of a level beside the incumbent's other layers, up to a constant of each layer.

    For a quadratic loss, moving one layer from its change a to the change v costs
    S(v) - S(a) + (v - a) . H . others, where S is the sensitivity. The slope, taken halfway, is
    half of v . H . everything, so the product with the others is twice the slope less the product
    with the layer's own change, which is 2 overlap sqrt(S(v) S(a)).
    """
    return tuple(
        {
            level: value
            + 2 * (slope[level] - overlap[level] * math.sqrt(max(0.0, value * price[own])))
            for level, value in price.items()
        }
        for price, own, slope, overlap in zip(
            sensitivities, incumbent.levels, around.slope.mean, around.overlap, strict=True
        )
    )


def mix(prices: Sensitivities, others: Sensitivities, share: float) -> Sensitivities:
    """`prices` but for a `share` of 0 to 1, which is that of `others`."""
    return tuple(
        {level: (1 - share) * price + share * other[level] for level, price in row.items()}
        for row, other in zip(prices, others, strict=True)
    )
