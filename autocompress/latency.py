"""Latency as a cost table: what every level of every layer takes at a target, and what it leaves
out: levels that have no kernel there, or that are slower than a denser one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autocompress.core import CostTable, Layer, SearchSpace
from autocompress.cost import LATENCY
from autocompress.errors import LatencyError
from autocompress.latency_store import LatencyStore, ModelPart, Point, Timing
from autocompress.levels import Drop, Level, Shape
from autocompress.targets import Target

SLOWER = 1.02  # less than that beyond the intervals is no reason to leave a level out


@dataclass(frozen=True, slots=True)
class Use:
    """How a pass of the model calls a module.

    Args:
        phase: 'decode' or 'prefill'.
        share: calls per pass; below 1 for experts that not every token reaches.
        rows: of the input.
    """

    phase: str
    share: float
    rows: int


Uses = Mapping[str, tuple[Use, ...]]  # module -> uses; none for a look-up
Backends = Mapping[tuple[Level, Shape], str]  # backend, or '' with the reason elsewhere


@dataclass(frozen=True, slots=True)
class Part:
    """One call of a layer: a module, or several that the runtime fuses."""

    shape: Shape
    uses: tuple[Use, ...]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A level that a layer cannot or should not take at a target.

    Args:
        layers: names of all layers that this is said of; they have the same shapes.
        level: that is left out.
        reason: 'no kernel: …' or 'slower than …'.
    """

    layers: tuple[str, ...]
    level: Level
    reason: str


@dataclass(frozen=True)
class Prices:
    """What each level of each layer takes, ms per token: the middle and the interval's ends.

    Args:
        parts: per layer, its calls.
        middle: per layer, level -> price; infinite where no kernel is.
        low: the same at the interval's lower end.
        high: and at its upper end.
        reasons: (level, shape) -> why it has no kernel.
    """

    parts: tuple[tuple[Part, ...], ...]
    middle: tuple[dict[Level, float], ...]
    low: tuple[dict[Level, float], ...]
    high: tuple[dict[Level, float], ...]
    reasons: Mapping[tuple[Level, Shape], str]


def layer_parts(layer: Layer, uses: Uses) -> tuple[Part, ...]:
    """The calls of a layer; modules of one parent that read one input are fused into one."""
    fused: dict[tuple[str, int, tuple[Use, ...]], int] = {}
    for module, (rows, width) in zip(layer.modules, layer.shapes, strict=True):
        key = (module.rpartition(".")[0], width, uses.get(module, ()))
        fused[key] = fused.get(key, 0) + rows
    return tuple(Part((rows, width), used) for (_, width, used), rows in fused.items() if used)


def needed_points(
    space: SearchSpace, uses: Uses, target: Target, backends: Backends
) -> dict[tuple[Shape, int], dict[Point, Level]]:
    """What must be timed: (shape, rows) -> points of every level that has a kernel."""
    found: dict[tuple[Shape, int], dict[Point, Level]] = {}
    for layer, allowed in zip(space.layers, space.levels, strict=True):
        for part in layer_parts(layer, uses):
            for use in part.uses:
                row = found.setdefault((part.shape, use.rows), {})
                for level in allowed:
                    if isinstance(level, Drop):  # takes no time
                        continue
                    if name := backends.get((level, part.shape)):
                        row[Point(name, str(level), part.shape, use.rows, target.mode)] = level
    return found


def layer_prices(
    space: SearchSpace,
    uses: Uses,
    target: Target,
    backends: Backends,
    reasons: Mapping[tuple[Level, Shape], str],
    store: LatencyStore,
) -> Prices:
    """Prices from a store's timings.

    Raises:
        LatencyError: the store lacks a timing.
    """
    parts = tuple(layer_parts(layer, uses) for layer in space.layers)
    columns: tuple[list[dict[Level, float]], ...] = ([], [], [])
    for calls, allowed in zip(parts, space.levels, strict=True):
        rows: tuple[dict[Level, float], ...] = ({}, {}, {})
        for level in allowed:
            total = [0.0, 0.0, 0.0]
            for part in () if isinstance(level, Drop) else calls:
                name = backends.get((level, part.shape))
                for use in part.uses:
                    for end, us in enumerate(_ends(store, name, level, part.shape, use, target)):
                        total[end] += target.weigh(use.phase, use.share * us / 1e3)
            for row, value in zip(rows, total, strict=True):
                row[level] = value
        for column, row in zip(columns, rows, strict=True):
            column.append(row)
    low, middle, high = map(tuple, columns)
    return Prices(parts, middle, low, high, reasons)


def _ends(
    store: LatencyStore,
    backend: str | None,
    level: Level,
    shape: Shape,
    use: Use,
    target: Target,
) -> tuple[float, float, float]:
    """Low, middle and high µs of one call; infinite without a kernel."""
    if not backend:
        return math.inf, math.inf, math.inf
    key = Point(backend, str(level), shape, use.rows, target.mode).key
    timing: Timing | None = store.timings.get(key)
    if timing is None:
        raise LatencyError(
            f"a latency store must hold every level of the space. Got '{store.path}' without "
            f"'{key}'. Measure it on that machine: autocompress profile --space … --export FILE."
        )
    unit = timing.us / timing.ratio
    if timing.noisy:  # an interval from a busy machine proves nothing
        return 0.0, timing.us, math.inf
    return timing.low * unit, timing.us, timing.high * unit


def latency_table(space: SearchSpace, prices: Prices, part: ModelPart) -> CostTable:
    """Predicted ms per token: the fixed part and what every level adds, calibrated."""
    factor = part.calibration
    entries = tuple(
        {level: factor * part.scale * ms for level, ms in row.items()} for row in prices.middle
    )
    return CostTable(LATENCY, "ms", factor * part.fixed_ms, entries)


def scaled(table: CostTable, factor: float) -> CostTable:
    """The table with every cost times `factor`."""
    entries = tuple({level: factor * cost for level, cost in row.items()} for row in table.entries)
    return replace(table, base=factor * table.base, entries=entries)


def find_dropped(space: SearchSpace, prices: Prices) -> tuple[Dropped, ...]:
    """Levels without a kernel, and levels whose interval lies above that of a denser level."""
    found: dict[tuple[Level, str, tuple[Part, ...]], list[str]] = {}
    for index, (layer, allowed) in enumerate(zip(space.layers, space.levels, strict=True)):
        for level in allowed:
            reason = _reason(layer, index, level, allowed, prices)
            if reason:
                found.setdefault((level, reason, prices.parts[index]), []).append(layer.name)
    return tuple(
        Dropped(tuple(names), level, reason) for (level, reason, _), names in found.items()
    )


def _reason(
    layer: Layer, index: int, level: Level, allowed: Sequence[Level], prices: Prices
) -> str | None:
    """Why a layer should not take a level."""
    middle, low, high = (row[index] for row in (prices.middle, prices.low, prices.high))
    if math.isinf(middle[level]):
        shapes = (part.shape for part in prices.parts[index])
        known = (prices.reasons.get((level, shape)) for shape in shapes)
        return f"no kernel: {next(filter(None, known), 'the target has no price for it')}"
    bits = layer.storage_bits(level)
    denser = [it for it in allowed if layer.storage_bits(it) > bits and high[it] > 0]
    faster = [it for it in denser if low[level] > high[it] and middle[level] > SLOWER * middle[it]]
    if not faster:
        return None
    best = min(faster, key=middle.__getitem__)
    return (
        f"slower than the denser {best}: {1e3 * middle[level]:.1f} µs per token "
        f"instead of {1e3 * middle[best]:.1f}"
    )


def restrict(space: SearchSpace, dropped: Sequence[Dropped]) -> SearchSpace:
    """The space without what was dropped.

    Raises:
        LatencyError: a layer keeps no level; says why.
    """
    out: dict[str, dict[Level, str]] = {}
    for entry in dropped:
        for name in entry.layers:
            out.setdefault(name, {})[entry.level] = entry.reason
    levels = []
    for layer, allowed in zip(space.layers, space.levels, strict=True):
        kept = tuple(level for level in allowed if level not in out.get(layer.name, {}))
        if not kept:
            first = allowed[0]
            raise LatencyError(
                f"every layer must have a level that runs at the target. Got none for "
                f"'{layer.name}'; {first}: {out[layer.name][first]}. Choose another space or "
                "target."
            )
        levels.append(kept)
    return replace(space, levels=tuple(levels))
