"""Small spaces and losses that need no model: what the search tests play with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from hypothesis import strategies as st

from autocompress.core import (
    Allocation,
    Budget,
    CostTable,
    Fidelity,
    Layer,
    Problem,
    Score,
    SearchSpace,
    Trial,
)
from autocompress.cost import size_tables
from autocompress.levels import parse_level
from autocompress.predictions import Estimate, Linearization, Sensitivities

KEYS = ("w2g64", "w3g64", "w4g64", "w5g64", "w6g64")
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "mlp.up_proj": (192, 64),
    "mlp.down_proj": (64, 192),
}
SMOLLM2 = {  # of a block; the model has 30
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
WINDOW, TOKENS = 16, 256  # of the toy problems' search split
FEWER = {  # candidates, in place of dozens or thousands
    "bayesian": {"candidates": 14},
    "evopress": {"generations": 3, "offspring": 20},
    "spdy": {"candidates": 14},
    "surrogate": {"generations": 3, "pool": 40},
}


def toy_space(
    blocks: int = 3,
    keys: Sequence[str] = KEYS,
    pins: Sequence[int] = (),
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
) -> SearchSpace:
    """A transformer of `blocks` blocks; `pins` stay at the first level."""
    layers = tuple(
        Layer(name, (name,), (shape,))
        for name, shape in (
            (f"model.layers.{block}.{short}", shape)
            for block in range(blocks)
            for short, shape in shapes.items()
        )
    )
    levels = tuple(map(parse_level, keys))
    return SearchSpace(
        "toy", layers, tuple(levels[:1] if i in pins else levels for i in range(len(layers)))
    )


@st.composite
def spaces(draw: st.DrawFn, most_layers: int = 5) -> SearchSpace:
    """Ugly shapes, pinned layers, levels in any order."""
    keys = st.lists(
        st.sampled_from([*KEYS, "w4", "w8g32sym", "dense"]), min_size=1, max_size=4, unique=True
    )
    count = draw(st.integers(1, most_layers))
    shapes = st.tuples(st.integers(1, 70), st.integers(1, 200))
    layers = tuple(Layer(f"l.{i}", (f"l.{i}",), (draw(shapes),)) for i in range(count))
    return SearchSpace("drawn", layers, tuple(tuple(map(parse_level, draw(keys))) for _ in layers))


def toy_sensitivities(space: SearchSpace, seed: int = 0) -> Sensitivities:
    """Losses that fall fourfold with each bit, times a random weight of the layer."""
    rng = np.random.default_rng(seed)
    return tuple(
        {
            level: float(weight) * 4 ** -(layer.storage_bits(level) / layer.weights)
            for level in allowed
        }
        for layer, allowed, weight in zip(
            space.layers, space.levels, rng.lognormal(0, 1, len(space.layers)), strict=True
        )
    )


def toy_estimate(space: SearchSpace, seed: int = 0) -> Estimate:
    """Toy sensitivities with standard errors of a tenth."""
    mean = toy_sensitivities(space, seed)
    return Estimate(mean, tuple({k: 0.1 * v for k, v in row.items()} for row in mean))


def toy_linearization(space: SearchSpace, at: Allocation, seed: int = 0) -> Linearization:
    """Of `ToyLoss` without its noise, exactly: a quadratic form of the square roots."""
    parts = toy_sensitivities(space, seed)
    roots = [math.sqrt(row[level]) for row, level in zip(parts, at.levels, strict=True)]
    slopes, overlaps = [], []
    for i, (row, own) in enumerate(zip(parts, at.levels, strict=True)):
        beside = sum(roots[j] for j in (i - 1, i + 1) if 0 <= j < len(roots))
        slopes.append(
            {k: 0.25 * math.sqrt(v) * beside + (v if k == own else 0.0) for k, v in row.items()}
        )
        overlaps.append({k: float(k == own) for k in row})
    slope = Estimate(tuple(slopes), tuple(dict.fromkeys(row, 0.0) for row in slopes))
    return Linearization(slope, tuple(overlaps))


def random_table(space: SearchSpace, rng: np.random.Generator, name: str, high: int) -> CostTable:
    """Costs in any order of the levels: integers below `high`, or fractions where it is 1."""

    def draw() -> float:
        return int(rng.integers(high)) if high > 1 else float(rng.random())

    return CostTable(name, "ms", 0, tuple({it: draw() for it in row} for row in space.levels))


class ToyLoss:
    """Sensitivities that do not quite add up, plus noise that depends on the windows."""

    def __init__(self, space: SearchSpace, seed: int = 0) -> None:
        self.calls = 0
        self._parts = toy_sensitivities(space, seed)
        self._noise = 0.005

    def __call__(self, allocation: Allocation, fidelity: Fidelity, known: int = 0) -> Score:
        self.calls += 1
        parts = [part[level] for part, level in zip(self._parts, allocation.levels, strict=True)]
        pairs = sum(math.sqrt(a * b) for a, b in itertools.pairwise(parts))
        windows = np.arange(max(1, fidelity.tokens // WINDOW))
        digest = int(allocation.key[:8], 16) + 7919 * fidelity.seed
        noise = np.random.default_rng(digest).normal(size=len(windows)) * self._noise
        losses = ((sum(parts) + 0.5 * pairs) * np.exp(noise))[known:].tolist()
        return Score(tuple(losses), tuple(loss + 2.7 for loss in losses))


class Memory:
    """Evaluates without a study, and remembers every trial in order."""

    def __init__(self, space: SearchSpace, costs: Sequence[CostTable], seed: int = 0) -> None:
        self.trials: list[Trial] = []
        self._loss, self._costs = ToyLoss(space, seed), costs

    def __call__(
        self, allocations: Sequence[Allocation], fidelity: Fidelity, origin: str
    ) -> list[Trial]:
        found = []
        for allocation in allocations:
            score = self._loss(allocation, fidelity)
            costs = tuple(table.total(allocation) for table in self._costs)
            number = len(self.trials) + len(found)
            found.append(Trial(number, allocation, fidelity, score, costs, origin))
        self.trials += found
        return found


def toy_problem(
    space: SearchSpace,
    budgets: Sequence[Budget],
    costs: Sequence[CostTable] = (),
    evaluate: object = None,
    tokens: int = TOKENS,
) -> Problem:
    """A problem over `space`; without `evaluate`, trials are kept in a `Memory`."""
    tables = tuple(costs) or size_tables(space, 1000)
    return Problem(
        space=space,
        costs=tables,
        budgets=tuple(budgets),
        evaluate=evaluate or Memory(space, tables),  # type: ignore[arg-type]
        sensitivities=lambda _: toy_estimate(space),
        linearize=lambda at, tokens, before: toy_linearization(space, at),
        window=WINDOW,
        tokens=tokens,
    )
