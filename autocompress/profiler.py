"""The profiler: interleaved rounds of samples, each compared with a reference of the same round.

A shared machine is slower at some moments than at others, for all cases alike. So all cases take
turns (A B C A B C ...), every sample is divided by the reference's samples beside it, and only the
ratio's median counts. Python and torch play no part here: a case is anything that can be called.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

from autocompress.latency_store import Point, Timing
from autocompress.progress import Advance

STOLEN = 1.15  # wall / CPU time of a one-thread sample above which another process ran in between
TRIALS = 3  # to find out how long a call takes: one that is interrupted must not decide
FOREIGN = 0.1  # of the machine's CPU time; more is called noisy


class Case(Protocol):
    """Something to time."""

    point: Point
    bytes: int  # of packed weight that a call reads

    def run(self, calls: int) -> None:
        """Call it that often, each time with the next copy of its weights."""


def machine_seconds() -> float | None:
    """CPU time that all processes of this machine have used, s; None where it is not told."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, irq, soft = map(int, fields[:7])  # the others: idle and waiting
    steal = int(fields[7]) if len(fields) > 7 else 0
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Clocks:
    """What time is read from, in seconds; tests pass their own.

    Args:
        wall: monotonic.
        cpu: of this process, all threads.
        machine: of all processes, or None where it is not told.
    """

    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time
    machine: Callable[[], float | None] = machine_seconds


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Args:
        rounds: at least that many samples of a case.
        most: at most that many.
        sample: length of a sample, s; short calls are repeated to fill it.
        width: of the ratio's interval, relative; a case that is below has been measured enough.
    """

    rounds: int = 7
    most: int = 41
    sample: float = 0.002
    width: float = 0.03


@dataclass
class _Series:
    """The samples of one case."""

    case: Case
    calls: int = 1
    ratios: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # per call
    cpu: list[float] = field(default_factory=list)
    stolen: int = 0  # samples in which another process ran

    def is_known(self, effort: Effort) -> bool:
        """Whether there are enough samples and the ratio's interval is narrow."""
        if len(self.ratios) < effort.rounds:
            return False
        low, high = interval(self.ratios)
        return high - low <= effort.width * median(self.ratios)


def measure(
    reference: Case,
    cases: Sequence[Case],
    *,
    threads: int,
    effort: Effort | None = None,
    clocks: Clocks | None = None,
    advance: Advance = lambda done, total: None,
) -> dict[Point, Timing]:
    """Time every case, and the reference beside them.

    Args:
        reference: what times are ratios to; its own ratio is 1.
        cases: any number; each is stopped when its interval is narrow.
        threads: that a call may use. With one, CPU time counts where another process ran.
        effort: rounds and samples.
        clocks: what time is read from.
        advance: told (cases finished, cases).

    Returns:
        Timings of all cases and of the reference.
    """
    effort, clocks = effort or Effort(), clocks or Clocks()
    busy = clocks.machine(), clocks.cpu(), clocks.wall()
    base = _Series(reference, _calls(reference, effort, clocks))
    every = [_Series(case, _calls(case, effort, clocks)) for case in cases]
    active = list(every)
    for number in range(effort.most):
        if not active:
            break
        _round(base, active if number % 2 else active[::-1], threads, clocks)
        if number + 1 >= effort.rounds:
            active = [series for series in active if not series.is_known(effort)]
        advance(len(every) - len(active), len(every))
    foreign = _foreign(busy, clocks)
    reference_us = 1e6 * median(base.seconds)
    base.ratios = [seconds * 1e6 / reference_us for seconds in base.seconds]
    return {
        series.case.point: _timing(series, reference_us, effort, foreign)
        for series in (base, *every)
    }


def _calls(case: Case, effort: Effort, clocks: Clocks) -> int:
    """Calls that fill a sample; the case is warm afterwards."""
    case.run(1)
    calls = 1
    while True:
        spent = min(_seconds(case, calls, clocks) for _ in range(TRIALS))
        if spent >= effort.sample / 4:
            return max(1, round(calls * effort.sample / spent))
        calls *= 4


def _seconds(case: Case, calls: int, clocks: Clocks) -> float:
    start = clocks.wall()
    case.run(calls)
    return clocks.wall() - start


def _round(base: _Series, turn: Sequence[_Series], threads: int, clocks: Clocks) -> None:
    """One sample of every case, between two of the reference; each ratio is to their mean."""
    before = _sample(base, threads, clocks)
    samples = [(series, _sample(series, threads, clocks)) for series in turn]
    reference = (before + _sample(base, threads, clocks)) / 2
    for series, seconds in samples:
        series.ratios.append(seconds / reference)


def _sample(series: _Series, threads: int, clocks: Clocks) -> float:
    """Seconds per call: wall time, or of one thread its CPU time where another process ran."""
    wall, cpu = clocks.wall(), clocks.cpu()
    series.case.run(series.calls)
    cpu, wall = clocks.cpu() - cpu, clocks.wall() - wall
    if threads == 1 and wall > STOLEN * cpu > 0:
        series.stolen += 1
        wall = cpu
    series.seconds.append(wall / series.calls)
    series.cpu.append(cpu / series.calls)
    return wall / series.calls


def _foreign(before: tuple[float | None, float, float], clocks: Clocks) -> float:
    """Share of the machine's CPU time that other processes used since `before`."""
    machine, now = before[0], clocks.machine()
    wall = (clocks.wall() - before[2]) * (os.cpu_count() or 1)
    if machine is None or now is None or wall <= 0:
        return 0.0
    return max(0.0, (now - machine) - (clocks.cpu() - before[1])) / wall


def _timing(series: _Series, reference_us: float, effort: Effort, foreign: float) -> Timing:
    low, high = interval(series.ratios)
    ratio = median(series.ratios)
    return Timing(
        us=ratio * reference_us,
        ratio=ratio,
        low=low,
        high=high,
        rounds=len(series.ratios),
        bytes=series.case.bytes,
        cpu_us=1e6 * median(series.cpu),
        noisy=(
            (high - low) / ratio > 2 * effort.width
            or foreign > FOREIGN
            or series.stolen > len(series.seconds) / 2
        ),
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % confidence interval of the median, from order statistics; the range of few values."""
    ranked, count = sorted(values), len(values)
    # Ranks around the middle, from the normal approximation of the binomial distribution.
    reach = 0.98 * math.sqrt(count)
    low = max(0, math.floor(count / 2 - reach))
    return ranked[low], ranked[count - 1 - low]
