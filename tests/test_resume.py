"""A run folder remembers its search: Ctrl-C, another budget, other facts, newer versions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import BUDGET, TOKENS, command, copied_run, finished, lasting, write_config

INTERRUPT = """
import os, signal, sys
from autocompress.cli import main
from autocompress.study import Study

original, calls, wanted = Study._evaluate, [], int(sys.argv.pop(1))
def interrupted(*arguments, **settings):
    calls.append(None)
    if len(calls) == wanted:
        os.kill(os.getpid(), signal.SIGINT)
    return original(*arguments, **settings)
Study._evaluate = interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "autocompress.json").read_text())


@pytest.fixture(scope="module")
def result(tiny_folder: Path) -> Path:
    return finished(tiny_folder)


def test_ctrl_c_exports_the_best_so_far_and_the_same_command_goes_on(
    result: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    config, out = write_config(tmp_path / "config.toml", tiny_folder), tmp_path / "result"
    run = copied_run(tiny_folder, tmp_path / "result.run")
    (run / "evaluations.jsonl").unlink()
    asked = ["search", "--config", str(config), "--budget", BUDGET, "--out", str(out)]
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPT, "5", *asked],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 130, ended.stderr
    assert "stopping" in ended.stderr and "run the same command again" in ended.stderr
    facts, whole = read(out), read(result)
    assert facts["stopped"] and "Ctrl-C ended this search" in facts["notes"][0]
    searched = [trial for trial in facts["trials"] if trial["split"] == "search"]
    everything = [trial for trial in whole["trials"] if trial["split"] == "search"]
    assert 3 <= len(searched) < len(everything)
    losses = {name: row["validate"]["kl"] for name, row in facts["results"].items()}
    assert losses["winner"] <= min(losses["uniform"], losses["ilp"], losses["ends"])
    again = command(*asked, "--json").json()
    assert not again["stopped"]
    assert again["results"] == whole["results"] and again["allocation"] == whole["allocation"]


def test_a_run_folder_alone_searches_for_another_budget_at_a_quarter(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """All tokens, with those of baselines, races and tests, which weigh more where all is tiny."""
    sizes = {**TOKENS, "validate": 128, "test": 128}
    config = write_config(tmp_path / "c.toml", tiny_folder, sizes, generations=99, spend=24_000)
    asked = ("--config", config, "--budget", BUDGET, "--out", tmp_path / "demo")
    before = command("search", *asked, "--json").json()
    run = tmp_path / "demo.run"
    facts = command("search", "--run", run, "--budget", "4.25bits", "--json").json()
    assert facts["model"] == before["model"] and facts["calibration"] == before["calibration"]
    assert facts["budgets"][0]["text"] == "4.25bits"
    assert read(tmp_path / "demo-4.25bits") == facts, "beside the run folder, under its name"
    assert read(tmp_path / "demo") == before
    spent = {step: facts["tokens"][step] - before["tokens"][step] for step in before["tokens"]}
    assert spent["sensitivities"] == spent["calibrate"] == 0 < spent["linearization"]
    assert spent["total"] <= before["tokens"]["total"] / 4
    again = command("search", "--run", run, "--json").json()
    assert lasting(again) == lasting(facts), "without a budget: the last search again"


def test_a_part_of_the_space_reuses_everything(tiny_folder: Path, tmp_path: Path) -> None:
    run = copied_run(tiny_folder, tmp_path / "demo.run")
    built = (run / "database" / "manifest.json").read_bytes()
    pin = ("--pin", "*.down_proj=w4g64", "--out", tmp_path / "out")
    facts = command("search", "--run", run, *pin, "--json").json()
    assert {r["level"] for r in facts["allocation"] if "down_proj" in r["layer"]} == {"w4g64"}
    assert (run / "database" / "manifest.json").read_bytes() == built


def test_other_text_or_space_is_refused_by_name(tiny_folder: Path, tmp_path: Path) -> None:
    run = copied_run(tiny_folder, tmp_path / "demo.run")
    text = tmp_path / "other.txt"
    text.write_text(
        "\n\n".join(f"Number {i} is another number than {i + 1}." * 40 for i in range(99))
    )
    ran = command("search", "--run", run, "--calibration", text)
    assert ran.code == 2 and "calibration" in ran.err and len(ran.err) < 1500
    ran = command("search", "--run", run, "--space", "quant-2-8-tied")
    assert ran.code == 2 and "space" in ran.err


def test_a_newer_version_wrote_it(tiny_folder: Path, tmp_path: Path) -> None:
    run = copied_run(tiny_folder, tmp_path / "demo.run")
    for name in ("run.json", "study.json"):
        content = (run / name).read_text()
        (run / name).write_text(json.dumps({**json.loads(content), "format": 99}))
        ran = command("search", "--run", run, "--budget", BUDGET)
        assert ran.code == 2 and "Upgrade autocompress" in ran.err, ran.err
        (run / name).write_text(content)


def test_recording_is_measured(result: Path) -> None:
    facts = read(result)
    assert 0 < facts["recording"] < sum(facts["seconds"].values())
