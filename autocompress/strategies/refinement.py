"""Refinement: linearize the loss at the last answer, move the prices, solve again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.core import Allocation, Problem, Strategy, Trial
from autocompress.predictions import Estimate
from autocompress.strategies import check_setting, find_strategy
from autocompress.strategies.ilp import solve
from autocompress.strategies.prices import mix, prices_around
from autocompress.strategies.racing import race

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Refinement:
    """Integer programs whose prices know what the incumbent's layers do to each other.

    Sensitivities say what a layer's level costs beside a dense model. Beside an allocation it
    costs more or less, because errors of layers add up or cancel out; gradients there say how
    much. Every step takes gradients on another batch of windows at the last answer and solves
    again, with prices that are a share of what all steps so far say on average: conditional
    gradients with averaged estimates, so that neither one batch nor one answer is followed far.
    The last answers race the start, and the best is kept.

    Args:
        start: a strategy or its name; its last incumbent is where the first step starts.
        steps: gradients are taken this often.
        share: of what gradients at the answers say in the prices, 0 to 1; the rest is what
            sensitivities say. They promise too much (`studies/LOG.md`, 2026-11-25).
        sensitivity_tokens: tokens of the sensitivities.
        batch: tokens of the gradients of one step.
        contenders: how many of the last answers race.
        tokens: to compare them on in the end; whole windows, at most the search split.

    References:
        Mokhtari, Hassani, Karbasi, Stochastic Conditional Gradient Methods, arXiv:1804.09554,
        algorithm 1.
    """

    start: str | Strategy = "ilp"
    steps: int = 8
    share: float = 0.5
    sensitivity_tokens: int = 8192
    batch: int = 4096
    contenders: int = 4
    tokens: int = 24_576

    def __post_init__(self) -> None:
        check_setting("steps", self.steps, 0)
        check_setting("share", self.share, 0, 1)
        check_setting("sensitivity_tokens", self.sensitivity_tokens, 1)
        check_setting("batch", self.batch, 1)
        check_setting("contenders", self.contenders, 1)
        check_setting("tokens", self.tokens, 1)
        if isinstance(self.start, str):
            find_strategy(self.start)

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        start = find_strategy(self.start)() if isinstance(self.start, str) else self.start
        for incumbent in start(problem, rng):
            yield incumbent
        _, answers = self.descend(problem, incumbent.allocation)
        contenders = [incumbent.allocation, *answers[-self.contenders :]]
        best, *_ = race(problem, contenders, self.tokens, "refinement")
        if best.allocation != incumbent.allocation:
            yield best

    def descend(self, problem: Problem, at: Allocation) -> tuple[Estimate, list[Allocation]]:
        """The prices after the last step, and every step's answer."""
        seen, half, batch = (
            problem.fidelity(tokens).tokens
            for tokens in (self.sensitivity_tokens, problem.tokens // 2, self.batch)
        )
        mean = prices = sensitivities = problem.sensitivities(seen)
        before = min(seen, half)  # sensitivities see the other half last
        answers: list[Allocation] = []
        for step in range(self.steps):
            around = problem.linearize(at, batch, before)
            mean = mix(mean, prices_around(sensitivities, at, around), 1 / (step + 1))
            prices = mix(sensitivities, mean, self.share)
            at = solve(problem.space, problem.costs, problem.budgets, prices.mean)
            answers.append(at)
            before += batch
        return prices, answers
