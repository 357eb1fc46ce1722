"""A whole front of the tiny model in one run, and the commands that read its run folder."""

from __future__ import annotations

import csv
import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from runs import TOKENS, command, finished, write_config

import autocompress
from autocompress.core import Allocation, CostTable, Fidelity, Score, Trial
from autocompress.levels import parse_level
from autocompress.pareto import hypervolume, knee
from autocompress.ranges import range_texts
from autocompress.report.front import verdict
from autocompress.run_comparison import interval
from autocompress.runs import Study, front_of


@pytest.fixture(scope="module")
def searched(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three points between 2.5 and 5 bits; the run folder stands beside it. Read only."""
    folder = tmp_path_factory.mktemp("front")
    changes = {"generations": 1, "spend": 3000}
    config = write_config(folder / "config.toml", tiny_folder, TOKENS, **changes)
    asked = ("--config", config, "--pareto", "bits=2.5..5", "--points", 3)
    ran = command("search", *asked, "--out", folder / "front")
    assert ran.code == 0, ran.err
    assert "knee" in ran.out and "hypervolume" in ran.out
    return folder / "front"


@pytest.fixture(scope="module")
def facts(searched: Path) -> dict[str, Any]:
    return json.loads((searched / "front.json").read_text())


def test_every_point_is_a_model_within_its_limit(searched: Path, facts: dict[str, Any]) -> None:
    limits = [2.5, 3.75, 5.0]
    assert [point["limit"] for point in facts["points"]] == ["2.5bits", "3.75bits", "5bits"]
    losses = [point["validate"]["kl"] for point in facts["points"]]
    assert losses == sorted(losses, reverse=True)
    for limit, point in zip(limits, facts["points"], strict=True):
        assert limit - 0.3 < point["effective_bits"] <= limit
        inner = json.loads((searched / point["path"] / "autocompress.json").read_text())
        assert inner["effective_bits"] == point["effective_bits"]
        assert inner["budgets"][0]["text"] == point["limit"]
        weights = searched / point["path"] / "autocompress.safetensors"
        assert weights.stat().st_size == point["file_bytes"] <= point["total_bytes"]
        assert point["reloaded_kl"] > 0


def test_no_simple_answer_is_better(facts: dict[str, Any]) -> None:
    for point in facts["points"]:
        rivals = {role: row["validate"]["kl"] for role, row in point["rivals"].items()}
        assert {"uniform", "ends", "ilp", "search"} <= rivals.keys()
        simple = min(kl for role, kl in rivals.items() if role != "search")
        assert (
            point["validate"]["kl"] == rivals[point["role"]] == min(simple, point["validate"]["kl"])
        )


def test_hypervolume_and_knee_are_those_of_the_points(facts: dict[str, Any]) -> None:
    places = [(point["effective_bits"], point["validate"]["kl"]) for point in facts["points"]]
    cost, worst = facts["hypervolume"]["reference"]
    (x, a), (y, b), (z, c) = places
    area = (y - x) * (worst - a) + (z - y) * (worst - b) + (cost - z) * (worst - c)
    assert facts["hypervolume"]["value"] == pytest.approx(area)
    assert facts["knee"] == knee(np.array(places))


def test_a_baseline_that_wins_is_named() -> None:
    point = {"limit": "3bits", "role": "ends", "effective_bits": 3.0, "validate": {"kl": 0.1}}
    volume = {"value": 1.0, "reference": [6.0, 0.5]}
    facts = {"points": [point], "knee": None, "hypervolume": volume, "cost": "bits"}
    assert "first and last blocks high at 3bits" in verdict(facts)


def test_the_report_shows_every_point(searched: Path, facts: dict[str, Any]) -> None:
    page = (searched / "report.html").read_text()
    assert page.count("<details") == len({point["path"] for point in facts["points"]})
    assert "<script" not in page and "http" not in page
    for point in facts["points"]:
        assert f"{point['validate']['kl']:.4f}" in page
    assert page.count('class="bar ') >= 2 * len(facts["points"])


def test_front_lists_the_run_as_a_table_json_and_csv(searched: Path, facts: dict[str, Any]) -> None:
    found = command("front", searched, "--json").json()
    rows = list(
        csv.DictReader(io.StringIO(command("front", searched.with_name("front.run"), "--csv").out))
    )
    assert [float(row["kl"]) for row in rows] == [point["kl"] for point in found["points"]]
    for point in facts["points"]:  # the winner at every limit is the best that is listed there
        bits, kl = point["effective_bits"], point["validate"]["kl"]
        assert min(p["kl"] for p in found["points"] if p["effective_bits"] <= bits) == kl
    assert sum(point["knee"] for point in found["points"]) <= 1
    assert "knee" in command("front", searched).out
    by_size = command("front", searched, "--cost", "bytes", "--json").json()
    assert [p["levels"] for p in by_size["points"]] == [p["levels"] for p in found["points"]]


def test_what_may_be_an_accident_is_no_point() -> None:
    wobble = (1.0, -1.0, 1.0, -1.0)

    def trial(number: int, bits: int, loss: float, noise: float, origin: str) -> Trial:
        losses = tuple(loss + noise * it for it in wobble)
        fidelity, score = Fidelity(4, 0, "validate"), Score(losses, losses)
        allocation = Allocation((parse_level(f"w{number + 2}g64"),))
        return Trial(number, allocation, fidelity, score, (bits,), origin)

    trials = (
        trial(0, 2, 3.0, 0.0, "uniform w2g64"),
        trial(1, 3, 2.0, 0.0, "ilp"),
        trial(2, 3, 1.95, 0.5, "refinement"),  # 0.05 below the ILP, one standard error 0.29
        trial(3, 4, 1.0, 0.1, "refinement"),
        trial(4, 5, 0.98, 0.5, "evolution"),  # as little below what is proven already
    )
    tables = (CostTable("bits", "bits", 0, ()),)
    read = SimpleNamespace(trials=trials)
    found = front_of(Study(Path(), {}, SimpleNamespace(weights=1), tables, read))  # type: ignore[arg-type]
    assert [it.number for it in found.trials] == [0, 1, 3]
    assert found.reference == (5, 3.0), "the worst of all"
    assert found.hypervolume == 1 * 1.0 + 1 * 2.0  # up to (5, 3): beside 3 bits, beside 4 bits


def test_a_point_becomes_a_result(searched: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy.run"
    shutil.copytree(searched.with_name("front.run"), run)
    record = (run / "run.json").read_bytes()
    point = command("front", run, "--json").json()["points"][1]
    ran = command("export", run, "--point", 2, "--out", tmp_path / "two")
    assert ran.code == 0 and str(tmp_path / "two") in ran.out, ran.err
    facts = command("inspect", tmp_path / "two", "--json").json()
    assert {row["layer"]: row["level"] for row in facts["allocation"]} == point["levels"]
    assert facts["results"]["winner"]["validate"]["kl"] == point["kl"]
    assert (run / "run.json").read_bytes() == record, "what the run goes on with stays"
    ran = command("export", run, "--point", 99, "--out", tmp_path / "none")
    assert ran.code == 2 and "--point must be from 1 to" in ran.err
    assert not (tmp_path / "none").exists()


def test_runs_are_compared_window_by_window(searched: Path, tiny_folder: Path) -> None:
    other = finished(tiny_folder)
    facts = command("compare", searched, other, "--json").json()
    assert facts["windows"] == TOKENS["validate"] // 64
    (row, *_) = (it for it in facts["points"] if it["costs"][0] > 3.6)
    assert row["costs"][1] <= row["costs"][0] and row["low"] <= row["difference"] <= row["high"]
    assert row["difference"] == pytest.approx(row["losses"][1] - row["losses"][0])
    same = command("compare", searched, searched, "--json").json()
    assert all(it["difference"] == it["low"] == it["high"] == 0 for it in same["points"])


def test_bad_input_is_one_error_each(searched: Path, tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(searched.with_name("front.run"), run)
    record = json.loads((run / "run.json").read_text())
    for change, words in (
        ({"model": {**record["model"], "fingerprint": "x"}}, "must be of one dense model"),
        ({"windows": "x"}, "the same validation windows"),
        ({"format": 99}, "Upgrade autocompress"),
    ):
        (run / "run.json").write_text(json.dumps({**record, **change}))
        ran = command("compare", searched, run)
        assert ran.code == 2 and words in ran.err and ran.err.count("\n") == 1
    assert "must hold run.json" in command("front", tmp_path).err
    asked = ("search", "--run", searched.with_name("front.run"), "--out", tmp_path / "out")
    for more, words in (
        (("--pareto", "bits=5..2.5"), "lower one first"),
        (("--pareto", "bit=2.5..5"), "Did you mean 'bits'"),
        (("--pareto", "bits=1..5"), "at least 2.27 bits"),
        (("--pareto", "bits=2.5..5", "--budget", "4bits"), "must limit different costs"),
        (("--pareto", "bits=2.5..5", "--budget", "0.1KL"), "without a limit on the loss"),
        (("--pareto", "bits=2.5..5", "--strategy", "evolution"), "one of auto, nsgaii, sweep"),
        (("--pareto", "bits=2.5..5", "--points", "1"), "points must be between 2 and 64"),
    ):
        ran = command(*asked, *more)
        assert ran.code == 2 and words in ran.err, (more, ran.err)
    assert not (tmp_path / "out").exists()


def test_ranges_are_even_and_in_the_users_unit() -> None:
    assert range_texts("bits=2.5..6", 3) == ("2.5bits", "4.25bits", "6bits")
    assert range_texts(" bytes = 1e6..2e6 ", 2) == ("1000000B", "2000000B")
    assert range_texts("ms=5..9", 2) == ("5ms", "9ms")


def test_the_volume_below_a_reference() -> None:
    points = np.array([[1.0, 3.0], [2.0, 1.0], [5.0, 0.0]])
    assert hypervolume(points, np.array([4.0, 4.0])) == pytest.approx(3 * 1 + 2 * 2)
    assert hypervolume(points, np.array([0.5, 0.5])) == 0


def test_the_knee_is_furthest_below_the_line() -> None:
    assert knee(np.array([[0.0, 10.0], [1.0, 2.0], [5.0, 1.0], [10.0, 0.0]])) == 1
    assert knee(np.array([[0.0, 1.0], [1.0, 0.0]])) is None
    assert knee(np.array([[0.0, 2.0], [1.0, 1.5], [2.0, 0.0]])) is None, "a bulge is no knee"


def test_intervals_are_students() -> None:
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert (mean, high - mean) == (2.5, pytest.approx(3.182446 * 1.2909944 / 2))
    assert low == pytest.approx(5 - high)


def test_python_names_the_same(searched: Path, facts: dict[str, Any]) -> None:
    result = autocompress.FrontResult(searched, facts)
    model, _ = result.load(1)
    assert len(result.points) == 3 and model.config.quantization_config is not None
    assert callable(autocompress.search_front)


SERVE = """
import sys
from autocompress.cli import main
main()
"""


@pytest.fixture
def address(searched: Path) -> Any:
    """A dashboard of the run on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = ("dashboard", str(searched.with_name("front.run")), "--port", str(port))
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, *asked], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    assert f"http://127.0.0.1:{port}/dashboard/" in first, first
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(30)


def test_the_dashboard_serves_objectives_plots_and_note(address: str, tmp_path: Path) -> None:
    for _ in range(120):  # plots and note are drawn beside the first answers
        study = json.load(urllib.request.urlopen(f"{address}/api/studies/0"))
        if study["note"]["body"]:
            break
        time.sleep(0.5)
    assert study["objective_names"] == ["loss (KL, nats/token)", "effective bits", "bytes"]
    assert len(study["trials"]) > 8 and "Hypervolume" in study["note"]["body"]
    plots = {plot["id"]: plot["graph_object"] for plot in study["plotly_graph_objects"]}
    assert set(plots) == {"front", "allocations", "losses"}
    assert '"heatmap"' in plots["allocations"] and "incumbent" in plots["allocations"]
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium to open the page with")
    shown = subprocess.run(
        [
            *(
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={tmp_path}",
            ),
            *("--virtual-time-budget=8000", "--dump-dom", f"{address}/dashboard/studies/0"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    for words in ("Pareto Front", "effective bits", "Front on validation windows", "block 0"):
        assert words in shown, words
