"""The kernel benchmark: what it refuses, checks, compares and writes. Never how fast it is."""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from autocompress_kernels import bench, bench_aten, bench_native, bench_run, bench_timing
from autocompress_kernels.bench_cases import BANK, Case, Label, Turn, bank_rows, copies_of, is_cold
from autocompress_kernels.bench_ggml import TYPES, GgmlWeight
from autocompress_kernels.bench_ggml_library import find_ggml
from autocompress_kernels.bench_report import Group, summary
from autocompress_kernels.bench_run import Bench, Checked, Plan
from autocompress_kernels.bench_timing import Series, interval, measure, ratio
from autocompress_kernels.library import load, missing

needs_kernels = pytest.mark.skipif(missing() is not None, reason=str(missing()))
needs_ggml = pytest.mark.skipif(isinstance(find_ggml(), str), reason=str(find_ggml()))
TINY = ("--shapes", "64x256", "--m", "1,8", "--threads", "1", "--rounds", "1")
NATIVE = {  # kernel -> modes, of every shape
    **{f"q{bits}": ("a8", "a16", "a32") for bits in (2, 3, 4, 5, 6, 8)},
    **{f"q{bits} asym": ("a8", "a16", "a32") for bits in (2, 3, 4, 5, 6, 8)},
    "bf16": ("a16", "a32"),
    **{f"bitmask {part}% bf16": ("a16",) for part in (50, 70)},
    **{f"bitmask {part}% int8": ("a8",) for part in (50, 70)},
    "2:4 bf16": ("a16",),
    "2:4 int8": ("a8",),
    "low-rank 32 q4": ("a8",),
    "low-rank 32 bf16": ("a16",),
}
ATEN = {"linear fp32", "linear bf16", "int4pack", "int8pack", "linear_dynamic int8"}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The benchmark sets torch's threads; other tests want theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "autocompress_kernels.bench", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "64"], "a shape must be ROWSxWIDTH, each from 1 to 1048576. Got '64'."),
        (["--shapes", "64x64,0x8"], "Got '0x8'."),
        (["--shapes", "64x-1"], "Got '64x-1'."),
        (["--shapes", "1x99999999999999999999"], "a shape must be"),
        (["--m", "0"], "rows of x must be from 1 to 32, separated by commas. Got '0'."),
        (["--m", "1,33"], "Got '33'."),
        (["--m", ""], "Got ''."),
        (["--threads", "0"], "threads must be from 1 to"),
        (["--threads", "1,100000"], "Got '100000'."),
        (["--rounds", "0"], "rounds must be from 1 to 10000. Got '0'."),
        (["--rounds", "½"], "rounds must be"),
        (["--shape-list", "8x8"], "unrecognized arguments"),
    ],
)
def test_arguments_are_refused_at_once(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        bench.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_options_become_a_plan() -> None:
    options = bench.parser().parse_args(["--quick", "--shapes", "8x4, 8X4,2x2", "--m", "8,1,8"])
    assert bench.plan(options) == Plan(((8, 4), (2, 2)), (8, 1), (1,), 7)
    full = bench.plan(bench.parser().parse_args([]))
    assert (49152, 576) in full.shapes and (14336, 4096) in full.shapes and full.m == (1, 8, 32)


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom autocompress_kernels.bench import main\ntry:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "of read" in ran.stdout


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_KERNELS_LIBRARY", str(tmp_path / "none.so"))
    ran = command(*TINY)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: ") and "none.so" in ran.stderr
    assert "Traceback" not in ran.stderr


@needs_kernels
def test_a_folder_for_json_must_exist(tmp_path: Path) -> None:
    ran = command(*TINY, "--json", str(tmp_path / "none" / "x.json"))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "--json must be in a folder that exists" in ran.stderr


@pytest.fixture(scope="module")
def ran() -> tuple[dict[str, Any], str]:
    """The JSON of a tiny run, and what it printed beside."""
    found = command(*TINY, "--json", "-")
    assert found.returncode == 0, found.stderr + found.stdout
    return json.loads(found.stdout), found.stderr


@needs_kernels
def test_the_json_says_what_was_run(ran: tuple[dict[str, Any], str]) -> None:
    result, _ = ran
    assert set(result) == {
        *("schema", "machine", "method", "missing", "checks", "overhead_us"),
        *("groups", "rows", "summary"),
    }
    assert result["schema"] == bench.SCHEMA
    assert result["machine"]["isa"] == load().isa()
    assert result["machine"]["cores"] == os.cpu_count()
    assert {"cpu", "load", "torch", "ggml", "last_level_cache"} <= set(result["machine"])
    assert {"native", "aten"} <= set(result["overhead_us"])
    for group, m in zip(result["groups"], (1, 8), strict=True):
        assert (group["shape"], group["m"], group["threads"]) == ([64, 256], m, 1)
        assert group["rounds"] == 1 and group["read_gbs_best"] == group["read_gbs"] > 0


@needs_kernels
def test_every_kernel_is_checked_and_timed(ran: tuple[dict[str, Any], str]) -> None:
    result, _ = ran
    names = {
        (row["runtime"], row["kernel"], row["mode"], row["m"])
        for row in result["rows"]
        if row["runtime"] == "native"
    }
    assert names == {
        ("native", kernel, mode, m) for kernel, modes in NATIVE.items() for mode in modes
        for m in (1, 8)
    }  # fmt: skip
    rivals = {row["kernel"] for row in result["rows"] if row["runtime"] == "aten"}
    left_out = "\n".join(result["missing"])
    assert all(name in rivals or name in left_out for name in ATEN)
    checked = {(c["runtime"], c["kernel"], c["mode"], c["m"]) for c in result["checks"]}
    assert checked >= {(r["runtime"], r["kernel"], r["mode"], r["m"]) for r in result["rows"]}
    assert all(one["holds"] and one["error"] <= one["limit"] for one in result["checks"])
    limits = {(c["mode"], c["limit"]) for c in result["checks"] if c["kernel"].startswith("q")}
    assert limits == {("a8", 6e-3), ("a16", 3e-3), ("a32", 1e-5)}


@needs_kernels
def test_figures_belong_together(ran: tuple[dict[str, Any], str]) -> None:
    result, _ = ran
    rows = {(row["kernel"], row["mode"], row["m"]): row for row in result["rows"]}
    stored = {"q4": 64 * 256 // 2 + 64 * 4 * 2, "q4 asym": 64 * 256 // 2 + 64 * 4 * 3}
    for kernel, size in (*stored.items(), ("bf16", 2 * 64 * 256)):
        assert rows[kernel, "a16", 8]["bytes"] == size
    for row in result["rows"]:
        assert 0 < row["us_min"] <= row["us"] < math.inf
        assert row["gbs"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        group = next(one for one in result["groups"] if one["m"] == row["m"])
        assert row["of_read"]["median"] == pytest.approx(row["gbs"] / group["read_gbs"])
        # One round: a ratio of medians is the median of ratios.
        for rival in (row[key] for key in ("rival", "aten", "ggml") if row[key]):
            name = rival["kernel"].partition(" ")[2]
            other = next(r for (k, _, m), r in rows.items() if (k, m) == (name, row["m"]))
            assert rival["median"] == pytest.approx(other["us"] / row["us"])
            assert rival["low"] == rival["high"] == rival["median"]
    assert rows["q3", "a8", 1]["aten"] and not rows["linear bf16", "bf16", 1]["aten"]


@needs_kernels
def test_tables_go_beside_json_on_stdout(ran: tuple[dict[str, Any], str]) -> None:
    _, text = ran
    assert "worst relative errors" in text
    assert "64 x 256, M = 8, 1 thread: memory is read at" in text
    assert text.index("worst relative errors") < text.index("memory is read at")
    assert "not told from under 6 rounds" in text  # one round is no interval


@needs_kernels
def test_a_wrong_kernel_stops_it_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right = bench_native.linear_call

    def wrong(weight: bytes, mode: str, *rest: Any, **more: Any) -> tuple[object, ...]:
        return right(weight, "a8" if mode == "a16" else mode, *rest, **more)

    monkeypatch.setattr(bench_native, "linear_call", wrong)
    file = tmp_path / "x.json"
    assert bench.run(Plan(((64, 256),), (8,), (1,), 1), str(file)) == 1
    printed = capsys.readouterr().out
    assert "FAILED native q4 a16, 64 x 256, M=8, 1 threads" in printed
    assert "memory is read at" not in printed
    result = json.loads(file.read_text())
    assert "rows" not in result
    failed = {(one["mode"], one["kernel"]) for one in result["checks"] if not one["holds"]}
    assert "a16" in {mode for mode, _ in failed}
    others = {kernel for mode, kernel in failed if mode != "a16"}
    assert others <= {"low-rank 32 q4"}, "its second factor is multiplied in a16"


def test_both_errors_have_limits() -> None:
    def holds(error: float, rounded: float, limits: tuple[float, float] = (6e-3, 1e-3)) -> bool:
        return Checked((8, 8), 1, 1, Label("native", "q4", 4, "a8"), error, rounded, limits).holds

    assert holds(6e-3, 1e-3) and not holds(7e-3, 0) and not holds(4e-3, 2e-3)
    assert holds(4e-3, 0.0, (6e-3, 0.0))
    assert not holds(math.nan, 0.0) and not holds(0.0, math.nan)
    label = Label("native", "q4", 4, "a8")
    facts = Checked((8, 8), 1, 1, label, math.nan, math.inf, (6e-3, 1e-3)).facts()
    assert facts["error"] is facts["rounded_error"] is None and not facts["holds"]


@needs_kernels
def test_rivals_that_are_wrong_or_do_not_run_are_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_run, "native_weights", lambda shape, copies: iter(()))
    monkeypatch.setattr(bench_run, "ggml_weights", lambda shape, copies: iter(()))
    monkeypatch.setattr(bench_aten, "RIVAL_LIMIT", 1e-4)  # bf16 is above, float32 below
    run = Bench(Plan(((40, 48),), (1,), (1,), 1), lambda line: None)
    run.missing.clear()
    run.check()
    assert all(line.startswith("40 x 48: aten ") for line in run.missing)
    reasons = {line.split(": ", 2)[1]: line.split(": ", 2)[2] for line in run.missing}
    assert "multiple of 16 outputs and of 64 inputs" in reasons["aten int4pack"]
    assert "relative error" in reasons["aten linear bf16"]
    assert "aten linear fp32" not in reasons
    ((_, *groups),) = [[None, *run.time()]]
    assert [series.label.kernel for series in groups[0].every] == ["linear fp32"]


@needs_kernels
def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Bench(Plan(((64, 64),), (1,), (1,), 1), lambda line: None)
    run.check()
    monkeypatch.setattr(bench_run, "free_memory", lambda: 1 << 30)
    with pytest.raises(MemoryError, match="a shape of 64 x 64 must have"):
        list(run.time())


@needs_kernels
@pytest.mark.parametrize("m", [1, 5])
def test_tables_are_looked_up_as_well(m: int) -> None:
    names = {}
    for _, make in bench_native.native_weights((1040, 64), lambda size: 2):
        for case in make().cases(m, 1):
            if case.label.task == "rows":
                names[case.label.kernel] = case.check()[0]
                assert len({call[0] for copy in case.copies for call in copy}) == 2
    assert set(names) == {"q4 rows", "q8 rows", "bf16 rows"}
    assert max(names.values()) < 1e-6
    rivals = [make() for name, make in bench_aten.aten_weights((1040, 64), lambda size: 2)]
    assert rivals[-1].cases(m, 1)[0].check()[0] == 0


@needs_kernels
def test_all_copies_are_the_weight() -> None:
    """The check runs the last copy only; calls of others must compute the same."""
    for _, make in bench_native.native_weights((32, 64), lambda size: 3):
        for case in make().cases(2, 1):
            results = []
            y = next(t for t in reversed(case.keep[:-1]) if isinstance(t, torch.Tensor))
            for copy in case.copies:
                y.zero_()
                for call in copy:
                    assert case.function(*call) == 0
                results.append(y.clone())
            assert len({call[0] for copy in case.copies for call in copy}) >= 3
            assert all(torch.equal(results[0], one) for one in results[1:]), case.label


@needs_ggml
@pytest.mark.parametrize("kind", TYPES)
def test_ggml_multiplies_in_every_buffer_type(kind: str) -> None:
    ggml = find_ggml()
    assert not isinstance(ggml, str)
    for place in ggml.buffer_types():
        try:
            weight = GgmlWeight(ggml, kind, place, (64, 512), lambda size: 3)
        except ValueError as reason:
            assert place != "plain", reason
            continue
        for m in (1, 3):
            (case,) = weight.cases(m, 1)
            assert 0 < case.check()[0] < 2e-2
            assert case.each * len(case.copies) >= 3


@needs_kernels
@pytest.mark.parametrize("count", [1, 2])
def test_the_probe_reads_every_byte_once(count: int) -> None:
    read = ctypes.CDLL(str(load().path)).ack_read
    read.restype, read.argtypes = ctypes.c_int64, bench_timing.Probe.ARGUMENTS
    words = torch.randint(-(2**62), 2**62, (4096,), generator=torch.Generator().manual_seed(3))
    torch.set_num_threads(count)
    for start in (0, 1, 7, 8, 9):
        for size in (0, 1, 7, 8, 9, 15, 16, 17, 100, 4000):
            part = words[start : start + size]
            found = read(part.data_ptr(), part.nbytes, load().parallel, count)
            assert found == int(part.sum()), (start, size)
    odd = words.view(torch.uint8)[3 : 3 + 77]  # words that lie across others, the last one short
    padded = torch.nn.functional.pad(odd, (0, 3)).view(torch.int64)
    assert read(odd.data_ptr(), odd.nbytes, None, count) == int(padded.sum())
    assert read(None, 8, None, 1) == 0


def fake_case(name: str, log: list[tuple[str, int]], copies: int = 3, runtime: str = "x") -> Case:
    def call(copy: int) -> None:
        log.append((name, copy))

    return Case(
        label=Label(runtime, name, 4, ""),
        bytes=1000,
        function=call,
        copies=[[(i,)] for i in range(copies)],
        turn=Turn(copies),
        check=lambda: (0.0, 0.0),
        limits=(1.0, 1.0),
        cold=True,
        threads=2,  # never taken again
    )


def test_cases_and_copies_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_timing, "_calls", lambda case: 4)
    log: list[tuple[str, int]] = []
    found = measure([fake_case(name, log) for name in "abc"], 3)
    assert [name for name, _ in log[::4]] == [*"abc", *"cba", *"abc"]
    copies = [copy for name, copy in log if name == "b"]
    assert copies == [i % 3 for i in range(12)]  # going on where the last sample ended
    assert [len(series.wall) for series in found] == [3, 3, 3]


def test_disturbed_samples_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = iter([(2.0, 1.0), (1.3, 1.0), (1.5, 1.0), (3.0, 1.0), (1.1, 1.0)])
    monkeypatch.setattr(bench_timing, "_calls", lambda case: 1)
    monkeypatch.setattr(bench_timing, "_sample", lambda case, calls: next(samples))
    case = fake_case("a", [])
    case.threads = 1
    (series,) = measure([case], 2)
    assert series.wall == [1.3, 1.1]  # the best of three, then the first that is whole
    assert series.stolen == 0.5


def test_intervals() -> None:
    assert interval([3.0]) == (3.0, 3.0, 3.0)
    assert interval([1, 2, 3, 4, 5]) == (3, 1, 5)
    middle, low, high = interval(range(100))
    assert (middle, low, high) == (49.5, 40, 59)


def series(kernel: str, bits: int, size: int, wall: list[float], **more: Any) -> Series:
    label = Label(more.pop("runtime", "native"), kernel, bits, more.pop("mode", "a8"), **more)
    return Series(label, size, 1, True, wall, list(wall))


def group(every: list[Series], rounds: int, m: int = 1) -> Group:
    probe = series("read", 64, 1000, [1.0] * rounds, runtime="probe")
    return Group((64, 64), m, 1, probe, every, 0.0, None)


def test_ratios_are_taken_within_rounds() -> None:
    # The machine is ten times slower in the second round; the ratio is 2 in both.
    slow, fast = series("a", 4, 1, [2.0, 20.0, 2.0]), series("b", 4, 1, [1.0, 10.0, 1.0])
    assert ratio(slow, fast) == (2, 2, 2)


def test_rivals_keep_as_many_bits() -> None:
    ours = series("q5", 5, 700, [1.0])
    every = [
        ours,
        series("int4pack", 4, 500, [0.1], runtime="aten", mode="bf16"),  # keeps less
        series("int8pack", 8, 900, [2.0], runtime="aten", mode="bf16"),
        series("linear", 16, 1800, [4.0], runtime="aten", mode="bf16"),
        series("Q4_K", 4, 500, [0.1], runtime="ggml", mode="fp32"),
        series("Q5_K", 5, 700, [5.0], runtime="ggml", mode="fp32"),
        series("Q5_0", 5, 700, [3.0], runtime="ggml", mode="fp32"),
        series("embedding", 16, 10, [0.1], runtime="aten", mode="bf16", task="rows"),
    ]
    row = group(every, 1).rows()[0]
    assert row["aten"] == {"kernel": "aten int8pack", "median": 2.0, "low": 2.0, "high": 2.0}
    assert row["ggml"]["kernel"] == "ggml Q5_0" and row["ggml"]["median"] == 3.0
    assert row["rival"] == row["aten"]


def test_slower_than_denser_needs_an_interval_above_1() -> None:
    rounds, families = 9, ("codes a8",)
    wobble = [1.0, 1.3, 0.7, 1.1, 0.9, 1.2, 0.8, 1.0, 1.0]
    light = series("q2", 2, 300, [2.0] * rounds, families=families)
    middle = series("q4", 4, 500, [1.01 * w for w in wobble], families=families)
    dense = series("q8", 8, 900, [1.0] * rounds, families=families)
    other = series("q8 asym", 8, 950, [0.1] * rounds, families=("codes asym a8",))
    found = group([light, middle, dense, other], rounds)
    (row,) = summary([found])["slower_than_denser"]
    assert (row["kernel"], row["than"], row["times"]["median"]) == ("q2", "q8", 2)
    few = group([light, middle, dense], 5)
    assert summary([few])["slower_than_denser"] is None
    assert summary([group([light, dense], rounds, m=8)])["slower_than_denser"] is None


def test_geometric_means_are_over_the_bits_that_both_have() -> None:
    rounds = 3
    ours = [series(f"q{bits}", bits, 10 * bits, [1.0] * rounds) for bits in (2, 3, 4, 5, 6, 8)]
    theirs = [
        series("Q4_K", 4, 45, [2.0, 4.0, 2.0], runtime="ggml", mode="fp32"),
        series("Q4_0", 4, 45, [9.0] * rounds, runtime="ggml", mode="fp32"),
        series("Q8_0", 8, 85, [8.0, 1.0, 8.0], runtime="ggml", mode="fp32"),
    ]
    bits, means = group([*ours, *theirs], rounds).against_ggml("")
    assert bits == [4, 8]
    assert means == pytest.approx([4, 2, 4])


def test_weights_repeat_a_bank_and_their_copies_leave_the_caches() -> None:
    assert bank_rows(5).tolist() == [0, 1, 2, 3, 4]
    assert bank_rows(BANK + 2)[-3:].tolist() == [BANK - 1, 0, 1]
    for size in (1 << 20, 100 << 20, 300_000):
        assert copies_of(size) >= 2 and is_cold(size)
    assert not is_cold(1000)
