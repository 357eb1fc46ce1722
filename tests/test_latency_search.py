"""Budgets in time on the tiny model: limits hold, stores travel, errors are one line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import BUDGET, Ran, command, copied_run, finished, write_config

from autocompress.core import CostTable
from autocompress.latency_search import Held, better
from autocompress.latency_setup import Latency
from autocompress.latency_store import LatencyStore, ModelPart
from autocompress.latency_timing import Measured
from autocompress.levels import parse_level
from autocompress.targets import register_target

FIXED = 1.0  # ms, of the toy target
SPACE = 'name = "small"\nlevels = ["w2g64", "w4g64", "w8g128"]\nscope = ["blocks"]\n'


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target where w5 and w6 have no kernel and every other bit takes 1 µs a layer."""
    monkeypatch.setattr("autocompress.targets.TARGETS", {})

    @register_target("toy")
    def price(space: Any, target: Any) -> CostTable:
        row = {level: price_of(level) for level in space.all_levels()}
        entries = tuple({level: row[level] for level in allowed} for allowed in space.levels)
        return CostTable("latency", "ms", FIXED, entries)


def price_of(level: Any) -> float:
    return math.inf if level.bits in (5, 6) else 1e-3 * level.bits


def search(model: Path, folder: Path, *arguments: object) -> Ran:
    if not (folder / "run").exists():
        copied_run(model, folder / "run")
    config = write_config(folder / "config.toml", model)
    asked = ("--config", config, "--out", folder / "result", "--run", folder / "run")
    return command("search", *asked, *arguments, "--json")


def total(facts: dict[str, Any], fixed: float = FIXED) -> float:
    return fixed + sum(1e-3 * parse_level(row["level"]).bits for row in facts["allocation"])


def assert_refused(ran: Ran, *words: str) -> None:
    assert (ran.code, ran.out) == (2, ""), ran
    last = ran.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in ran.err
    for word in words:
        assert word in last, last


# Another target, stated by a function


@pytest.mark.usefixtures("toy")
def test_bits_and_milliseconds_hold_together(tiny_folder: Path, tmp_path: Path) -> None:
    limit = FIXED + 21 * 3.1e-3
    asked = ("--budget", BUDGET, "--budget", f"{limit}ms", "--target", "toy")
    facts = search(tiny_folder, tmp_path, *asked).json()
    bits, latency = facts["budgets"]
    assert bits["reached"] <= bits["limit"]
    assert latency["cost"] == "latency" and latency["limit"] == limit
    assert latency["reached"] == pytest.approx(total(facts)) and latency["reached"] <= limit / 1.01
    assert {row["level"][:2] for row in facts["allocation"]} <= {"w2", "w3", "w4", "w8"}
    dropped = {row["level"] for row in facts["latency"]["dropped"]}
    assert dropped == {"w5g128", "w6g128"}
    for name in ("uniform", "ilp", "winner"):
        row = facts["results"][name]["latency"]
        assert row["predicted_ms"] <= limit and row["measured_ms"] is None
    assert facts["latency"]["tries"] == 1 and "runtime" not in facts
    for name in ("report.md", "report.html"):
        text = (tmp_path / "result" / name).read_text()
        assert f"about {latency['reached']:.2f}" in text or name == "report.md"
        assert "no kernel" in text and "Latency" in text and f"{limit:.2f} ms predicted" in text
    shown = command("inspect", tmp_path / "result")
    assert "ms/token" in shown.out and "about" in shown.out


@pytest.mark.usefixtures("toy")
def test_time_alone_and_as_a_speed(tiny_folder: Path, tmp_path: Path) -> None:
    per_second = 1000 / (FIXED + 21 * 4.1e-3)
    facts = search(tiny_folder, tmp_path, "--budget", f"{per_second}tokens/s", "--target", "toy")
    (budget,) = facts.json()["budgets"]
    assert budget["reached"] <= budget["limit"] == pytest.approx(1000 / per_second)
    assert facts.json()["results"]["uniform"]["level"].startswith("w3"), (
        "w4 with its margin is over"
    )


@pytest.mark.usefixtures("toy")
def test_a_limit_that_only_fits_without_a_margin(tiny_folder: Path, tmp_path: Path) -> None:
    facts = search(tiny_folder, tmp_path, "--budget", "1.045ms", "--target", "toy").json()
    assert 1.045 / (1 + facts["latency"]["margin"]) < total(facts) <= 1.045


@pytest.mark.usefixtures("toy")
def test_impossible_times_and_unknown_dense_models(tiny_folder: Path, tmp_path: Path) -> None:
    def refused(*budgets: str) -> Ran:
        flags = [word for budget in budgets for word in ("--budget", budget)]
        return search(tiny_folder, tmp_path, *flags, "--target", "toy")

    assert_refused(refused("1ms"), "must be at least 1.05 ms, the fastest", "Got 1ms")
    assert_refused(refused("5000tokens/s"), "must be at most", "tokens/s", "lower the budget")
    assert_refused(refused("2x"), "this target does not state", "Write the limit in ms")
    assert_refused(refused("8bits", "5lightyears"), "one of the units", "'5lightyears'")
    assert not (tmp_path / "result").exists()


def test_no_such_target(tiny_folder: Path, tmp_path: Path) -> None:
    for name, words in (
        ("gpu", "a target must be cpu"),
        ("no.such:thing", "must be importable"),
        (str(tmp_path / "none.json"), "must be readable"),
    ):
        ran = search(tiny_folder, tmp_path, "--budget", "9ms", "--target", name)
        assert_refused(ran, words)


@pytest.mark.parametrize("name", ["search", "profile"])
def test_threads(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    asked = ("--budget", "9ms", "--out", tmp_path / "o") if name == "search" else ()
    for threads, words in ((0, "between 1 and 1024. Got 0"), (999, "at most the")):
        ran = command(name, "--model", tiny_folder, *asked, "--threads", threads)
        assert_refused(ran, words)


# This machine: measured, but no test asserts a time


@pytest.fixture(scope="module")
def measured(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small space, a cache of its own and what `profile` measured."""
    folder = tmp_path_factory.mktemp("latency")
    (folder / "small.toml").write_text(SPACE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOCOMPRESS_CACHE", str(folder / "cache"))
        ran = profile(tiny_folder, folder, "--export", folder / "copy.json", "--json")
    (folder / "facts.json").write_text(json.dumps(ran.json()))
    return folder


@pytest.fixture
def cache(measured: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the measured cache, in use."""
    shutil.copytree(measured / "cache", tmp_path / "cache")
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def profile(model: Path, folder: Path, *arguments: object) -> Ran:
    asked = ("--model", model, "--space", folder / "small.toml", "--dtype", "float32")
    return command("profile", *asked, *arguments)


def test_a_profile_has_every_level_of_every_shape(measured: Path) -> None:
    facts = json.loads((measured / "facts.json").read_text())
    points = {(tuple(row["shape"]), row["level"]) for row in facts["points"]}
    shapes = [(64, 64), (32, 64), (160, 64), (64, 160)]
    assert points == {(shape, level) for shape in shapes for level in ("w2g64", "w4g64", "w8g128")}
    for row in facts["points"]:
        assert row["us"] > 0 and row["low"] <= row["ratio"] <= row["high"] and row["bytes"] > 0
        assert row["rounds"] >= 7 and row["rows"] == 1
    part = facts["model"]
    assert part["dense_ms"] > 0 and part["decoder"] and len(part["references"]) >= 2
    assert facts["machine"]["threads"] == facts["target"]["threads"] >= 1


def test_what_is_known_is_not_measured_again(
    tiny_folder: Path, measured: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autocompress.latency_local.measure", None)
    monkeypatch.setattr("autocompress.latency_local.time_models", None)
    ran = profile(tiny_folder, measured, "--json")
    assert ran.json()["points"] == json.loads((measured / "facts.json").read_text())["points"]
    shown = profile(tiny_folder, measured)
    assert shown.code == 0, shown.err
    for word in ("160x64", "w8g128", "GB/s", "per token outside the table"):
        assert word in " ".join(shown.out.split()), shown.out
    assert "…" not in shown.out  # 80 columns are enough
    assert str(cache) in shown.out.replace("\n", ""), shown.out


def test_a_store_travels(
    tiny_folder: Path, measured: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another machine's store prices a search; nothing is measured here."""
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("autocompress.latency_local.measure", None)
    monkeypatch.setattr("autocompress.latency_setup.time_models", None)
    store = LatencyStore.read(measured / "copy.json")
    store.identity["cpu"] = "another machine's"
    store.export(tmp_path / "board.json")
    asked = ("--space", measured / "small.toml", "--target", tmp_path / "board.json")
    config = write_config(tmp_path / "config.toml", tiny_folder)
    asked = ("--config", config, "--out", tmp_path / "result", *asked, "--budget")
    facts = command("search", *asked, "1000ms", "--budget", "5bits", "--json").json()
    assert facts["latency"]["machine"]["cpu"] == "another machine's"
    assert facts["results"]["winner"]["latency"]["measured_ms"] is None
    assert not (tmp_path / "empty").exists()
    assert_refused(command("search", *asked, "9ms", "--threads", 77), "must be those of the", "77")
    other = command("search", *asked, "9ms", "--prompt", 33)
    assert_refused(other, "must hold the latency of this model for decode at batch 1 after 33")
    refused = command("profile", "--import", tmp_path / "board.json", "--dtype", "float32")
    assert_refused(refused, 'cpu "another machine\'s" instead of', "--target FILE")


def test_import_takes_a_store_of_this_machine(
    measured: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "fresh"))
    asked = ("--import", measured / "copy.json", "--dtype", "float32", "--json")
    facts = command("profile", *asked).json()
    made, given = (LatencyStore.read(Path(p)) for p in (facts["path"], measured / "copy.json"))
    assert (made.timings, made.models) == (given.timings, given.models)


def test_an_edited_store_is_refused(tiny_folder: Path, measured: Path, cache: Path) -> None:
    (path,) = (cache / "latency").glob("*.json")
    path.write_text(path.read_text().replace('"us": ', '"us": 1'))
    assert_refused(profile(tiny_folder, measured), "its checksum differs", str(path))


def test_a_store_of_other_hardware_is_refused(
    tiny_folder: Path, measured: Path, cache: Path
) -> None:
    (path,) = (cache / "latency").glob("*.json")
    store = LatencyStore.read(path)
    store.identity["caches"] = {"L3": 1}
    store.save()
    assert_refused(profile(tiny_folder, measured), "caches {'L3': 1} instead of", "--target FILE")


def test_a_target_without_kernels(
    tiny_folder: Path, measured: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autocompress.backends import BACKENDS

    for name in ("native", "aten", "dequantize"):
        backend = type(BACKENDS[name])
        monkeypatch.setattr(backend, "supports", lambda *_: "it is not built for this machine")
    ran = profile(tiny_folder, measured)
    assert_refused(ran, "must have a level that runs", "no kernel", "not built for this machine")


# A machine that is slower than predicted


def slower(monkeypatch: pytest.MonkeyPatch, factors: list[float]) -> list[int]:
    """Prices of the toy target on "this machine", where try by try models take that much longer.

    Returns:
        The number of models timed in each try, as it happens.
    """
    timed: list[int] = []

    def price(loaded: Any, space: Any, target: Any, progress: Any, *, fresh: bool) -> Latency:
        assert fresh, "finalists are timed now, so predictions must be of now"
        row = {level: 1e-3 * level.bits for level in space.all_levels()}
        entries = tuple({level: row[level] for level in allowed} for allowed in space.levels)
        table = CostTable("latency", "ms", FIXED, entries)
        return Latency(target, table, (), ModelPart(FIXED, 1.0, 4.0, 0.0))

    def measure(
        self: Latency, model: Any, space: Any, allocations: Any, source: Any, progress: Any
    ) -> list[Measured]:
        factor = factors[min(len(timed), len(factors) - 1)]
        timed.append(len(allocations))
        found = [factor * self.table.total(it) for it in allocations]
        return [Measured(ms, 0.999 * ms, 1.001 * ms, "fake", {"native": "1"}) for ms in found]

    monkeypatch.setattr("autocompress.latency_setup.price", price)
    monkeypatch.setattr(Latency, "measure", measure)
    return timed


@pytest.mark.parametrize(
    ("factors", "tries"), [([1.0], 1), ([0.8], 2), ([1.02], 2), ([1.0201, 1.03, 1.035], 4)]
)
def test_the_measured_winner_is_within_the_limit(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    factors: list[float],
    tries: int,
) -> None:
    timed = slower(monkeypatch, factors)
    limit = FIXED + 21 * 5e-3
    facts = search(tiny_folder, tmp_path, "--budget", f"{limit}ms", "--budget", "8bits").json()
    winner = facts["results"]["winner"]["latency"]
    assert winner["high_ms"] <= limit
    assert winner["measured_ms"] == pytest.approx(factors[-1] * total(facts, FIXED), rel=1e-6)
    assert winner["error"] == pytest.approx(winner["predicted_ms"] / winner["measured_ms"] - 1)
    assert len(timed) == facts["latency"]["tries"] <= tries
    assert (facts["latency"]["tries"] > 1) is (tries > 1)
    assert facts["runtime"] == {"backends": {"native": "1"}}
    assert facts["results"]["dense"]["latency"]["measured_ms"] == 4.0
    former = json.loads((finished(tiny_folder) / "autocompress.json").read_text())["trials"]
    splits = [trial["split"] for trial in facts["trials"][len(former) :]]
    chosen = splits.index("test")
    assert "validate" not in splits[chosen:], "test windows are seen after the last try only"
    assert splits.count("test") <= 3


def test_half_of_dense_is_a_limit_in_ms(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slower(monkeypatch, [1.0])
    (budget,) = search(tiny_folder, tmp_path, "--budget", "3.6x").json()["budgets"]
    assert budget["reached"] <= budget["limit"] == pytest.approx(4.0 / 3.6)


def test_a_limit_that_no_try_meets_is_an_error(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slower(monkeypatch, [1.03, 1.045, 1.07, 1.2])
    ran = search(tiny_folder, tmp_path, "--budget", f"{FIXED + 21 * 5e-3}ms")
    assert_refused(ran, "the measured latency must be within", "after 4 searches", "is quiet")
    assert not (tmp_path / "result").exists()


def test_time_that_a_winner_leaves_is_used(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = slower(monkeypatch, [0.95])
    limit = FIXED + 21 * 4e-3
    facts = search(tiny_folder, tmp_path, "--budget", f"{limit}ms").json()
    winner = facts["results"]["winner"]["latency"]
    assert len(timed) == 2 and winner["predicted_ms"] > limit >= winner["high_ms"]


def test_later_tries_that_are_too_slow_leave_the_first(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = slower(monkeypatch, [0.95, 1.1, 1.2, 1.3])
    limit = FIXED + 21 * 4e-3
    facts = search(tiny_folder, tmp_path, "--budget", f"{limit}ms").json()
    winner = facts["results"]["winner"]["latency"]
    assert len(timed) > 1 and winner["measured_ms"] < 0.95 * limit
    assert winner["measured_ms"] == pytest.approx(0.95 * total(facts))


def test_the_fastest_is_measured_before_a_limit_is_given_up(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prices times what the first try exceeded them would leave nothing within the limit."""
    timed = slower(monkeypatch, [1.02, 1.0])
    facts = search(tiny_folder, tmp_path, "--budget", "1.06ms").json()
    assert len(timed) == 2 and total(facts) == pytest.approx(FIXED + 21 * 2e-3)
    slower(monkeypatch, [1.02])
    (tmp_path / "other").mkdir()
    ran = search(tiny_folder, tmp_path / "other", "--budget", "1.06ms")
    assert_refused(ran, "the measured latency must be within", "after 2 searches")


def test_of_two_tries_that_hold_the_one_of_less_loss_stays() -> None:
    one, other = (Held("ilp", {}, {"ilp": SimpleNamespace(loss=loss)}, {}) for loss in (0.1, 0.2))  # type: ignore[dict-item]
    assert better(None, one) is better(one, other) is better(other, one) is one


# Calibration


def test_predictions_are_calibrated(tiny_folder: Path, measured: Path, cache: Path) -> None:
    (path,) = (cache / "latency").glob("*.json")
    store = LatencyStore.read(path)
    ((key, part),) = store.models.items()
    latency = Latency(None, None, (), part, store, key)  # type: ignore[arg-type]
    latency.calibrate([(10.0, 11.0), (10.0, 12.0), (10.0, 13.0), (-1.0, 5.0)])
    assert LatencyStore.read(path).models[key].calibration == pytest.approx(1.2)
    latency.calibrate([(1.0, 100.0)])
    assert LatencyStore.read(path).models[key].calibration == pytest.approx(1.2), "absurd"
