"""The types every part shares. Standard library only; all values are frozen and hashable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from autocompress.errors import SpaceError
from autocompress.layers import Layer as Layer
from autocompress.levels import Drop, Level
from autocompress.predictions import Estimate, Linearization
from autocompress.scores import Score as Score  # every part finds the types that all share here

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Allocation:
    """One level per layer, aligned with the space's layers: the genome and the cache key."""

    levels: tuple[Level, ...]

    @property
    def keeps_some(self) -> bool:
        """Whether anything of the layers is left."""
        return not all(isinstance(level, Drop) for level in self.levels)

    def swap(self, index: int, level: Level) -> Allocation:
        """A copy with layer `index` at `level`."""
        return Allocation((*self.levels[:index], level, *self.levels[index + 1 :]))

    @cached_property
    def key(self) -> str:
        """Hex digest that names this allocation on disk (128 bits)."""
        return hashlib.sha256("\n".join(map(str, self.levels)).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class SearchSpace:
    """The layers and the levels each may take: the only definition of legality.

    >>> from autocompress.levels import Quantize
    >>> levels = Quantize(2, 64), Quantize(4, 64)
    >>> space = SearchSpace("toy", (Layer("head", ("head",), ((512, 64),)),), (levels,))
    >>> space.uniform(levels[1]) in space, Allocation((Quantize(8),)) in space
    (True, False)
    """

    name: str
    layers: tuple[Layer, ...]
    levels: tuple[tuple[Level, ...], ...]  # per layer, in file order, no duplicates

    @classmethod
    def from_toml(cls, path: str | Path, model: str | None = None) -> SearchSpace:
        """The space that a TOML file describes, over the layers of a model.

        Args:
            path: the file, or the name of a built-in space.
            model: folder, GGUF file or Hub id; None is the default model.

        Raises:
            AutocompressError: no such file or model, or a space that does not fit the model.
        """
        # By name: models stand above this module, and only a script may ask it for one.
        found: SearchSpace = import_module("autocompress.session").model_space(str(path), model)
        return found

    def __contains__(self, allocation: Allocation) -> bool:
        return (
            len(allocation.levels) == len(self.layers)
            and all(
                level in allowed
                for level, allowed in zip(allocation.levels, self.levels, strict=True)
            )
            and allocation.keeps_some
        )

    @property
    def weights(self) -> int:
        """Dense parameters in scope: the denominator of effective bits."""
        return sum(layer.weights for layer in self.layers)

    def all_levels(self) -> tuple[Level, ...]:
        """Every level some layer may take, in first-seen order."""
        return tuple(dict.fromkeys(level for allowed in self.levels for level in allowed))

    def uniform_levels(self) -> tuple[Level, ...]:
        """The levels that every layer with a choice may take, but not to drop all of them."""
        free = [allowed for allowed in self.levels if len(allowed) > 1]
        return tuple(
            level
            for level in self.all_levels()
            if not isinstance(level, Drop) and all(level in allowed for allowed in free)
        )

    def uniform(self, level: Level) -> Allocation:
        """`level` on every layer with a choice; pinned layers keep their only level.

        Raises:
            SpaceError: a layer with a choice cannot take `level`.
        """
        for layer, allowed in zip(self.layers, self.levels, strict=True):
            if level not in allowed and len(allowed) > 1:
                raise SpaceError(
                    f"a uniform level must be allowed on every free layer. Got {level}, which "
                    f"'{layer.name}' cannot take ({', '.join(map(str, allowed))})."
                )
        return Allocation(
            tuple(level if level in allowed else allowed[0] for allowed in self.levels)
        )

    def module_levels(self, allocation: Allocation) -> dict[str, Level]:
        """What each module stores: module -> level."""
        return {
            name: own
            for layer, level in zip(self.layers, allocation.levels, strict=True)
            for name, own in zip(layer.modules, layer.module_levels(level), strict=True)
        }

    def neighbours(self, allocation: Allocation, index: int) -> tuple[Level, ...]:
        """The other levels layer `index` may take."""
        return tuple(level for level in self.levels[index] if level != allocation.levels[index])


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Which tokens an evaluation saw; only losses of one fidelity are comparable.

    Args:
        tokens: number of tokens, whole windows.
        seed: picks the windows out of the split.
        split: 'search', 'validate' or 'test'.
        every: one in so many positions of a window is scored, 1 to the window's tokens. The
            others are read all the same, so they count as tokens; they only spare the head.
    """

    tokens: int
    seed: int = 0
    split: str = "search"
    every: int = 1

    @property
    def positions(self) -> slice:
        """What is scored of a window: the middle of each `every` positions."""
        return slice((self.every - 1) // 2, None, self.every)


@dataclass(frozen=True)
class CostTable:
    """An additive cost: `base + sum(entries[i][level])`.

    Sizes are integers, so sums are exact and a limit is never exceeded by one bit.

    Args:
        name: what budgets refer to ('bits', 'bytes', ...).
        unit: of `base` and `entries`.
        base: cost of everything outside the space.
        entries: per layer, level -> cost.
    """

    name: str
    unit: str
    base: float
    entries: tuple[Mapping[Level, float], ...]

    def total(self, allocation: Allocation) -> float:
        """Cost of a whole allocation, in `unit`."""
        return self.base + sum(
            entry[level] for entry, level in zip(self.entries, allocation.levels, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Budget:
    """An upper limit on one named cost, in that table's unit.

    Args:
        cost: name of the cost table.
        limit: inclusive, in the table's unit.
        text: as the user wrote it ('3.5bits').
    """

    cost: str
    limit: float
    text: str


@dataclass(frozen=True, slots=True)
class Trial:
    """One finished evaluation.

    Args:
        number: position in the study.
        costs: aligned with `Problem.costs`.
        origin: who proposed it ('uniform w3g64', 'ilp', 'evolution').
    """

    number: int
    allocation: Allocation
    fidelity: Fidelity
    score: Score
    costs: tuple[float, ...]
    origin: str

    @property
    def loss(self) -> float:
        """Mean KL(dense || candidate), nats/token; lower is better."""
        return self.score.loss

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood on the same tokens."""
        return self.score.perplexity

    @property
    def stderr(self) -> float:
        """Standard error of `loss` over windows, nats/token."""
        return self.score.stderr


Evaluate = Callable[[Sequence[Allocation], Fidelity, str], list[Trial]]  # (…, origin)
Linearize = Callable[[Allocation, int, int], Linearization]  # (…, tokens, tokens before them)

GRADIENT = 3  # tokens that one token counts for in a gradient pass: forwards, backwards, weights


@dataclass(frozen=True)
class Problem:
    """What a strategy sees: numbers only, never a model.

    Args:
        evaluate: (allocations, fidelity, origin) -> trials, answered from the study when known.
        sensitivities: number of tokens -> predicted loss increase of each (layer, level).
        linearize: (allocation, number of tokens, of those before them) -> the loss around it, on
            search windows in the order of the run's seed; behind the last comes the first.
        window: tokens per window; fidelities are multiples of it.
        tokens: size of the search split.
        spent: tokens that the strategy has asked for so far, each once; see `metered`.
        influence: number of tokens -> how far each layer's block moves the hidden states, 1 less
            the cosine of what it gets and returns; () where nothing measures it.
    """

    space: SearchSpace
    costs: tuple[CostTable, ...]
    budgets: tuple[Budget, ...]
    evaluate: Evaluate
    sensitivities: Callable[[int], Estimate]
    linearize: Linearize
    window: int
    tokens: int
    spent: Callable[[], int] = lambda: 0
    influence: Callable[[int], Sequence[float]] = lambda tokens: ()

    def table(self, name: str) -> CostTable:
        """The cost table called `name`."""
        return next(table for table in self.costs if table.name == name)

    def fits(self, allocation: Allocation) -> bool:
        """Whether the allocation meets every budget."""
        return all(self.table(b.cost).total(allocation) <= b.limit for b in self.budgets)

    def fidelity(self, tokens: int, seed: int = 0, every: int = 1) -> Fidelity:
        """Whole windows of at most `tokens` tokens of the search split, one at least.

        All windows are the same windows under any seed, so the whole split has seed 0.
        """
        windows, available = max(1, tokens // self.window), max(1, self.tokens // self.window)
        if windows >= available:
            return Fidelity(available * self.window, every=every)
        return Fidelity(windows * self.window, seed, every=every)


class Strategy(Protocol):
    """A search algorithm: settings are fields, run state is local variables."""

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        """Yield the incumbent after every step."""
