"""Checks every kernel against the reference, then times it, beside PyTorch's and ggml's.

    python -m autocompress_kernels.bench                 SmolLM2's, a 1 B and an 8 B Llama's shapes
    python -m autocompress_kernels.bench --quick         a minute
    python -m autocompress_kernels.bench --shapes 4096x4096 --m 1 --threads 1 --json times.json

Exits with 1 where a kernel's error is above its limit; nothing is timed then. ggml is timed where
llama-cpp-python is installed. What is printed, row by row:
  us, min    median and shortest time of a multiplication
  spread     interquartile range of the samples, relative to their median
  GB/s       bytes of the weight, with scales, zeros and masks, per second
  of read    that as a part of the speed at which a C loop read memory in the same rounds
  times faster than ...  the rival's time over ours, round by round: median [95 % interval]
The best rival of a kernel is the fastest of PyTorch's kernels that keep at least as many bits and
ggml's kernels of as many bits. 'noisy': other processes used the CPUs, or the spread is above 10 %.
'warm': the weight is too small for copies that fill the caches.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocompress_kernels.bench_report import Group
    from autocompress_kernels.bench_run import Checked, Plan

SHAPES = "576x1536,1536x576,49152x576,2048x2048,8192x2048,4096x4096,14336x4096"
QUICK_SHAPES = "576x1536,2048x2048"
LARGEST = 1 << 20  # rows or inputs
MOST_M = 32  # rows of x that the kernels multiply themselves
SCHEMA = 1  # of the JSON
METHOD = (
    "weights cold, on huge pages; copies take turns, cases take turns (A B C A B C ...)",
    "a sample of one thread is taken again, twice at most, if another process had its CPU",
    "native: the C function through ctypes on prepared arguments, float32 in and out",
    "aten: the operator itself, called from Python, its output allocated every time",
    "ggml: graphs of several products with float32 in and out, each with its own weight",
)


def sizes(text: str) -> tuple[tuple[int, int], ...]:
    """'576x1536,64x64' as shapes.

    Raises:
        ArgumentTypeError: it is something else.
    """
    found = []
    for part in text.split(","):
        rows, _, width = part.strip().lower().partition("x")
        if not (_is_number(rows, LARGEST) and _is_number(width, LARGEST)):
            raise argparse.ArgumentTypeError(
                f"a shape must be ROWSxWIDTH, each from 1 to {LARGEST}. Got '{part}'."
            )
        found.append((int(rows), int(width)))
    return tuple(dict.fromkeys(found))


def numbers(most: int, what: str) -> Any:
    """A parser of '1,2' with numbers from 1 to `most`."""

    def parse(text: str) -> tuple[int, ...]:
        parts = [part.strip() for part in text.split(",")]
        for part in parts:
            if not _is_number(part, most):
                raise argparse.ArgumentTypeError(
                    f"{what} must be from 1 to {most}, separated by commas. Got '{part}'."
                )
        return tuple(dict.fromkeys(int(part) for part in parts))

    return parse


def rounds(text: str) -> int:
    """A number of rounds.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not _is_number(text, 10_000):
        raise argparse.ArgumentTypeError(f"rounds must be from 1 to 10000. Got '{text}'.")
    return int(text)


def _is_number(text: str, most: int) -> bool:
    return text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= most and len(text) < 9


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    cores = os.cpu_count() or 1
    found = argparse.ArgumentParser(
        prog="python -m autocompress_kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--quick", action="store_true", help=f"{QUICK_SHAPES}, M 1 and 32, 1 thread")
    found.add_argument("--shapes", type=sizes, metavar="RxW,...", help=f"default {SHAPES}")
    found.add_argument(
        "--m", type=numbers(MOST_M, "rows of x"), metavar="M,...", help="default 1,8,32"
    )
    found.add_argument(
        "--threads", type=numbers(cores, "threads"), metavar="T,...", help="default 1,2"
    )
    found.add_argument("--rounds", type=rounds, metavar="N", help="default 15")
    found.add_argument("--json", metavar="FILE", help="write results there, too; - is stdout")
    return found


def plan(options: argparse.Namespace) -> Plan:
    """What the options ask for."""
    from autocompress_kernels.bench_run import Plan

    cores = os.cpu_count() or 1
    quick = options.quick
    return Plan(
        shapes=options.shapes or sizes(QUICK_SHAPES if quick else SHAPES),
        m=options.m or ((1, 32) if quick else (1, 8, 32)),
        threads=options.threads or ((1,) if quick or cores == 1 else (1, 2)),
        rounds=options.rounds or (7 if quick else 15),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time and print; 1 where a kernel is wrong, 2 where the benchmark cannot run."""
    options = parser().parse_args(arguments)
    # Read at the first allocation: PyTorch's own copies of weights get huge pages as well.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from autocompress_kernels.library import missing

    reason = missing()
    if reason is None and options.json not in (None, "-") and not _folder(options.json).is_dir():
        reason = f"--json must be in a folder that exists. Got '{options.json}'."
    if reason is None:
        try:
            return run(plan(options), options.json)
        except (MemoryError, RuntimeError, ValueError) as error:
            reason = str(error)
    print(f"error: {reason}", file=sys.stderr)
    return 2


def _folder(file: str) -> Path:
    return Path(file).absolute().parent


def run(wanted: Plan, file: str | None) -> int:
    """Check, time and print; the exit code.

    Args:
        wanted: what to time.
        file: where JSON is written; '-' is stdout, tables go to stderr then.
    """
    from autocompress_kernels import bench_report as report
    from autocompress_kernels.bench_run import Bench, machine, overheads

    out = sys.stderr if file == "-" else sys.stdout

    def show(line: str) -> None:
        print(line, file=out, flush=True)

    facts = machine()
    for name, value in facts.items():
        show(f"{name}: {value}")
    bench = Bench(wanted, show)
    checked = bench.check()
    for line in check_lines(checked, bench.missing):
        show(line)
    result: dict[str, Any] = {
        **{"schema": SCHEMA, "machine": facts, "method": METHOD, "missing": bench.missing},
        "checks": [one.facts() for one in checked],
    }
    wrong = any(not one.holds for one in checked if one.label.runtime == "native")
    if not wrong:
        result["overhead_us"] = overheads()
        for line in (*METHOD, *overhead_lines(result["overhead_us"])):
            show(line)
        groups: list[Group] = []
        for group in bench.time():
            groups.append(group)
            for line in report.group_lines(group):
                show(line)
        result["groups"] = [group.facts() for group in groups]
        result["rows"] = [row for group in groups for row in group.rows()]
        result["summary"] = report.summary(groups)
        for line in report.summary_lines(result["summary"]):
            show(line)
    _write(result, file)
    return 1 if wrong else 0


def check_lines(checked: Sequence[Checked], missing: Sequence[str]) -> Iterator[str]:
    """The worst error of every kind of kernel, and all that are above their limits."""
    kinds: dict[tuple[str, str], list[Checked]] = {}
    for one in checked:
        kinds.setdefault((one.label.runtime, one.label.mode), []).append(one)
    yield "worst relative errors: to the product, and to that of activations as they are rounded"
    for (runtime, mode), found in kinds.items():
        exact = max(found, key=lambda one: one.error / one.limits[0])
        rounded = max(found, key=lambda one: one.rounded / (one.limits[1] or 1))
        yield (
            f"  {runtime:6} {mode:4} {len(found):5} cases  {exact.error:.1e} of "
            f"{exact.limits[0]:.1e} ({exact.label.kernel})  {rounded.rounded:.1e} of "
            f"{rounded.limits[1]:.0e}"
        )
    for one in checked:
        if not one.holds:
            shape = f"{one.shape[0]} x {one.shape[1]}"
            yield (
                f"FAILED {one.label}, {shape}, M={one.m}, {one.threads} threads: {one.error:.1e} "
                f"above {one.limits[0]:.1e}, or {one.rounded:.1e} above {one.limits[1]:.0e}"
            )
    for line in missing:
        yield f"not timed: {line}"


def overhead_lines(found: dict[str, float]) -> Iterator[str]:
    """What of a time is not multiplying."""
    parts = ", ".join(f"{runtime} {us:.1f}" for runtime, us in found.items())
    yield f"a 16 x 32 product takes, in us: {parts}; times below include that"


def _write(result: dict[str, Any], file: str | None) -> None:
    if file is None:
        return
    text = json.dumps(result, indent=1, allow_nan=False)
    if file == "-":
        print(text)
    else:
        Path(file).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
