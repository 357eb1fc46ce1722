"""A run folder remembers its search: Ctrl-C, another budget, other facts, newer versions."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from runs import BUDGET, TOKENS, command, content, copied_run, finished, lasting, write_config


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C is heard: a shell ignores it for what it starts in the background, tests included."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, times: int = 1
) -> list[None]:
    """Ctrl-C at the given call of a function, `times` times in a row; returns its calls."""
    original, calls = getattr(owner, name), list[None]()

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        calls.append(None)
        for _ in range(times if len(calls) == call else 0):
            signal.raise_signal(signal.SIGINT)  # of this thread: it cannot come late
        return original(*arguments, **settings)

    monkeypatch.setattr(owner, name, interrupted)
    return calls


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "autocompress.json").read_text())


@pytest.fixture(scope="module")
def result(tiny_folder: Path) -> Path:
    return finished(tiny_folder)


def unsearched(model: Path, to: Path) -> Path:
    """A run folder with database and the dense model's distributions, and nothing else."""
    run = copied_run(model, to)
    for found in (*run.glob("*.jsonl"), *run.glob("sens*.json"), *run.glob("linear*.json")):
        found.unlink()
    return run


@pytest.mark.parametrize(
    ("module", "name", "call", "least"),
    [
        ("autocompress.study:Study", "_evaluate", 5, 3),
        ("torch:Tensor", "backward", 3, 2),  # two windows of sensitivities, then a linearization
        ("torch:Tensor", "backward", 1, 0),  # before the first candidate
    ],
)
def test_ctrl_c_exports_the_best_so_far_and_the_same_command_goes_on(
    result: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    name: str,
    call: int,
    least: int,
) -> None:
    config, out = write_config(tmp_path / "config.toml", tiny_folder), tmp_path / "result"
    unsearched(tiny_folder, tmp_path / "result.run")
    asked = ["search", "--config", str(config), "--budget", BUDGET, "--out", str(out)]
    with monkeypatch.context() as patched:
        interrupt(patched, resolve_name(module), name, call)
        ended = command(*asked)
    assert ended.code == 130, ended.err
    assert "stopping" in ended.err and "run the same command again" in ended.err
    assert ("before the first candidate" in ended.err) == (least == 0)
    facts, whole = read(out), read(result)
    assert facts["stopped"] and "Ctrl-C ended this search" in facts["notes"][0]
    searched = [trial for trial in facts["trials"] if trial["split"] == "search"]
    everything = [trial for trial in whole["trials"] if trial["split"] == "search"]
    assert least <= len(searched) < len(everything)
    losses = {name: row["validate"]["kl"] for name, row in facts["results"].items()}
    assert losses["winner"] <= min(losses["uniform"], losses["ilp"], losses["ends"])
    again = command(*asked, "--json").json()
    assert not again["stopped"]
    assert again["results"] == whole["results"] and again["allocation"] == whole["allocation"]


def test_ctrl_c_before_a_front_has_its_first_point(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = unsearched(tiny_folder, tmp_path / "result.run")
    interrupt(monkeypatch, resolve_name("torch:Tensor"), "backward", 1)
    asked = ("--pareto", "bits=2.5..5", "--points", 3, "--out", tmp_path / "front")
    ended = command("search", "--run", run, *asked)
    assert ended.code == 130, ended.err
    (point,) = json.loads((tmp_path / "front" / "front.json").read_text())["points"]
    assert point["limit"] == "2.5bits" and point["role"] in ("uniform", "ends", "ilp")
    assert (tmp_path / "front" / "2.5bits" / "autocompress.safetensors").exists()


def test_ctrl_c_while_a_result_is_written(
    result: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, run = tmp_path / "out", copied_run(tiny_folder, tmp_path / "demo.run")
    asked = ("search", "--run", run, "--out", out)
    with monkeypatch.context() as patched:
        interrupt(patched, resolve_name("autocompress.writing"), "save_native", 1, times=2)
        ended = command(*asked)
    assert ended.code == 130 and "run the same command again" in ended.err
    assert not (out / "autocompress.json").exists(), "a half-written result is none"
    with monkeypatch.context() as patched:
        interrupt(patched, resolve_name("autocompress.writing"), "save_native", 1)
        ended = command(*asked)
    assert ended.code == 0 and "the search itself is done" in ended.err, "nothing is lacking"
    assert not read(out)["stopped"] and read(out)["allocation"] == read(result)["allocation"]


def test_ctrl_c_while_the_database_is_built(
    result: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "config.toml", tiny_folder)
    asked = ("build", "--config", config, "--out", tmp_path / "out")
    database = resolve_name("autocompress.database:LevelDatabase")
    with monkeypatch.context() as patched:
        interrupt(patched, database, "enter", 3)
        ended = command(*asked)
    assert ended.code == 130 and "run the same command again" in ended.err
    with monkeypatch.context() as patched:
        calls = interrupt(patched, database, "enter", 0)
        assert command(*asked).code == 0
    groups = len(list((result.with_name("result.run") / "database").glob("*.safetensors")))
    assert len(calls) == groups - 2, "what was built is not built again"
    for name, built in content(result.with_name("result.run") / "database").items():
        if name.endswith(".safetensors"):
            assert (tmp_path / "out.run" / "database" / name).read_bytes() == built


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
