"""Auto: ILP for the start, refinement, evolution for the rest, and knowing when to stop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.core import Problem, Trial
from autocompress.strategies.evolution import Evolution
from autocompress.strategies.ilp import ILP
from autocompress.strategies.refinement import Refinement

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Auto:
    """Evolution from the refined ILP's answer, until the tokens are spent or nothing improves.

    Args:
        tokens: to score in all, those of gradients not counted.
        patience: generations in a row without an improvement, after which it ends.
        sensitivity_tokens: tokens that score every level of every layer for the ILP.
        rounds: of refinement, at most.
        refinement_tokens: of a linearization, and to compare candidates on in the end. On 8,192
            tokens of SmolLM2's, refinement gained three times as much on them as on others.
        generations: of evolution, at most; None is no limit.
        offspring: candidates per generation.
    """

    tokens: int = 196_608
    patience: int = 2
    sensitivity_tokens: int = 4096
    rounds: int = 2
    refinement_tokens: int = 24_576
    generations: int | None = None
    offspring: int = 8

    def __post_init__(self) -> None:
        self._search()  # checks every setting

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        yield from self._search()(problem, rng)

    def _search(self) -> Evolution:
        start = ILP(sensitivity_tokens=self.sensitivity_tokens)
        return Evolution(
            start=Refinement(start, self.rounds, self.sensitivity_tokens, self.refinement_tokens),
            stages=((2, 1024), (1, max(1024, self.refinement_tokens))),
            generations=self.generations,
            offspring=self.offspring,
            tokens=self.tokens,
            patience=self.patience,
        )
