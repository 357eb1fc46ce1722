"""Random search: the baseline that any search must beat at equal tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.core import Allocation, Problem, Trial
from autocompress.strategies import check_setting
from autocompress.strategies.mutation import LevelSwitch
from autocompress.strategies.uniform import nearest_uniform

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class RandomSearch:
    """Evaluates random allocations within every budget and keeps the best.

    Each is a random walk of level switches, as long as the model has layers, from the nearest
    uniform allocation.

    Args:
        candidates: evaluated in all, the uniform one not counted.
        tokens: to evaluate each on; whole windows, at most the search split.
    """

    candidates: int = 64
    tokens: int = 8192

    def __post_init__(self) -> None:
        check_setting("candidates", self.candidates, 0)
        check_setting("tokens", self.tokens, 1)

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        fidelity, switch = problem.fidelity(self.tokens), LevelSwitch.of(problem)
        start = nearest_uniform(problem)
        (best,) = problem.evaluate([start], fidelity, "random")
        yield best
        for _ in range(self.candidates):
            walked = _walk(switch, start, len(problem.space.layers), rng)
            (trial,) = problem.evaluate([walked], fidelity, "random")
            best = min(best, trial, key=lambda it: it.loss)
            yield best


def _walk(
    switch: LevelSwitch, start: Allocation, steps: int, rng: np.random.Generator
) -> Allocation:
    """Where `steps` draws lead; a draw that no budget allows stays."""
    for _ in range(steps):
        start = switch(start, rng) or start
    return start
