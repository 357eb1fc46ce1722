"""Evolution: mutate the incumbent, select its successor in stages (EvoPress)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.core import Allocation, Problem, Strategy, Trial
from autocompress.errors import ConfigError
from autocompress.strategies import check_ends, check_setting, find_strategy
from autocompress.strategies.mutation import LevelSwitch, Mutation

if TYPE_CHECKING:
    import numpy as np

TRIES = 50  # draws per wanted offspring before the neighbourhood counts as exhausted


@dataclass(frozen=True)
class Evolution:
    """(1 + λ) evolution: the incumbent survives unless an offspring has a lower loss.

    All candidates of a stage see the same windows. Those of the early stages change with the
    generation (`g` draws them with seed `g`), so that luck on some of them does not last. The last
    stage always has the same: the incumbent's loss is known there, costs nothing, and never rises.
    (EvoPress draws them anew, as `anew` does. Measured on SmolLM2 from an ILP start, its 2,048 new
    tokens per generation let noise replace the incumbent, and the validation loss rose.)

    Args:
        start: a strategy or its name; its last incumbent is the first parent.
        generations: at most, 0 is the start alone; None leaves the end to `tokens` or `patience`.
        offspring: candidates per generation.
        stages: (survivors, tokens) each; fewer survivors and no fewer tokens from stage to stage,
            one survivor at the end. A stage that would keep everyone is left out; the incumbent
            takes part in the last stage only.
        tokens: to score in all, the start's evaluations included; None is no limit.
        patience: generations in a row without a better offspring; None is no limit.
        anew: the last stage draws its windows anew, too, and scores the incumbent on them.

    References:
        Sieberling et al., "EvoPress: Accurate Dynamic Model Compression via Evolutionary
        Search", arXiv 2410.14649, algorithm 1.
    """

    start: str | Strategy = "ilp"
    generations: int | None = 16
    offspring: int = 8
    stages: tuple[tuple[int, int], ...] = ((2, 1024), (1, 8192))
    tokens: int | None = None
    patience: int | None = None
    anew: bool = False

    def __post_init__(self) -> None:
        check_ends(generations=self.generations, tokens=self.tokens, patience=self.patience)
        check_setting("offspring", self.offspring, 1)
        _check_stages(self.stages)
        if isinstance(self.start, str):
            find_strategy(self.start)

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        start = find_strategy(self.start)() if isinstance(self.start, str) else self.start
        spent = idle = 0
        for parent in start(problem, rng):
            spent += parent.fidelity.tokens
            yield parent
        mutate, last = self._mutation(problem), problem.fidelity(self.stages[-1][1])
        if parent.fidelity != last and not self.anew:
            spent += last.tokens
            (parent,) = problem.evaluate([parent.allocation], last, parent.origin)
        for generation in itertools.count(1):
            spent += self._tokens_of_a_generation(problem)
            if self._is_over(generation, spent, idle):
                return
            offspring = self._offspring(mutate, parent.allocation, rng)
            if not offspring:  # nothing can move: every layer is as high as the budgets allow
                return
            winner = self._select(problem, parent, offspring, generation)
            idle = idle + 1 if winner.allocation == parent.allocation else 0
            parent = winner
            yield parent

    def _mutation(self, problem: Problem) -> Mutation:
        return LevelSwitch.of(problem)

    def _seed(self, generation: int, stage: int) -> int:
        """Picks a stage's windows; those of a stage are the first of the next, known already."""
        return generation

    def _is_over(self, generation: int, spent: int, idle: int) -> bool:
        return (
            (self.generations is not None and generation > self.generations)
            or (self.tokens is not None and spent > self.tokens)
            or (self.patience is not None and idle >= self.patience)
        )

    def _tokens_of_a_generation(self, problem: Problem) -> int:
        """Tokens that one generation scores when all offspring can be drawn."""
        *early, (_, tokens) = self.stages
        entrants, scored = self.offspring, 0
        for survivors, few in early:
            if entrants > survivors:
                scored += entrants * problem.fidelity(few).tokens
                entrants = survivors
        return scored + (entrants + self.anew) * problem.fidelity(tokens).tokens

    def _offspring(
        self, mutate: Mutation, parent: Allocation, rng: np.random.Generator
    ) -> list[Allocation]:
        """Different mutations of the parent; fewer than wanted where the space is small."""
        found: dict[Allocation, None] = {}
        for _ in range(TRIES * self.offspring):
            child = mutate(parent, rng)
            if child is not None and child != parent:
                found[child] = None
            if len(found) == self.offspring:
                break
        return list(found)

    def _select(
        self, problem: Problem, parent: Trial, offspring: list[Allocation], generation: int
    ) -> Trial:
        """The winner of all stages; the parent wins ties."""
        *early, (_, tokens) = self.stages
        for stage, (survivors, few) in enumerate(early):
            if len(offspring) > survivors:
                windows = problem.fidelity(few, self._seed(generation, stage))
                trials = problem.evaluate(offspring, windows, "evolution")
                best = sorted(trials, key=lambda trial: trial.loss)[:survivors]
                offspring = [trial.allocation for trial in best]
        last = problem.fidelity(tokens, self._seed(generation, len(early)) if self.anew else 0)
        if parent.fidelity != last:
            (parent,) = problem.evaluate([parent.allocation], last, parent.origin)
        finalists = problem.evaluate(offspring, last, "evolution")
        return min([parent, *finalists], key=lambda trial: trial.loss)


def _check_stages(stages: tuple[tuple[int, int], ...]) -> None:
    """Check the shape of a selection.

    Raises:
        ConfigError: survivors do not fall to 1, or tokens shrink.
    """
    survivors = [count for count, _ in stages]
    tokens = [1, *(count for _, count in stages)]
    falls = all(after <= before for before, after in itertools.pairwise(survivors))
    grows = all(after >= before for before, after in itertools.pairwise(tokens))
    if not (stages and falls and grows and survivors[-1] == 1):
        raise ConfigError(
            "stages must be (survivors, tokens) pairs with survivors falling to 1 and tokens "
            f"growing from stage to stage. Got {stages}."
        )
