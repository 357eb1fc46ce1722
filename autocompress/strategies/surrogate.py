"""Surrogate evolution: many offspring are imagined, few are scored, and every score teaches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autocompress.core import GRADIENT, Problem, Strategy, Trial
from autocompress.predictions import Sensitivities
from autocompress.strategies import check_ends, check_setting, find_strategy
from autocompress.strategies.grid import Grid
from autocompress.strategies.learner import Learner
from autocompress.strategies.metering import metered
from autocompress.strategies.moves import Moves
from autocompress.strategies.offspring import Offspring
from autocompress.strategies.racing import race
from autocompress.strategies.record import Record
from autocompress.strategies.surrogate_basis import Basis

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class SurrogateSearch:
    """Evolution that asks a model of the loss first.

    Sensitivities say what a change should cost, every trial says how wrong they are for a kind of
    layer, a block, a layer, a level, and for neighbours. A Gaussian posterior over these errors
    (`surrogate_model.py`) is trained on differences of trials on the same windows. Each
    generation imagines a pool of offspring (`offspring.py`), scores the few of most expected
    improvement on new windows beside the incumbent, and learns. Those of all trials so far that
    are then likeliest to be better race the incumbent on windows that stay the same from
    generation to generation; one replaces it if it has the lower loss there and the model,
    which knows every other window too, agrees.

    Args:
        start: a strategy or its name; its last incumbent is the first parent.
        generations: at most, 0 is the start alone; None leaves the end to `tokens` or `patience`.
        tokens: that may be spent, the start's included; None is no limit.
        patience: generations in a row without a new incumbent; None is no limit.
        pool: offspring imagined per generation.
        offspring: of them, scored per generation.
        screen: tokens to score each on.
        survivors: trials that race the incumbent per generation, at most.
        race_tokens: to race on.
        sensitivity_tokens: tokens that score every level of every layer.
        temperature: of the moves, in regrets of a typical layer's second best level.
        random: share of the moves that no price guides.
        prices: better ones than the sensitivities, such as of a refinement around the start:
            per layer, level -> nats/token up to a constant of each layer.
    """

    start: str | Strategy = "ilp"
    generations: int | None = 8
    tokens: int | None = None
    patience: int | None = 3
    pool: int = 250
    offspring: int = 6
    screen: int = 1024
    survivors: int = 2
    race_tokens: int = 8192
    sensitivity_tokens: int = 4096
    temperature: float = 1.0
    random: float = 0.1
    prices: Sensitivities | None = None

    def __post_init__(self) -> None:
        check_ends(generations=self.generations, tokens=self.tokens, patience=self.patience)
        counts = ("pool", "offspring", "screen", "survivors", "race_tokens", "sensitivity_tokens")
        for name in counts:
            check_setting(name, getattr(self, name), 1)
        check_setting("temperature", self.temperature, 1e-6)
        check_setting("random", self.random, 0, 1)
        if isinstance(self.start, str):
            find_strategy(self.start)

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        problem = metered(problem)
        record = Record(problem)
        problem = replace(problem, evaluate=record.evaluate)
        start = find_strategy(self.start)() if isinstance(self.start, str) else self.start
        for incumbent in start(problem, rng):
            yield incumbent
        gradients = GRADIENT * problem.fidelity(self.sensitivity_tokens).tokens
        if self._left(problem) >= gradients + problem.fidelity(self.race_tokens).tokens:
            yield from self.evolve(problem, record, incumbent, rng)

    def evolve(
        self, problem: Problem, record: Record, incumbent: Trial, rng: np.random.Generator
    ) -> Iterator[Trial]:
        """The incumbent after every generation.

        Args:
            problem: metered, evaluates through `record`; there are tokens for its sensitivities.
            record: what the model learns from, beside what it asks for.
        """
        last = problem.fidelity(self.race_tokens)
        if self.generations == 0 or self._left(problem) < last.tokens:
            return
        learner, draw = self._learner(problem, record)
        (incumbent,) = problem.evaluate([incumbent.allocation], last, incumbent.origin)
        idle = 0
        for generation in itertools.count(1):
            few = problem.fidelity(self.screen, generation)
            if generation - 1 == self.generations or idle == self.patience:
                return
            if self._left(problem) < (self.offspring + 1) * few.tokens + last.tokens:
                return
            parent = incumbent.allocation
            promising = learner.offspring(draw, parent, self.pool, self.offspring, few, rng)
            if not promising:  # nothing can move: every layer is as high as the budgets allow
                return
            problem.evaluate([parent, *promising], few, "surrogate")
            survivors = min(self.survivors, self._left(problem) // last.tokens)
            incumbent = self._race(problem, learner, incumbent, int(survivors))
            idle = idle + 1 if incumbent.allocation == parent else 0
            yield incumbent

    def _left(self, problem: Problem) -> float:
        return math.inf if self.tokens is None else self.tokens - problem.spent()

    def _race(self, problem: Problem, learner: Learner, incumbent: Trial, survivors: int) -> Trial:
        """The incumbent, or what beats it on the last windows and in the model's opinion."""
        hopeful = learner.hopeful(incumbent, survivors)
        if not hopeful:
            return incumbent
        contenders = [incumbent.allocation, *hopeful]
        best, *_ = race(problem, contenders, self.race_tokens, "surrogate")
        if best.loss < incumbent.loss and learner.prefers(best.allocation, incumbent.allocation):
            return best
        return incumbent

    def _learner(self, problem: Problem, record: Record) -> tuple[Learner, Offspring]:
        tokens = problem.fidelity(self.sensitivity_tokens).tokens
        grid, sensitivities = Grid.of(problem), problem.sensitivities(tokens).mean
        prices = grid.array(self.prices or sensitivities)
        basis = Basis.of(problem.space, prices, grid.array(sensitivities))
        moves = Moves.of(grid, prices, self.temperature)
        return Learner(grid, basis, record), Offspring.of(problem, grid, moves, self.random)
