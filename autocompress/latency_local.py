"""Measures what a target on this machine takes: every kernel once, then the model around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from autocompress.backends import BACKENDS
from autocompress.core import SearchSpace
from autocompress.latency import Backends, Uses, layer_parts, needed_points
from autocompress.latency_cases import (
    MEMORY,
    KernelCase,
    find_backend,
    make_case,
    reference_case,
    room_for,
)
from autocompress.latency_model import (
    dense_bfloat16,
    fit_part,
    packed_model,
    random_source,
    reference_allocations,
)
from autocompress.latency_store import LatencyStore, ModelPart, Point
from autocompress.latency_timing import Stopwatch, time_models
from autocompress.levels import Level, Shape
from autocompress.models import LoadedModel
from autocompress.profiler import Clocks, Effort, measure
from autocompress.progress import Advance, Progress
from autocompress.targets import Target


def local_backends(
    space: SearchSpace, uses: Uses, target: Target
) -> tuple[Backends, dict[tuple[Level, Shape], str]]:
    """Which backend runs each (level, shape) here, or why none does."""
    found: dict[tuple[Level, Shape], str] = {}
    reasons: dict[tuple[Level, Shape], str] = {}
    for layer, allowed in zip(space.layers, space.levels, strict=True):
        for part in layer_parts(layer, uses):
            for level in allowed:
                if (level, part.shape) in found or (level, part.shape) in reasons:
                    continue
                backend = find_backend(level, part.shape, target)
                if isinstance(backend, str):
                    reasons[level, part.shape] = backend
                else:
                    found[level, part.shape] = backend.name
    return found, reasons


def profile_kernels(
    loaded: LoadedModel,
    space: SearchSpace,
    uses: Uses,
    target: Target,
    backends: Backends,
    store: LatencyStore,
    progress: Progress,
    effort: Effort | None,
    clocks: Clocks | None,
) -> None:
    """Time what the store lacks, one shape after the other; each is kept as soon as it is there."""
    needed = needed_points(space, uses, target, backends)
    missing = {
        group: [(point, level) for point, level in row.items() if point.key not in store.timings]
        for group, row in needed.items()
    }
    total, done = sum(map(len, missing.values())), 0
    with progress.task("kernel latencies") as advance:
        for points in missing.values():
            for start in range(0, len(points), room_for()):
                batch = points[start : start + room_for()]
                found = measure(
                    *_cases(loaded, target, batch),
                    threads=target.threads or 1,
                    effort=effort,
                    clocks=clocks,
                    advance=_after(done, total, advance),
                )
                store.timings |= {point.key: timing for point, timing in found.items()}
                store.save()
                done += len(batch)


def _cases(
    loaded: LoadedModel, target: Target, points: Sequence[tuple[Point, Level]]
) -> tuple[KernelCase, list[KernelCase]]:
    """The reference and the cases of points of one shape and number of rows."""
    (shape, rows), *_ = ((point.shape, point.rows) for point, _ in points)
    room = min(MEMORY // (len(points) + 1), 2 * loaded.parameters)
    cases = [
        make_case(BACKENDS[point.backend], level, shape, rows, target, loaded.model.dtype, room)
        for point, level in points
    ]
    return reference_case(shape, rows, target, room), cases


def _after(before: int, total: int, advance: Advance) -> Advance:
    """Progress of a batch as progress of all."""
    return lambda done, _: advance(before + done, total)


def measure_part(
    loaded: LoadedModel,
    space: SearchSpace,
    target: Target,
    prices: Sequence[Mapping[Level, float]],
    progress: Progress,
) -> ModelPart:
    """Time reference allocations of random weights and the dense model beside them."""
    finite = replace(
        space,
        levels=tuple(
            tuple(level for level in allowed if row[level] < float("inf"))
            for allowed, row in zip(space.levels, prices, strict=True)
        ),
    )
    references = reference_allocations(finite)
    source = random_source(loaded.model)
    with progress.task("model latency") as advance, dense_bfloat16(loaded.model) as dense:
        watches = [
            Stopwatch(packed_model(loaded.model, space.module_levels(it), source, target), target)
            for it in references
        ]
        # Not in turns with the dense model: finalists are measured among themselves, too.
        measured = time_models(watches, advance)
        (plain,) = time_models([Stopwatch(dense, target, plain=True)], advance)
    sums = [
        sum(row[level] for row, level in zip(prices, it.levels, strict=True)) for it in references
    ]
    return fit_part(sums, measured, plain)
