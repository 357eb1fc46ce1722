"""The commands: fast to answer, JSON on request, progress out of the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import BUDGET, TOKENS, command, copied_run, finished, lasting, write_config

from autocompress.spaces import load_space

COMMANDS = ("search", "build", "eval", "inspect", "spaces")
HEAVY = ("torch", "transformers", "optuna", "numpy", "scipy", "datasets")


@pytest.fixture(scope="module")
def result(tiny_folder: Path) -> Path:
    return finished(tiny_folder)


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_needs_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom autocompress.cli import main\ntry:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"print(*[m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    ran = python(code, *arguments)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.split() == []
    if arguments in ([], ["--help"]):
        assert all(name in ran.stdout for name in COMMANDS)
    assert "Usage: " in ran.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json(name: str) -> None:
    assert "--json" in command(name, "--help").out


def test_spaces_are_listed() -> None:
    names = [row["name"] for row in command("spaces", "--json").json()]
    assert {"quant-2-8", "quant-2-8-tied"} <= set(names)
    shown = command("spaces")
    assert (shown.code, shown.err) == (0, "")
    assert "quant-2-8-tied" in shown.out


def test_build_makes_the_database_once(tiny_folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.toml", tiny_folder)
    out = tmp_path / "result"
    ran = command("build", "--config", config, "--out", out, "--json")
    facts = ran.json()
    manifest = Path(facts["path"]) / "manifest.json"
    before = manifest.stat().st_mtime_ns
    levels = len(load_space("quant-2-8").levels)
    assert facts["modules"] == 21 and facts["entries"] == 21 * levels
    assert not out.exists(), "the database alone makes no result"
    assert Path(facts["path"]).parent == tmp_path / "result.run"
    assert command("build", "--config", config, "--out", out, "--json").json() == facts
    assert manifest.stat().st_mtime_ns == before
    assert f"{21 * levels} entries" in command("build", "--config", config, "--out", out).out


def test_search_prints_pure_json(tiny_folder: Path, result: Path, tmp_path: Path) -> None:
    run = copied_run(tiny_folder, tmp_path / "run")
    out = tmp_path / "again"
    config = result.with_name("config.toml")
    # A process of its own: libraries that print do so past `sys.stdout`.
    ran = python(
        "from autocompress.cli import main; main()",
        *("search", "--config", config, "--budget", BUDGET, "--out", out, "--run", run, "--json"),
    )
    assert ran.returncode == 0, ran.stderr
    facts = json.loads(ran.stdout)
    assert facts == json.loads((out / "autocompress.json").read_text())
    assert "loading" in ran.stderr and "validate" in ran.stderr, "progress belongs there"
    assert lasting(facts) == lasting(json.loads((result / "autocompress.json").read_text()))


def test_flags_win_over_the_configuration(tiny_folder: Path, tmp_path: Path) -> None:
    config = write_config(
        *(tmp_path / "config.toml", tiny_folder),
        budgets=["3bits"],
        out=str(tmp_path / "result"),
        generations=0,
    )
    asked = ("search", "--config", config, "--json")
    facts = command(*asked).json()
    assert [budget["text"] for budget in facts["budgets"]] == ["3bits"], "the file's own budget"
    facts = command(*asked, "--budget", "4.5bits", "--seed", 3).json()
    assert [budget["text"] for budget in facts["budgets"]] == ["4.5bits"]
    assert facts["seed"] == 3
    assert facts["calibration"]["window"] == 64, "what no flag names is the file's"


def test_inspect_tells_what_the_issue_lists(result: Path) -> None:
    facts = command("inspect", result, "--json").json()
    assert 0 < facts["effective_bits"] <= 3.5
    assert facts["file_bytes"] == (result / "autocompress.safetensors").stat().st_size
    assert facts["total_bytes"] > 0
    assert [budget["text"] for budget in facts["budgets"]] == [BUDGET]
    assert set(facts["results"]) == {"dense", "uniform", "ends", "ilp", "winner"}
    for name, rival in facts["results"].items():
        splits = ("validate",) if name == "ends" else ("search", "validate", "test")
        for split in splits:
            assert rival[split]["perplexity"] > 1, (name, split)
            assert (rival[split]["kl"] == 0) is (name == "dense"), (name, split)


def test_inspect_prints_layers_and_scores(result: Path) -> None:
    ran = command("inspect", result)
    assert (ran.code, ran.err) == (0, "")
    for word in ("21 layers of model.layers", "2.mlp.down_proj", "w2g64 "):
        assert word in ran.out, "names must not be cut off at 80 columns"
    for word in ("Dense", "Uniform w3g64", "ILP", "Winner", "report.html"):
        assert word in ran.out


def test_eval_scores_any_text(result: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    asked = ("eval", result, "--data", data, "--window", 64, "--tokens", 640)
    facts = command(*asked, "--json").json()
    assert facts["tokens"] == 640
    assert facts["data"] == str(data)
    assert facts["dense"]["kl"] == 0 and facts["packed"]["kl"] > 0
    for name in ("dense", "packed"):
        assert facts[name]["perplexity"] > 1
    ran = command(*asked)
    assert ran.code == 0 and f"{facts['packed']['kl']:.4f}" in ran.out


def test_eval_agrees_with_the_search(tiny_folder: Path, tmp_path: Path) -> None:
    """A uniform model near dense scores near dense, one of 2 bits far from it."""
    config = write_config(tmp_path / "config.toml", tiny_folder, strategy="uniform")
    losses = []
    for name, budget in (("small", "2.4bits"), ("large", "8.5bits")):
        out, run = tmp_path / name, tmp_path / "run"
        asked = ("search", "--config", config, "--budget", budget, "--out", out, "--run", run)
        assert command(*asked).code == 0
        packed = command("eval", out, "--window", 64, "--tokens", 512, "--json").json()["packed"]
        losses.append(packed["kl"])
    small, large = losses
    assert 0 <= large < small / 10


def test_a_relative_model_is_found_from_elsewhere(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`eval` needs the dense model again, perhaps in another current directory."""
    monkeypatch.chdir(tiny_folder.parent)
    config = write_config(tmp_path / "config.toml", Path(tiny_folder.name), strategy="uniform")
    out = tmp_path / "result"
    assert command("search", "--config", config, "--budget", BUDGET, "--out", out).code == 0
    monkeypatch.chdir(tmp_path)
    assert command("eval", out, "--window", 64, "--tokens", 64, "--json").code == 0


def test_wrong_usage_is_one_line() -> None:
    for arguments in (["inspekt"], ["inspect"], ["search", "--nope"], ["search", "--seed", "x"]):
        ran = command(*arguments)
        assert ran.code == 2 and ran.out == ""
        assert ran.err.startswith("error: ") and ran.err.count("\n") == 1
        assert "--help" in ran.err


def test_ctrl_c_says_that_the_run_resumes(tiny_folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.toml", tiny_folder, {**TOKENS, "calibrate": 8192})
    asked = ("search", "--config", config, "--budget", BUDGET, "--out", tmp_path / "out")
    process = subprocess.Popen(
        [sys.executable, "-c", "from autocompress.cli import main; main()", *map(str, asked)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert "loading" in process.stderr.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130, rest
    assert "interrupted: run the same command again" in rest
    assert "Traceback" not in rest
