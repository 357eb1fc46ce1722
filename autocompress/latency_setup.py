"""Prices a model's search space at a target: from a store, or measured here and kept in one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from autocompress.core import Allocation, CostTable, SearchSpace
from autocompress.errors import LatencyError
from autocompress.files import fingerprint
from autocompress.latency import (
    Backends,
    Dropped,
    Uses,
    find_dropped,
    latency_table,
    layer_parts,
    layer_prices,
    needed_points,
    restrict,
)
from autocompress.latency_cases import available_versions, torch_threads
from autocompress.latency_local import local_backends, measure_part, profile_kernels
from autocompress.latency_model import Source, find_uses, packed_model
from autocompress.latency_store import LatencyStore, ModelPart, Point
from autocompress.latency_timing import Measured, Stopwatch, time_models
from autocompress.levels import Level, Shape
from autocompress.machine import hardware_identity
from autocompress.models import LoadedModel
from autocompress.profiler import Clocks, Effort
from autocompress.progress import Progress
from autocompress.targets import Target, checked_table, find_target

CALIBRATIONS = (0.5, 2.0)  # measured / predicted; beyond, a machine was busy or a model too tiny
LEAST_MARGIN, MOST_MARGIN = 0.01, 0.05  # of a latency limit that the search leaves unused


@dataclass
class Latency:
    """What a search knows of a target.

    Args:
        target: with its threads filled in where they are known.
        table: predicted ms per token of every level of the whole space.
        dropped: levels to leave out, with reasons.
        part: of the model; None where a registered function prices everything.
        store: where the timings are; None likewise.
        key: of the model's part in the store.
        points: timings of the space, as rows of the report.
    """

    target: Target
    table: CostTable
    dropped: tuple[Dropped, ...]
    part: ModelPart | None = None
    store: LatencyStore | None = None
    key: str = ""
    points: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dense_ms(self) -> float | None:
        """Latency of the dense model in bf16, ms per token."""
        return None if self.part is None else self.part.dense_ms

    @property
    def margin(self) -> float:
        """Share of a limit that stays unused, because predictions and timings scatter."""
        spread = 0.0 if self.part is None else self.part.spread
        return min(max(spread, LEAST_MARGIN), MOST_MARGIN)

    def measure(
        self,
        model: Any,
        space: SearchSpace,
        allocations: Sequence[Allocation],
        source: Source,
        progress: Progress,
    ) -> list[Measured]:
        """Latency of whole packed models, timed in interleaved rounds on this machine.

        Args:
            model: dense.
            source: of packed weights.
        """
        with torch_threads(self.target.threads), progress.task("latency of finalists") as advance:
            models = (
                packed_model(model, space.module_levels(it), source, self.target)
                for it in allocations
            )
            return time_models([Stopwatch(one, self.target) for one in models], advance)

    def calibrate(self, pairs: Sequence[tuple[float, float]]) -> None:
        """Keep measured / predicted for later searches of this model.

        Args:
            pairs: (predicted, measured) ms per token; predicted by this object's table.
        """
        if self.store is not None and self.part is not None:
            factors = [measured / predicted for predicted, measured in pairs if predicted > 0]
            factor = self.part.calibration * (median(factors) if factors else 1.0)
            if CALIBRATIONS[0] <= factor <= CALIBRATIONS[1]:
                self.store.models[self.key] = replace(self.part, calibration=factor)
                self.store.save()

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        part = None if self.part is None else asdict(self.part)
        return {
            "target": asdict(self.target),
            "use": self.target.describe(),
            "machine": None if self.store is None else self.store.identity,
            "model": part,
            "margin": self.margin,
            "dropped": [
                {"layers": list(it.layers), "level": str(it.level), "reason": it.reason}
                for it in self.dropped
            ],
            "points": self.points,
        }


def price(
    loaded: LoadedModel,
    space: SearchSpace,
    target: Target,
    progress: Progress,
    *,
    effort: Effort | None = None,
    clocks: Clocks | None = None,
    again: bool = False,
    fresh: bool = False,
) -> Latency:
    """The latency of a model's space at a target.

    Args:
        loaded: the dense model, which is run to see how often each layer is called.
        effort: of the profiler.
        clocks: what the profiler reads time from.
        again: measure what the local store knows already, too.
        fresh: time the model around the kernels, even where that is known: the speed of machines
            drifts, and what a search finds is timed now.

    Raises:
        LatencyError: no such target, a store that does not fit or lacks this model, or a layer
            without any level that runs there.
    """
    found = find_target(target.name)
    if callable(found):
        table = checked_table(found(space, target), space, target.name)
        return Latency(target, table, _infinite(space, table))
    uses = find_uses(loaded.model, space, target)
    key = _model_key(loaded, space, target)
    if isinstance(found, Path):
        store, target = _remote(found, target, key)
        backends, reasons = _stored_backends(space, uses, target, store)
    else:
        store = local_store(target, loaded.model.dtype)
        if again:
            store.timings, store.models = {}, {}
        backends, reasons = local_backends(space, uses, target)
        with torch_threads(target.threads) as threads:
            target = replace(target, threads=threads)
            profile_kernels(loaded, space, uses, target, backends, store, progress, effort, clocks)
    prices = layer_prices(space, uses, target, backends, reasons, store)
    dropped = find_dropped(space, prices)
    restrict(space, dropped)  # every layer must keep a level
    if key not in store.models or (fresh and not isinstance(found, Path)):
        with torch_threads(target.threads):
            store.models[key] = measure_part(loaded, space, target, prices.middle, progress)
        store.save()
    part = store.models[key]
    points = _rows(space, uses, target, backends, store, dropped)
    table = latency_table(space, prices, part)
    return Latency(target, table, dropped, part, store, key, points)


def local_store(target: Target, dtype: torch.dtype) -> LatencyStore:
    """The store of this machine for a target's threads and runtime.

    Raises:
        LatencyError: more threads than cores, or its file is damaged or another machine's.
    """
    cores = os.cpu_count() or 1
    if target.threads is not None and target.threads > cores:
        raise LatencyError(
            f"threads must be at most the {cores} cores of this machine. Got {target.threads}."
        )
    with torch_threads(target.threads) as threads:
        versions = available_versions(target.runtime)
    return LatencyStore.open(hardware_identity(threads, versions, dtype))


def _infinite(space: SearchSpace, table: CostTable) -> tuple[Dropped, ...]:
    """Levels that a registered function says cannot run."""
    return tuple(
        Dropped((layer.name,), level, "no kernel: the target prices it at infinity")
        for layer, allowed, entry in zip(space.layers, space.levels, table.entries, strict=True)
        for level in allowed
        if entry[level] == float("inf")
    )


def _model_key(loaded: LoadedModel, space: SearchSpace, target: Target) -> str:
    """What a model's latency depends on beside the machine: its layers in scope and its use."""
    use = {k: v for k, v in asdict(target).items() if k not in ("name", "threads")}
    modules = [list(layer.modules) for layer in space.layers]
    return fingerprint([loaded.fingerprint, modules, use])


def _remote(path: Path, target: Target, key: str) -> tuple[LatencyStore, Target]:
    """A store of another machine, and the target with its threads.

    Raises:
        LatencyError: it is damaged, was measured with other threads than asked for, or without
            this model.
    """
    store = LatencyStore.read(path)
    threads = store.identity.get("threads")
    if target.threads not in (None, threads):
        raise LatencyError(
            f"threads must be those of the latency store, {threads}. Got {target.threads}. "
            "Leave --threads out."
        )
    if key not in store.models:
        raise LatencyError(
            f"a latency store must hold the latency of this model for {target.describe()}. "
            f"Got '{path}' without. On that machine: autocompress profile --export FILE."
        )
    return store, replace(target, threads=threads)


def _stored_backends(
    space: SearchSpace, uses: Uses, target: Target, store: LatencyStore
) -> tuple[Backends, dict[tuple[Level, Shape], str]]:
    """Which backend another machine timed each (level, shape) on."""
    found: dict[tuple[Level, Shape], str] = {}
    reasons: dict[tuple[Level, Shape], str] = {}
    for layer, allowed in zip(space.layers, space.levels, strict=True):
        for part in layer_parts(layer, uses):
            for level in allowed:
                names = [
                    name
                    for name in target.runtime
                    if all(
                        Point(name, str(level), part.shape, use.rows, target.mode).key
                        in store.timings
                        for use in part.uses
                    )
                ]
                if names:
                    found[level, part.shape] = names[0]
                else:
                    reasons[level, part.shape] = f"'{store.path}' holds no timing of it"
    return found, reasons


def _rows(
    space: SearchSpace,
    uses: Uses,
    target: Target,
    backends: Backends,
    store: LatencyStore,
    dropped: Sequence[Dropped],
) -> list[dict[str, Any]]:
    """Timings as rows of a table: shape, rows, level, backend, figures, why it is left out."""
    shapes = {layer.name: layer_parts(layer, uses) for layer in space.layers}
    reasons = {(part.shape, it.level): it.reason for it in dropped for part in shapes[it.layers[0]]}
    return [
        {
            "shape": list(shape),
            "rows": rows,
            "level": str(level),
            "backend": point.backend,
            **asdict(store.timings[point.key]),
            "gb_per_s": store.timings[point.key].gb_per_s,
            "dropped": reasons.get((shape, level)),
        }
        for (shape, rows), points in needed_points(space, uses, target, backends).items()
        for point, level in points.items()
    ]
