"""The straight line on the tiny model: budgets, resume, reuse, what stands on the disk."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from runs import (
    BUDGET,
    SETTINGS,
    TOKENS,
    command,
    content,
    copied_run,
    finished,
    lasting,
    write_config,
)
from safetensors import safe_open

import autocompress
from autocompress import parse_level
from autocompress.calibration import SplitTokens
from autocompress.models import load_model
from autocompress.optuna_storage import JOURNAL, open_storage
from autocompress.run_record import RECORD

SPLITS = ("calibrate", "search", "validate", "test")
OTHER_BUDGET = "4.25bits"


@pytest.fixture(scope="module")
def result(tiny_folder: Path) -> Path:
    return finished(tiny_folder)


@pytest.fixture(scope="module")
def facts(result: Path) -> dict[str, Any]:
    return read(result)


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "autocompress.json").read_text())


def search(
    model: Path, folder: Path, *arguments: object, budget: str = BUDGET, **settings: object
) -> dict[str, Any]:
    """Facts of a search into `folder`/result."""
    config = write_config(folder / "config.toml", model, **settings)
    asked = ("--config", config, "--out", folder / "result", "--json")
    return command("search", *asked, "--budget", budget, *arguments).json()


def stored_bits(facts: Mapping[str, Any], model: Path) -> tuple[int, int]:
    """Stored bits and dense weights in scope, from the levels and the dense file's shapes."""
    bits = weights = 0
    with safe_open(model / "model.safetensors", "pt") as file:
        for row in facts["allocation"]:
            for module in row["modules"]:
                rows, width = file.get_slice(f"{module}.weight").get_shape()
                bits += parse_level(row["level"]).storage_bits((rows, width))
                weights += rows * width
    return bits, weights


def packed_bits(out: Path) -> int:
    """Bits of every packed tensor in the result's weights file."""
    with safe_open(out / "autocompress.safetensors", "pt") as file:
        parts = [name for name in file.keys() if name.endswith((".codes", ".scales", ".zeros"))]
        return 8 * sum(file.get_tensor(name).nbytes for name in parts)


def levels(facts: Mapping[str, Any]) -> dict[str, str]:
    return {row["layer"]: row["level"] for row in facts["allocation"]}


# One search


def test_the_budget_is_met_to_the_bit(
    facts: dict[str, Any], result: Path, tiny_folder: Path
) -> None:
    bits, weights = stored_bits(facts, tiny_folder)
    (budget,) = facts["budgets"]
    assert budget["limit"] == math.floor(3.5 * weights)
    assert budget["reached"] == bits <= budget["limit"]
    assert facts["effective_bits"] == bits / weights == facts["results"]["winner"]["effective_bits"]
    assert bits == sum(row["bits"] for row in facts["allocation"]) == packed_bits(result)
    assert budget["limit"] - bits < 0.03 * budget["limit"], "a search uses what it may use"


def test_the_file_is_as_large_as_the_table_says(facts: dict[str, Any], result: Path) -> None:
    size = (result / "autocompress.safetensors").stat().st_size
    assert facts["file_bytes"] == size
    assert size <= facts["total_bytes"], "the table is an upper limit"
    assert size >= 0.97 * facts["total_bytes"], "headers weigh more in tiny files than 1 %"
    assert facts["model_bits"] == 8 * facts["total_bytes"] / facts["model"]["parameters"]


def test_the_winner_loses_to_no_baseline_on_validation(facts: dict[str, Any]) -> None:
    losses = {name: row["validate"]["kl"] for name, row in facts["results"].items()}
    assert losses["dense"] == 0
    assert 0 < losses["winner"] <= min(losses["uniform"], losses["ilp"])
    assert facts["results"]["uniform"]["level"] == "w3g64", "the nearest uniform below 3.5 bits"


def test_the_splits_are_disjoint_and_recorded(facts: dict[str, Any], result: Path) -> None:
    record = facts["calibration"]
    for split in SPLITS:
        assert record["splits"][split]["tokens"] == TOKENS[split]
        assert record["splits"][split]["documents"]
    for one, other in itertools.combinations(SPLITS, 2):
        documents = [set(record["splits"][split]["documents"]) for split in (one, other)]
        assert not documents[0] & documents[1], (one, other)
    study = json.loads((result.with_name("result.run") / "study.json").read_text())
    assert study["calibration"] == record


def test_the_report_is_about_the_winner(facts: dict[str, Any], result: Path) -> None:
    loss = f"{facts['results']['winner']['test']['kl']:.4f}"
    for name in ("report.md", "report.html"):
        text = (result / name).read_text()
        assert "Winner" in text and loss in text and f"{facts['effective_bits']:.4f}" in text
        for row in facts["allocation"]:
            assert row["layer"].rpartition(".")[2] in text.replace("<wbr>", "")


def test_optuna_opens_the_study(facts: dict[str, Any], result: Path) -> None:
    storage = open_storage(result.with_name("result.run") / JOURNAL)
    (name,) = optuna.study.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    assert len(study.directions) == 3
    trials = [trial.user_attrs for trial in study.get_trials()]
    same = facts["results"]["winner"] == facts["results"]["ilp"]  # the search found nothing better
    roles = {trial["role"] for trial in trials}
    assert {"baseline", "candidate"} <= roles <= {"baseline", "candidate", "finalist"}
    assert same or "finalist" in roles
    baselines = {trial["origin"] for trial in trials if trial["role"] == "baseline"}
    assert {"uniform w3g64", "ilp"} <= baselines <= {"uniform w3g64", "ends", "ilp"}
    table = (result.with_name("result.run") / "evaluations.jsonl").read_text().splitlines()
    known = {row["allocation"] for row in map(json.loads, table) if "allocation" in row}
    assert {trial["allocation"] for trial in trials} <= known
    assert all(trial["bits"] <= facts["budgets"][0]["limit"] for trial in trials)


def test_the_packed_model_computes_what_was_scored(
    facts: dict[str, Any], result: Path, tiny_folder: Path
) -> None:
    """Loss of the loaded model on the search's own test text is the reported one."""
    from autocompress.calibration import calibration_windows
    from autocompress.quality import score, teacher

    model, tokenizer = autocompress.load(result, activations="float32")
    assert model.dtype == torch.float32
    windows = calibration_windows(
        None,
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        64,
        SplitTokens(**TOKENS),
        separator=tokenizer.eos_token_id,
    )
    assert windows.fingerprint == facts["calibration"]["fingerprint"]
    dense = load_model(str(tiny_folder), torch.float32)
    for split in ("validate", "test"):
        found = score(model, teacher(dense.model, windows.split(split)))
        reported = facts["results"]["winner"][split]
        assert found.loss == pytest.approx(reported["kl"], rel=1e-3)
        assert found.perplexity == pytest.approx(reported["perplexity"], rel=1e-4)


def test_no_test_token_was_seen_before_the_winner_was_chosen(facts: dict[str, Any]) -> None:
    splits = [trial["split"] for trial in facts["trials"]]
    assert "validate" not in splits[splits.index("test") :]
    chosen = splits.index("validate")
    assert "test" not in splits[:chosen]


# Again


def test_the_same_search_evaluates_nothing_new(
    facts: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    run = copied_run(tiny_folder, tmp_path / "run")
    before = content(run)
    mirrored = before.pop(JOURNAL)
    again = search(tiny_folder, tmp_path, "--run", run)
    after = content(run)
    assert before.pop(RECORD) != after.pop(RECORD), "results go elsewhere"
    assert after.pop(JOURNAL).count(b'"state"') == mirrored.count(b'"state"') > 0, "trials"
    assert after == before
    assert lasting(again) == lasting(facts)
    assert again["tokens"] == facts["tokens"]


def test_a_search_is_deterministic(
    facts: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    """From nothing, in another folder: the same numbers."""
    again = search(tiny_folder, tmp_path)
    assert lasting(again) == lasting(facts)


def test_another_seed_keeps_the_text_and_the_database(
    facts: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    run = copied_run(tiny_folder, tmp_path / "run")
    database = (run / "database" / "manifest.json").stat().st_mtime_ns
    other = search(tiny_folder, tmp_path, "--run", run, "--seed", 1)
    assert (run / "database" / "manifest.json").stat().st_mtime_ns == database
    assert other["calibration"] == facts["calibration"]
    assert other["results"]["uniform"] == facts["results"]["uniform"]
    assert (run / "sensitivities-128-1.json").exists()


def test_another_budget_reuses_database_and_sensitivities(
    facts: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    run = copied_run(tiny_folder, tmp_path / "run")
    files = [*(run / "database").iterdir(), *run.glob("sensitivities*"), *run.glob("teacher*")]
    before = {path: path.stat().st_mtime_ns for path in files}
    other = search(tiny_folder, tmp_path, "--run", run, budget=OTHER_BUDGET)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert set((run / "database").iterdir()) <= set(before), "nothing was built"
    assert 4.1 < other["effective_bits"] <= 4.25
    assert other["results"]["dense"] == facts["results"]["dense"]
    # The table grew; what stood in it stands there still.
    assert other["trials"][: len(facts["trials"])] == facts["trials"]
    assert len(other["trials"]) > len(facts["trials"])


DYING = """
import importlib, os, signal, sys
from autocompress.cli import main

module, names, call = sys.argv.pop(1), sys.argv.pop(1).split("."), int(sys.argv.pop(1))
place = importlib.import_module(module)
for name in names[:-1]:
    place = getattr(place, name)
original, calls = getattr(place, names[-1]), []

def dying(*arguments, **settings):
    calls.append(None)
    if len(calls) == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **settings)

setattr(place, names[-1], dying)
main()
"""


@pytest.mark.parametrize(
    ("module", "function", "call"),
    [
        ("autocompress.database", "LevelDatabase._save", 5),  # a file is written, not its entry
        ("autocompress.study", "Study._add", 9),  # a row is written, the search goes on
        ("autocompress.writing", "write_manifest", 1),  # all but the manifest is written
    ],
    ids=["database", "search", "export"],
)
def test_a_killed_search_goes_on_to_the_same_winner(
    facts: dict[str, Any],
    tiny_folder: Path,
    tmp_path: Path,
    module: str,
    function: str,
    call: int,
) -> None:
    config = write_config(tmp_path / "config.toml", tiny_folder)
    out = tmp_path / "result"
    asked = ["search", "--config", str(config), "--budget", BUDGET, "--out", str(out)]
    killed = subprocess.run(
        [sys.executable, "-c", DYING, module, function, str(call), *asked],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -9, killed.stderr
    assert command("inspect", out).code == 2, "what was killed must not look whole"
    ran = command(*asked, "--json")
    assert lasting(ran.json()) == lasting(facts)
    assert "Traceback" not in ran.err


def test_a_killed_build_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    """Entries that were solved before the kill are not solved again."""
    config = write_config(tmp_path / "config.toml", tiny_folder)
    asked = ["build", "--config", str(config), "--out", str(tmp_path / "result")]
    killed = subprocess.run(
        [sys.executable, "-c", DYING, "autocompress.database", "LevelDatabase._save", "4", *asked],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -9, killed.stderr
    folder = tmp_path / "result.run" / "database"
    entered = set(json.loads((folder / "manifest.json").read_text())["files"])
    before = {name: (folder / name).stat().st_mtime_ns for name in entered}
    assert len(before) == 3
    assert command(*asked).code == 0
    assert {name: (folder / name).stat().st_mtime_ns for name in entered} == before


ALIVE = """
import gc, sys
from autocompress.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
from transformers import PreTrainedModel
gc.collect()
print(sum(isinstance(it, PreTrainedModel) for it in gc.get_objects()))
"""


def test_a_search_that_is_done_keeps_no_model_in_memory(tiny_folder: Path, tmp_path: Path) -> None:
    """In a process of its own: what libraries keep of their imports counts."""
    config = write_config(tmp_path / "config.toml", tiny_folder)
    asked = ["search", "--config", str(config), "--budget", BUDGET, "--out", str(tmp_path / "out")]
    ran = subprocess.run(
        [sys.executable, "-c", ALIVE, *asked], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "0"


# Spaces, pins, budgets


def test_pins_are_respected(tiny_folder: Path, tmp_path: Path) -> None:
    pins = (
        "--pin",
        "*.layers.0.self_attn.*=w8g64",
        "--pin",
        "model.layers.2.self_attn.o_proj=dense",
    )
    facts = search(tiny_folder, tmp_path, *pins, budget="5bits", generations=1)
    found = levels(facts)
    pinned = {name for name in found if ".layers.0.self_attn." in name}
    assert len(pinned) == 4 and {found[name] for name in pinned} == {"w8g64"}
    assert found["model.layers.2.self_attn.o_proj"] == "dense"
    bits, weights = stored_bits(facts, tiny_folder)
    assert bits <= 5 * weights
    names = {trial["origin"] for trial in facts["trials"] if "uniform" in trial["origin"]}
    assert names == {"uniform w3g64"}, "named after the level that is free, not after a pin's"
    model, _ = autocompress.load(tmp_path / "result")
    dense = load_model(str(tiny_folder), torch.float32).model
    torch.testing.assert_close(
        model.model.layers[2].self_attn.o_proj.weight,
        dense.model.layers[2].self_attn.o_proj.weight,
    )


def test_a_tied_space_fuses(tiny_folder: Path, tmp_path: Path) -> None:
    facts = search(tiny_folder, tmp_path, "--space", "quant-2-8-tied", generations=1)
    assert facts["space"]["layers"] == 3 * 4
    modules = {row["layer"]: row["modules"] for row in facts["allocation"]}
    fused = modules["model.layers.1.self_attn.q_proj+k_proj+v_proj"]
    assert [name.rpartition(".")[2] for name in fused] == ["q_proj", "k_proj", "v_proj"]
    assert len(modules["model.layers.1.mlp.gate_proj+up_proj"]) == 2
    bits, weights = stored_bits(facts, tiny_folder)
    assert bits <= math.floor(3.5 * weights)
    model, _ = autocompress.load(tmp_path / "result")
    for block in model.model.layers:
        attention = block.self_attn
        assert attention.q_proj.level == attention.k_proj.level == attention.v_proj.level
        assert block.mlp.gate_proj.level == block.mlp.up_proj.level


def test_two_budgets_at_once(facts: dict[str, Any], tiny_folder: Path, tmp_path: Path) -> None:
    """The limit on bytes is the tighter one here, and both are met."""
    run = copied_run(tiny_folder, tmp_path / "run")
    limit = facts["total_bytes"] - 3000
    asked = ("--run", run, "--budget", f"{limit / 1000}kB")
    both = search(tiny_folder, tmp_path, *asked)
    bits, size = both["budgets"]
    assert (bits["cost"], size["cost"]) == ("bits", "bytes")
    assert bits["reached"] <= bits["limit"] == facts["budgets"][0]["limit"]
    assert both["total_bytes"] == size["reached"] <= size["limit"] == limit
    assert both["effective_bits"] < facts["effective_bits"]
    for row in both["trials"][len(facts["trials"]) :]:
        assert row["effective_bits"] * both["space"]["weights"] <= bits["limit"]


def test_a_budget_of_bytes_limits_the_file(tiny_folder: Path, tmp_path: Path) -> None:
    run = copied_run(tiny_folder, tmp_path / "run")
    facts = search(tiny_folder, tmp_path, "--run", run, budget="130kB")
    size = (tmp_path / "result" / "autocompress.safetensors").stat().st_size
    assert size <= facts["total_bytes"] <= 130_000
    assert size > 0.95 * 130_000
    assert facts["results"]["uniform"]["total_bytes"] <= 130_000


# Python


def test_the_python_api_finds_the_same(
    facts: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    run = copied_run(tiny_folder, tmp_path / "run")
    result = autocompress.search(
        BUDGET,
        model=str(tiny_folder),
        tokens=SplitTokens(**TOKENS),
        out=str(tmp_path / "result"),
        run=run,
        **SETTINGS,
    )
    assert lasting(result.facts) == lasting(facts)
    assert json.loads(json.dumps(result.facts)) == read(result.path)
    assert result.effective_bits == facts["effective_bits"]
    assert result.file_bytes == facts["file_bytes"]
    assert result.total_bytes == facts["total_bytes"]
    assert result.results == facts["results"]
    assert [str(level) for level in result.allocation.levels] == list(levels(facts).values())
    model, tokenizer = result.load()
    with torch.inference_mode():
        logits = model(**tokenizer("The dense model", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()


def test_the_python_api_takes_paths(tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    with pytest.raises(autocompress.AutocompressError, match="Nothing exists at"):
        autocompress.search(BUDGET, model=tiny_folder, calibration=text, out=tmp_path / "result")
    assert not (tmp_path / "result").exists()


def test_tokens_limit_what_a_search_spends(tiny_folder: Path, tmp_path: Path) -> None:
    facts = search(tiny_folder, tmp_path, "--tokens", 2000)
    spent = sum(facts["tokens"][step] for step in ("sensitivities", "linearization", "search"))
    reported = 4 * TOKENS["search"]  # baselines and winner, where they were not scored before
    assert 1000 < spent <= 2000 + reported


def test_an_unknown_effort_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.toml", tiny_folder)
    asked = ("--config", config, "--out", tmp_path / "out", "--budget", BUDGET)
    ran = command("search", *asked, "--effort", "fast")
    assert ran.code == 2
    assert "an effort must be one of quick, normal, thorough. Got 'fast'" in ran.err
    assert not (tmp_path / "out").exists()
