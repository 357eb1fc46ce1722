"""What the benchmark found: rows, comparisons within rounds, and how they are printed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any

from autocompress_kernels.bench_cases import Shape
from autocompress_kernels.bench_timing import FOREIGN, SPREAD, Series, interval, ratio

CODES = (2, 3, 4, 5, 6, 8)  # bits that are compared with ggml
ENOUGH = 6  # rounds: of fewer, no interval is a 95 % one
OFTEN = 0.25  # share of samples in which another process ran in between; more is noisy
Row = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """All cases of one shape, number of rows of x and number of threads.

    Args:
        shape, m, threads: which.
        probe: reading memory.
        every: the cases.
        foreign: share of the machine's CPU time that others used; None where it is not told.
        huge: share of the process' memory on huge pages; None where it is not told.
    """

    shape: Shape
    m: int
    threads: int
    probe: Series
    every: Sequence[Series]
    foreign: float | None
    huge: float | None

    def facts(self) -> Row:
        """The group as JSON."""
        size = self.probe.bytes
        return {
            "shape": list(self.shape),
            "m": self.m,
            "threads": self.threads,
            "read_gbs": size / self.probe.seconds / 1e9,
            "read_gbs_best": size / min(self.probe.wall) / 1e9,
            "rounds": len(self.probe.wall),
            "others_cpu": self.foreign,
            "huge_pages": self.huge,
        }

    def rows(self) -> list[Row]:
        """One for each case."""
        return [self._row(series) for series in self.every]

    def _row(self, series: Series) -> Row:
        label = series.label
        read = [
            (series.bytes / wall) / (self.probe.bytes / probe)
            for wall, probe in zip(series.wall, self.probe.wall, strict=True)
        ]
        row: Row = {
            **{"shape": list(self.shape), "m": self.m, "threads": self.threads},
            **{"runtime": label.runtime, "kernel": label.kernel, "mode": label.mode},
            **{"bits": label.bits, "task": label.task, "bytes": series.bytes},
            "us": series.seconds * 1e6,
            "us_min": min(series.wall) * 1e6,
            "us_cpu": median(series.cpu) * 1e6,
            "spread": series.spread,
            "gbs": series.bytes / series.seconds / 1e9,
            "of_read": _interval(read),
            "rival": None,
            "aten": None,
            "ggml": None,
            "cold": series.cold,
            "noisy": self.is_noisy(series),
            "wall_above_cpu": series.stolen,
        }
        if label.runtime == "native":
            aten, ggml = self.best_aten(series), self.best_ggml(label.bits, label.task)
            both = [found for found in (aten, ggml) if found is not None]
            row["aten"], row["ggml"] = (_compared(found, series) for found in (aten, ggml))
            if both:
                row["rival"] = _compared(min(both, key=lambda found: found.seconds), series)
        return row

    def is_noisy(self, series: Series) -> bool:
        """Whether something else than the kernel had a say in its timing."""
        disturbed = self.foreign is not None and self.foreign > FOREIGN
        return disturbed or series.stolen > OFTEN or series.spread > SPREAD

    def best_aten(self, series: Series) -> Series | None:
        """The fastest of PyTorch's kernels that keep at least as many bits."""
        label = series.label
        return self._best("aten", range(label.bits, 33), label.task)

    def best_ggml(self, bits: int, task: str = "linear") -> Series | None:
        """The fastest of ggml's kernels of that many bits."""
        return self._best("ggml", range(bits, bits + 1), task)

    def _best(self, runtime: str, bits: range, task: str) -> Series | None:
        found = [
            series
            for series in self.every
            if (series.label.runtime, series.label.task) == (runtime, task)
            and series.label.bits in bits
        ]
        return min(found, key=lambda series: series.seconds, default=None)

    def against_ggml(self, suffix: str) -> tuple[list[int], list[float]]:
        """The bits that both have, and round by round the geometric mean over them of the ratio.

        Args:
            suffix: of our kernels' names: '' or ' asym'.
        """
        ours = {(series.label.kernel, series.label.mode): series for series in self.every}
        pairs = []
        for bits in CODES:
            theirs = self.best_ggml(bits)
            if theirs is not None:
                pairs.append((bits, theirs.wall, ours[f"q{bits}{suffix}", "a8"].wall))
        rounds = range(len(self.probe.wall))
        means = [geometric_mean([their[i] / our[i] for _, their, our in pairs]) for i in rounds]
        return [bits for bits, _, _ in pairs], means if pairs else []

    def slower(self) -> list[Row]:
        """Kernels that are slower than one of their family that stores more, beyond doubt."""
        found: list[Row] = []
        if len(self.probe.wall) < ENOUGH:
            return found
        for family in sorted({name for s in self.every for name in s.label.families}):
            members = [s for s in self.every if family in s.label.families]
            members.sort(key=lambda series: series.bytes)
            for place, light in enumerate(members):
                dense = min(members[place:], key=lambda series: series.seconds)
                times = _interval([a / b for a, b in zip(light.wall, dense.wall, strict=True)])
                if dense is not light and times["low"] > 1:
                    found.append(
                        {
                            **{"shape": list(self.shape), "m": self.m, "threads": self.threads},
                            "family": family,
                            "kernel": light.label.kernel,
                            "than": dense.label.kernel,
                            "times": times,
                            "noisy": self.is_noisy(light) or self.is_noisy(dense),
                        }
                    )
        return found


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers; 1 of none."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else 1.0


def _interval(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("median", "low", "high"), interval(values), strict=True))


def _compared(rival: Series | None, ours: Series) -> Row | None:
    """How many times longer a rival takes."""
    if rival is None:
        return None
    times = dict(zip(("median", "low", "high"), ratio(rival, ours), strict=True))
    return {"kernel": f"{rival.label.runtime} {rival.label.kernel}", **times}


def summary(groups: Sequence[Group]) -> Row:
    """At one row of x: how many times longer ggml takes, and what is slower than it should be."""
    means, slower = [], []
    for threads, turn in groupby(
        sorted((g for g in groups if g.m == 1), key=lambda g: g.threads), lambda g: g.threads
    ):
        members = list(turn)
        slower += [row for group in members for row in group.slower()]
        for name, suffix in (("symmetric", ""), ("asymmetric", " asym")):
            found = [(group, *group.against_ggml(suffix)) for group in members]
            found = [one for one in found if one[1]]
            common = {"threads": threads, "codes": name, "mode": "a8"}
            for group, bits, values in found:
                means.append(
                    {**common, "shape": list(group.shape), "bits": bits, **_interval(values)}
                )
            if len(found) > 1:
                rounds = min(len(values) for _, _, values in found)
                every = [geometric_mean([v[i] for _, _, v in found]) for i in range(rounds)]
                means.append({**common, "shape": None, "bits": None, **_interval(every)})
    told = any(group.m == 1 and len(group.probe.wall) >= ENOUGH for group in groups)
    return {"against_ggml": means, "slower_than_denser": slower if told else None}


def group_lines(group: Group) -> Iterator[str]:
    """A group as a table."""
    facts = group.facts()
    yield (
        f"{_size(group.shape)}, M = {group.m}, {_threads(group.threads)}: memory is read at "
        f"{facts['read_gbs']:.1f} GB/s (best {facts['read_gbs_best']:.1f}); other processes used "
        f"{_percent(group.foreign)} of the CPUs, {_percent(group.huge)} of memory on huge pages"
    )
    yield (
        f"  {'kernel':28} {'mode':4} {'us':>9} {'min':>9} {'spread':>6} {'GB/s':>6} {'of read':>7}"
        f"  {'times faster than the best rival':46}  than ggml's best"
    )
    for row in group.rows():
        marks = "noisy " * row["noisy"] + "warm" * (not row["cold"])
        yield (
            f"  {row['runtime'] + ' ' + row['kernel']:28} {row['mode']:4} {row['us']:9.1f} "
            f"{row['us_min']:9.1f} {row['spread']:6.0%} {row['gbs']:6.1f} "
            f"{row['of_read']['median']:7.0%}  {_times(row['rival'], True):46}  "
            f"{_times(row['ggml'], False):18} {marks}"
        ).rstrip()


def summary_lines(found: Row) -> Iterator[str]:
    """The summary as text."""
    if found["against_ggml"]:
        yield "M = 1, int8 activations: how many times longer ggml's best takes, geometric mean"
    for row in found["against_ggml"]:
        where = "all shapes" if row["shape"] is None else _size(row["shape"])
        bits = "" if row["bits"] is None else f", {', '.join(map(str, row['bits']))} bits"
        yield f"  {where}, {_threads(row['threads'])}, {row['codes']}{bits}: {_times(row, False)}"
    slower = found["slower_than_denser"]
    if slower is None:
        yield f"M = 1, slower than a kernel that stores more: not told from under {ENOUGH} rounds"
        return
    yield f"M = 1: slower than a kernel of the same family that stores more: {len(slower)}"
    for row in slower:
        yield (
            f"  {_size(row['shape'])}, {_threads(row['threads'])}, {row['family']}: "
            f"{row['kernel']} takes {_times(row['times'], False)} times as long as {row['than']}"
            f"{', noisy' * row['noisy']}"
        )


def _times(found: Row | None, named: bool) -> str:
    if found is None:
        return "-"
    text = f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
    return f"{text} {found['kernel']}" if named else text


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _percent(share: float | None) -> str:
    return "an unknown part" if share is None else f"{share:.0%}"
