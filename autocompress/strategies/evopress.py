"""EvoPress as its authors run it: the reference that every other search must beat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from autocompress.core import Allocation, Problem, Strategy, Trial
from autocompress.strategies import check_setting
from autocompress.strategies.evolution import Evolution
from autocompress.strategies.mutation import Ladder, LevelSwitch, Mutation, draw_switches, pick
from autocompress.strategies.uniform import nearest_uniform, uniform_origin

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class EqualSwitch:
    """The authors' mutation: one layer down and one up, both out of a group of equal layers.

    One to three times, the smaller of two draws: a layer by chance decides the group; one of its
    layers that has a lower level and one that has a higher one, drawn before either moves, go
    there. Both may be the same layer, which then stays.

    Args:
        groups: per layer, the layers whose levels cost what its own cost, itself included.
        up: per layer, level -> the next in rank of the first budget's cost.
        down: likewise, the one before.
    """

    problem: Problem
    groups: tuple[tuple[int, ...], ...]
    up: tuple[Ladder, ...]
    down: tuple[Ladder, ...]

    @classmethod
    def of(cls, problem: Problem) -> Self:
        """The mutation of `problem`."""
        names = [budget.cost for budget in problem.budgets] or [problem.costs[0].name]
        tables = [problem.table(name) for name in names]
        rows = [
            tuple((level, *(table.entries[layer][level] for table in tables)) for level in allowed)
            for layer, allowed in enumerate(problem.space.levels)
        ]
        members: dict[object, list[int]] = {}
        for layer, row in enumerate(rows):
            members.setdefault(row, []).append(layer)
        groups, up = tuple(tuple(members[row]) for row in rows), LevelSwitch.of(problem).up
        down = tuple({above: level for level, above in ladder.items()} for ladder in up)
        return cls(problem, groups, up, down)

    def __call__(self, parent: Allocation, rng: np.random.Generator) -> Allocation | None:
        """A changed copy within every budget, or None when this draw leads to none."""
        levels = list(parent.levels)
        for _ in range(draw_switches(rng)):
            group = self.groups[int(rng.integers(len(levels)))]
            lower = [layer for layer in group if levels[layer] in self.down[layer]]
            higher = [layer for layer in group if levels[layer] in self.up[layer]]
            if not lower or not higher:
                return None
            lowered, raised = pick(lower, rng), pick(higher, rng)
            levels[lowered] = self.down[lowered][levels[lowered]]
            levels[raised] = self.up[raised][levels[raised]]
        child = Allocation(tuple(levels))
        return child if self.problem.fits(child) else None


@dataclass(frozen=True)
class RoundedUp:
    """The authors' start: the uniform allocation, or the best of random ones between two levels.

    Where the nearest uniform allocation leaves room to raise a layer, candidates start from the
    next uniform level, which is over the budget, and lower one layer after the other by chance
    until it holds.

    Args:
        candidates: drawn and scored.
        tokens: to score each on; whole windows, at most the search split.
    """

    candidates: int = 16
    tokens: int = 8192

    def __post_init__(self) -> None:
        check_setting("candidates", self.candidates, 1)
        check_setting("tokens", self.tokens, 1)

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        uniform, switch = nearest_uniform(problem), LevelSwitch.of(problem)
        above = _next_uniform(problem, uniform)
        found = [uniform]
        if above is not None and _has_room(problem, switch, uniform):
            drawn = [switch.lowered(above, rng) for _ in range(self.candidates)]
            found = [it for it in drawn if it is not None] or found
        origin = uniform_origin(problem, uniform) if found == [uniform] else "evopress"
        trials = problem.evaluate(found, problem.fidelity(self.tokens), origin)
        yield min(trials, key=lambda trial: trial.loss)


@dataclass(frozen=True)
class EvoPress(Evolution):
    """Evolution as the authors' `evo_quant_search.py` does it, with its example's settings.

    Like theirs: the mutation (`EqualSwitch`), no offspring twice and never the parent; every
    stage draws windows of its own, of exactly its tokens; the parent joins the last stage and is
    scored there with everyone else; the best of it is the next parent. A generation scores
    1,179,648 tokens.

    Unlike theirs, on purpose: layers are equal when their levels cost the same in every budget,
    and not when they have as many weights, because budgets count scales and zeros. Where steps
    between levels differ in cost, an offspring that is over a budget is drawn again; theirs have
    one step. A group where nothing can move is drawn again; theirs stops with an error. A stage
    that would keep everyone is left out, and ties keep the parent. The start is scored, because a
    strategy yields what it measured. The loss is that of every strategy here, from the likeliest
    tokens and the tail, not all logits. Stages that ask for more tokens than the search split has
    take all of it, and windows are this project's, not 8,192 tokens long.
    """

    start: str | Strategy = RoundedUp()
    generations: int | None = 150
    offspring: int = 128
    stages: tuple[tuple[int, int], ...] = ((16, 2048), (4, 16384), (1, 131072))
    anew: bool = True

    def _mutation(self, problem: Problem) -> Mutation:
        return EqualSwitch.of(problem)

    def _seed(self, generation: int, stage: int) -> int:
        """Every stage has windows of its own."""
        return generation * len(self.stages) + stage


def _next_uniform(problem: Problem, uniform: Allocation) -> Allocation | None:
    """The cheapest uniform allocation that costs more than `uniform`, by the first budget."""
    if not problem.budgets:
        return None
    table, space = problem.table(problem.budgets[0].cost), problem.space
    every = [space.uniform(level) for level in space.uniform_levels()]
    above = [it for it in every if table.total(it) > table.total(uniform)]
    return min(above, key=table.total, default=None)


def _has_room(problem: Problem, switch: LevelSwitch, allocation: Allocation) -> bool:
    """Whether some layer can be raised by a level within every budget."""
    return any(
        level in switch.up[layer] and problem.fits(allocation.swap(layer, switch.up[layer][level]))
        for layer, level in enumerate(allocation.levels)
    )
