"""Checks everything, then times everything."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autocompress_kernels.bench_aten import aten_weights
from autocompress_kernels.bench_cases import (
    Case,
    Copies,
    Label,
    Shape,
    Weight,
    copies_of,
    last_level_cache,
)
from autocompress_kernels.bench_ggml import ggml_weights
from autocompress_kernels.bench_ggml_library import find_ggml
from autocompress_kernels.bench_native import native_weights
from autocompress_kernels.bench_report import Group
from autocompress_kernels.bench_timing import Load, Probe, measure
from autocompress_kernels.library import load

SMALLEST = (16, 32)  # a shape whose product takes no time: what is left is the call
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
RESERVE = 1 << 30  # bytes left to others


@dataclass(frozen=True)
class Plan:
    """What to time.

    Args:
        shapes: (rows, width) each.
        m: numbers of rows of x.
        threads: numbers of them.
        rounds: samples per case.
    """

    shapes: tuple[Shape, ...]
    m: tuple[int, ...]
    threads: tuple[int, ...]
    rounds: int


@dataclass(frozen=True)
class Checked:
    """One kernel that was compared with the reference.

    Args:
        shape, m, threads, label: which.
        error, rounded: relative, to the exact product and to that of activations as rounded.
        limits: of both.
    """

    shape: Shape
    m: int
    threads: int
    label: Label
    error: float
    rounded: float
    limits: tuple[float, float]

    @property
    def holds(self) -> bool:
        """Whether both errors are within their limits; a rounded limit of 0 is none."""
        exact, rounded = self.limits
        return self.error <= exact and (self.rounded <= rounded or not rounded)

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **{"shape": list(self.shape), "m": self.m, "threads": self.threads},
            **{"runtime": self.label.runtime, "kernel": self.label.kernel},
            **{"mode": self.label.mode, "error": _finite(self.error), "limit": self.limits[0]},
            "rounded_error": _finite(self.rounded) if self.limits[1] else None,
            "rounded_limit": self.limits[1] or None,
            "holds": self.holds,
        }


class Bench:
    """One run of the benchmark.

    Args:
        plan: what to time.
        show: told what is going on, line by line.

    Attributes:
        missing: 'shape: rival: reason' of what does not run here.

    Raises:
        RuntimeError: the library has no probe.
    """

    def __init__(self, plan: Plan, show: Callable[[str], None]) -> None:
        self.plan, self.show = plan, show
        self.missing: list[str] = []
        self._probe = Probe()
        self._ready: dict[Shape, dict[str, int]] = {}  # names of weights -> bytes of their copies
        ggml = find_ggml()
        if isinstance(ggml, str):
            self.missing.append(f"ggml: {ggml}")

    def check(self) -> list[Checked]:
        """Compare every kernel that will be timed with the reference; rivals, too.

        Rivals that do not run, or compute something else, are left out from then on.
        """
        every = []
        for shape in self.plan.shapes:
            self.show(f"checking {shape[0]} x {shape[1]}")
            self._ready[shape] = {}
            for name, make in makers(shape, lambda size: 2):
                try:
                    found, size = self._check(shape, make())
                except (ValueError, RuntimeError, OSError) as reason:
                    if name.startswith("native"):
                        raise
                    self._leave_out(shape, name, str(reason).partition("\n")[0])
                    continue
                every += found
                wrong = [one.error for one in found if not one.holds]
                if wrong and not name.startswith("native"):
                    self._leave_out(shape, name, f"relative error {max(wrong):.1e}")
                else:
                    self._ready[shape][name] = size
        return every

    def _check(self, shape: Shape, weight: Weight) -> tuple[list[Checked], int]:
        """All cases of one weight, and the bytes that its copies will take."""
        found, size = [], 0
        for threads in self.plan.threads:
            torch.set_num_threads(threads)
            for m in self.plan.m:
                for case in weight.cases(m, threads):
                    if case.label.task == "linear":
                        size = case.bytes * copies_of(case.bytes)
                    errors = case.check()
                    found.append(Checked(shape, m, threads, case.label, *errors, case.limits))
        return found, size

    def _leave_out(self, shape: Shape, name: str, reason: str) -> None:
        self.missing.append(f"{shape[0]} x {shape[1]}: {name}: {reason}")

    def time(self) -> Iterator[Group]:
        """Time what was checked, shape by shape.

        Raises:
            MemoryError: there is too little memory for the copies of a shape's weights.
        """
        for shape in self.plan.shapes:
            self._check_memory(shape)
            self.show(f"timing {shape[0]} x {shape[1]}")
            yield from self._time(shape)

    def _time(self, shape: Shape) -> Iterator[Group]:
        """Time a shape; its weights are gone afterwards."""
        ready = self._ready[shape]
        weights = [make() for name, make in makers(shape, copies_of) if name in ready]
        for threads in self.plan.threads:
            torch.set_num_threads(threads)
            for m in self.plan.m:
                cases = [case for weight in weights for case in weight.cases(m, threads)]
                yield self._group(shape, m, threads, [self._probe.case(threads), *cases])

    def _group(self, shape: Shape, m: int, threads: int, cases: Sequence[Case]) -> Group:
        others = Load()
        probe, *every = measure(cases, self.plan.rounds)
        return Group(shape, m, threads, probe, every, others.foreign(), huge_pages())

    def _check_memory(self, shape: Shape) -> None:
        wanted, free = sum(self._ready[shape].values()) + RESERVE, free_memory()
        if free is not None and wanted > free:
            raise MemoryError(
                f"a shape of {shape[0]} x {shape[1]} must have {wanted / 1e9:.1f} GB of memory for "
                f"cold copies of its weights. Got {free / 1e9:.1f} GB. Leave it out of --shapes."
            )


def makers(shape: Shape, copies: Copies) -> Iterator[tuple[str, Callable[[], Weight]]]:
    """Name and maker of every weight; those that share a pool of threads side by side."""
    yield from native_weights(shape, copies)
    yield from aten_weights(shape, copies)
    yield from ggml_weights(shape, copies)


def machine() -> dict[str, Any]:
    """What figures depend on, as JSON."""
    ggml = find_ggml()
    return {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "last_level_cache": last_level_cache(),
        "huge_pages": _chosen(HUGE_PAGES),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "isa": load().isa(),
        "library": str(load().path),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "ggml": None if isinstance(ggml, str) else ggml.version(),
    }


def overheads() -> dict[str, float]:
    """us that a product of next to nothing takes in each runtime: included in all figures."""
    wanted = ("native q8", "aten linear fp32", "ggml Q8_0 plain")
    weights = [make() for name, make in makers(SMALLEST, copies_of) if name in wanted]
    torch.set_num_threads(1)
    cases = {case.label.runtime: case for weight in weights for case in weight.cases(1, 1)[:1]}
    found = measure(list(cases.values()), 5)
    return {series.label.runtime: 1e6 * series.seconds for series in found}


def _finite(value: float) -> float | None:
    """What JSON can hold."""
    return value if math.isfinite(value) else None


def free_memory() -> int | None:
    """Bytes that can be used without swapping; None where the system does not tell."""
    text = _field(Path("/proc/meminfo"), "MemAvailable")
    return int(text.split()[0]) << 10 if text else None


def huge_pages() -> float | None:
    """Share of this process' memory that is on huge pages; None where the system does not tell."""
    rollup = Path("/proc/self/smaps_rollup")
    huge, every = (_field(rollup, name) for name in ("AnonHugePages", "Anonymous"))
    return int(huge.split()[0]) / int(every.split()[0]) if huge and every else None


def _field(path: Path, name: str) -> str:
    """The first 'name: value' of a file, or ''."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() == name), "")


def _chosen(path: Path) -> str:
    """The '[chosen]' word of a file, or ''."""
    try:
        return path.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return ""
