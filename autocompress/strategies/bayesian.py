"""Bayesian: a sampler of Optuna chooses the level of every layer itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.core import Allocation, Problem, Trial
from autocompress.levels import Level
from autocompress.predictions import Sensitivities
from autocompress.strategies import check_setting
from autocompress.strategies.ilp import GAP, SECONDS, solve
from autocompress.strategies.samplers import check_sampler, minimize

if TYPE_CHECKING:
    import numpy as np
    import optuna

# Layers with a choice above which a warning says that asking takes long. With 210, TPE took 0.57 s
# after 500 trials (Optuna 5.0), and it grows with both; a Gaussian process is slower still.
SLOW = {"tpe": 64, "gp": 32}


@dataclass(frozen=True)
class Bayesian:
    """One parameter per layer with a choice, searched by a sampler of Optuna.

    For small models: with hundreds of layers a sampler learns little from hundreds of trials, and
    `spdy` searches about ten coefficients instead. A proposal above a budget is replaced by the
    allocation within all of them that differs least in the sum of sensitivities; the sampler is
    told what that one lost. The first candidate is the integer programme's answer.

    Args:
        sampler: 'tpe', 'gp' (Optuna fits it with torch), 'nsgaii' or 'cmaes'. Parameters are
            categories, but for CMA-ES, which knows numbers only: levels in order of cost.
        candidates: evaluated in all, the first included.
        tokens: to evaluate each on; whole windows, at most the search split.
        sensitivity_tokens: tokens that score every level of every layer; whole windows.
        gap: of the integer programme that replaces proposals, see `ILP`.
        seconds: likewise.

    References:
        Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011 (TPE).
    """

    sampler: str = "tpe"
    candidates: int = 64
    tokens: int = 8192
    sensitivity_tokens: int = 4096
    gap: float = GAP
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        check_sampler(self.sampler)
        check_setting("candidates", self.candidates, 1)
        check_setting("tokens", self.tokens, 1)
        check_setting("sensitivity_tokens", self.sensitivity_tokens, 1)
        check_setting("gap", self.gap, 0, 1)
        check_setting("seconds", self.seconds, 0)

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        self._warn(sum(len(allowed) > 1 for allowed in problem.space.levels))
        tokens = problem.fidelity(self.sensitivity_tokens).tokens
        sensitivities = problem.sensitivities(tokens).mean
        ranked = _ranked(problem)
        start = self._solve(problem, sensitivities)
        first = {
            f"{layer}": order.index(level)
            for layer, (order, level) in enumerate(zip(ranked, start.levels, strict=True))
            if len(order) > 1
        }

        def propose(asked: optuna.Trial) -> Allocation:
            ranks = [self._rank(asked, layer, order) for layer, order in enumerate(ranked)]
            pairs = zip(ranked, ranks, strict=True)
            wanted = Allocation(tuple(order[rank] for order, rank in pairs))
            if problem.fits(wanted):
                return wanted
            return self._solve(problem, distances(sensitivities, wanted))

        fidelity = problem.fidelity(self.tokens)
        yield from minimize(
            problem, self.sampler, propose, first, self.candidates, fidelity, "bayesian", rng
        )

    def _solve(self, problem: Problem, prices: Sensitivities) -> Allocation:
        return solve(problem.space, problem.costs, problem.budgets, prices, self.gap, self.seconds)

    def _rank(self, asked: optuna.Trial, layer: int, order: tuple[Level, ...]) -> int:
        if len(order) == 1:
            return 0
        if self.sampler == "cmaes":
            return asked.suggest_int(f"{layer}", 0, len(order) - 1)
        return asked.suggest_categorical(f"{layer}", range(len(order)))

    def _warn(self, layers: int) -> None:
        most = SLOW.get(self.sampler, layers)
        if layers > most:
            warnings.warn(
                f"the sampler '{self.sampler}' must have at most {most} layers with a choice to "
                f"ask quickly. Got {layers}. Use 'spdy', or the sampler 'nsgaii'.",
                stacklevel=3,
            )


def distances(sensitivities: Sensitivities, wanted: Allocation) -> Sensitivities:
    """How far each level's sensitivity is from that of the wanted one."""
    return tuple(
        {level: abs(value - row[own]) for level, value in row.items()}
        for row, own in zip(sensitivities, wanted.levels, strict=True)
    )


def _ranked(problem: Problem) -> list[tuple[Level, ...]]:
    """Levels of every layer in order of the first budget's cost."""
    first = problem.table(problem.budgets[0].cost) if problem.budgets else problem.costs[0]
    return [
        tuple(sorted(allowed, key=entry.__getitem__))
        for allowed, entry in zip(problem.space.levels, first.entries, strict=True)
    ]
