"""Times cases in turns, beside a probe of how fast memory is read.

A shared machine is slower at some moments than at others, for all cases alike. So all cases take
turns (A B C A B C ...), and what is compared is compared within a round.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path
from statistics import median

import torch

from autocompress_kernels.bench_cases import Case, Label, Turn
from autocompress_kernels.library import load
from autocompress_kernels.memory import arena

PROBED = 512 << 20  # bytes that the probe reads, a slice at a time
SLICE = 128 << 20
SAMPLE = 0.002  # s: short calls are repeated to fill it
SETTLE = 0.01  # s, after which the threads of another library's pool no longer spin
STOLEN = 1.15  # wall / CPU time of a one-thread sample above which another process ran in between
TRIES = 3  # of such a sample
FOREIGN = 0.1  # of the machine's CPU time used by others; more is noisy
SPREAD = 0.1  # interquartile range / median; more is noisy


@dataclass
class Series:
    """The samples of one case, seconds per multiplication; without its weights.

    Args:
        label, bytes, threads, cold: of the case.
        wall, cpu: one per round.
    """

    label: Label
    bytes: int
    threads: int
    cold: bool
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median wall time of a multiplication."""
        return median(self.wall)

    @property
    def spread(self) -> float:
        """Interquartile range of the samples, relative to their median."""
        ranked = sorted(self.wall)
        quarter = len(ranked) // 4
        return (ranked[-1 - quarter] - ranked[quarter]) / self.seconds

    @property
    def stolen(self) -> float:
        """Share of samples in which another process ran in between; 0 with several threads."""
        if self.threads > 1:
            return 0.0
        pairs = zip(self.wall, self.cpu, strict=True)
        return sum(not _is_whole(wall, cpu) for wall, cpu in pairs) / len(self.wall)


class Probe:
    """Reads a block of memory on huge pages, a slice at a time.

    Raises:
        RuntimeError: the library has no `ack_read`.
    """

    ARGUMENTS = (c_void_p, c_int64, c_void_p, c_int32)

    def __init__(self) -> None:
        path = load().path
        try:
            self._read = ctypes.CDLL(str(path)).ack_read
        except AttributeError as error:
            raise RuntimeError(
                f"'{path}' must export ack_read. Got a library without it. Build it again."
            ) from error
        self._read.restype = c_int64
        self._read.argtypes = self.ARGUMENTS
        (self._memory,) = arena([torch.ones(1, dtype=torch.int64).expand(PROBED // 8)])

    def case(self, threads: int) -> Case:
        """Reading a slice."""
        base, parallel = self._memory.data_ptr(), load().parallel
        calls = [[(base + start, SLICE, parallel, threads)] for start in range(0, PROBED, SLICE)]

        def check() -> tuple[float, float]:
            found = self._read(*calls[-1][0])  # every word is 1
            return abs(found * 8 / SLICE - 1), 0.0

        return Case(
            label=Label("probe", "read", 64, ""),
            bytes=SLICE,
            function=self._read,
            copies=calls,
            turn=Turn(len(calls)),
            check=check,
            limits=(0.0, 0.0),
            cold=True,
            threads=threads,
        )


@torch.inference_mode()
def measure(cases: Sequence[Case], rounds: int) -> list[Series]:
    """Time every case, one sample in each round.

    Args:
        cases: at least one; those of one thread pool side by side.
        rounds: at least 1.
    """
    every = [
        (case, Series(case.label, case.bytes, case.threads, case.cold), _calls(case))
        for case in cases
    ]
    before = cases[-1]
    gc.disable()
    try:
        for number in range(rounds):
            for case, series, calls in every if number % 2 == 0 else every[::-1]:
                _settle(case, before)
                before = case
                wall, cpu = _undisturbed(case, calls)
                series.wall.append(wall)
                series.cpu.append(cpu)
    finally:
        gc.enable()
    return [series for _, series, _ in every]


def _undisturbed(case: Case, calls: int) -> tuple[float, float]:
    """A sample; on one thread it is taken again if another process had the CPU meanwhile."""
    tries = []
    for _ in range(TRIES):
        tries.append(_sample(case, calls))
        if case.threads > 1 or _is_whole(*tries[-1]):
            return tries[-1]
    return min(tries, key=lambda times: times[0] / times[1])


def _is_whole(wall: float, cpu: float) -> bool:
    """Whether no other process had the CPU in a sample of one thread."""
    return wall <= STOLEN * cpu


def _calls(case: Case) -> int:
    """Entries that fill a sample. The case has run afterwards, and its threads are there."""
    spent = min(_sample(case, 1)[0] for _ in range(3)) * case.each
    return max(1, round(SAMPLE / spent))


def _settle(case: Case, before: Case) -> None:
    """Let the threads of another pool fall asleep, and wake those of this one."""
    if case.threads > 1 and _pool(before) != _pool(case):
        time.sleep(SETTLE)
        _sample(case, 1)


def _pool(case: Case) -> bool:
    return case.label.runtime == "ggml"


def _sample(case: Case, calls: int) -> tuple[float, float]:
    """Wall and CPU seconds per multiplication. No Python runs between calls."""
    turn = case.calls(calls)
    run: Callable[..., None] = deque(maxlen=0).extend
    function = case.function
    cpu, wall = time.process_time(), time.perf_counter()
    run(starmap(function, turn))
    wall = time.perf_counter() - wall
    cpu = time.process_time() - cpu
    count = calls * case.each
    return wall / count, cpu / count


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and a 95 % confidence interval, from order statistics; the range of few values."""
    ranked, count = sorted(values), len(values)
    low = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)))
    return median(ranked), ranked[low], ranked[count - 1 - low]


def ratio(slow: Series, fast: Series) -> tuple[float, float, float]:
    """How many times longer `slow` takes, round by round: median and interval."""
    return interval([a / b for a, b in zip(slow.wall, fast.wall, strict=True)])


class Load:
    """What other processes do meanwhile."""

    def __init__(self) -> None:
        self._machine, self._own, self._wall = _machine_seconds(), _own_seconds(), _now()

    def foreign(self) -> float | None:
        """Share of the machine's CPU time that others used since; None where it is not told."""
        machine = _machine_seconds()
        wall = (_now() - self._wall) * (os.cpu_count() or 1)
        if machine is None or self._machine is None or wall <= 0:
            return None
        return max(0.0, machine - self._machine - (_own_seconds() - self._own)) / wall


def _now() -> float:
    return time.perf_counter()


def _own_seconds() -> float:
    return time.process_time()


def _machine_seconds() -> float | None:
    """CPU time that all processes of this machine have used, s; None where it is not told."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    idle = (3, 4)  # waiting included; guests are part of user time
    busy = sum(int(ticks) for place, ticks in enumerate(fields[:8]) if place not in idle)
    return busy / os.sysconf("SC_CLK_TCK")
