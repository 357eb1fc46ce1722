"""`eval`: two models from full logits, a search's test windows, and lm-eval tasks offline."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import command, finished

import autocompress
from autocompress.comparison import compare
from autocompress.errors import CalibrationError, ConfigError
from autocompress.levels import parse_level
from autocompress.models import load_model
from autocompress.quality import score, teacher
from autocompress.scoring import evaluate, predicted_text
from autocompress.tasks import check_tasks

ROOT = Path(__file__).parents[1]
VOCABULARY = 512


@pytest.fixture(scope="module")
def result(tiny_folder: Path) -> Path:
    return finished(tiny_folder)


@torch.inference_mode()
def full(model: Any, windows: np.ndarray) -> torch.Tensor:  # (n, window, vocab), float64, nats
    return model(torch.from_numpy(windows)).logits.double().log_softmax(2)


def test_figures_are_those_of_full_logits(tiny, tiny_folder, tiny_space, tiny_windows, stitched):
    dense = load_model(str(tiny_folder), torch.float32).model
    coarse = stitched.stitch(tiny_space.uniform(parse_level("w2g64")))
    windows = tiny_windows.test[:5]
    found = compare(dense, coarse, windows)
    logp, logq = full(dense, windows), full(coarse, windows)
    assert found.mean("kl") == pytest.approx(
        float((logp.exp() * (logp - logq)).sum(2).mean()), rel=1e-5
    )
    assert found.mean("kl_reverse") == pytest.approx(
        float((logq.exp() * (logq - logp)).sum(2).mean()), rel=1e-5
    )
    assert found.mean("kl_reverse") != pytest.approx(found.mean("kl"), rel=1e-3)
    assert found.mean("agreement") == pytest.approx(
        float((logp.argmax(2) == logq.argmax(2)).double().mean())
    )
    following = torch.from_numpy(windows)[:, 1:, None]
    nll = -logq[:, :-1].gather(2, following)
    assert found.perplexity() == pytest.approx(float(nll.mean().exp()), rel=1e-5)
    assert found.bits_per_byte(1000) == pytest.approx(float(nll.sum()) / math.log(2) / 1000)
    per_window = (logp.exp() * (logp - logq)).sum(2).mean(1)
    assert found.stderr("kl") == pytest.approx(float(per_window.std()) / 5**0.5, rel=1e-4)


def test_a_model_equals_itself(tiny, tiny_windows):
    found = compare(tiny.model, tiny.model, tiny_windows.test[:2])
    assert (found.mean("kl"), found.mean("kl_reverse"), found.mean("agreement")) == (0, 0, 1)
    assert found.perplexity() == found.perplexity("nll_dense")


def test_the_searchs_measure_stands_beside(
    tiny, tiny_folder, tiny_space, tiny_windows, stitched, monkeypatch
):
    """As `quality.score` finds it, and below the exact divergence."""
    monkeypatch.setattr("autocompress.comparison.TOP", 64)
    dense = load_model(str(tiny_folder), torch.float32).model
    windows = tiny_windows.test[:3]
    reference = teacher(dense, windows, top=64)
    coarse = stitched.stitch(tiny_space.uniform(parse_level("w2g64")))
    found = compare(dense, coarse, windows)
    assert found.mean("kl_top") == pytest.approx(score(coarse, reference).loss, rel=1e-4)
    assert found.mean("kl_top") < 0.95 * found.mean("kl")


def test_a_windows_bytes_are_those_of_its_text(tiny):
    text = "Naïve «statements», 2 + 2 == 4.\n" * 30
    ids = np.array(tiny.tokenizer(text)["input_ids"][:64]).reshape(2, 32)
    first, second = predicted_text(ids, tiny.tokenizer)
    start = len(tiny.tokenizer.decode(ids[0][:1]).encode())
    assert text.encode()[start:].startswith(first)
    assert second.decode(errors="replace").strip("�") in text
    end = tiny.tokenizer.eos_token_id
    assert predicted_text(np.array([[end, end, end]]), tiny.tokenizer) == [b""]


def test_without_a_text_the_searchs_test_windows_are_scored(result: Path) -> None:
    """What the search reported of its winner is found again, on the packed model."""
    facts = evaluate(result, activations="float32")
    reported = json.loads((result / "autocompress.json").read_text())["results"]
    assert facts["tokens"] == reported["winner"]["test"]["tokens"]
    assert facts["packed"]["kl_top"] == pytest.approx(reported["winner"]["test"]["kl"], rel=0.02)
    for name, row in (("packed", "winner"), ("dense", "dense")):
        expected = reported[row]["test"]["perplexity"]
        assert facts[name]["perplexity"] == pytest.approx(expected, rel=1e-3)
    assert facts["packed"]["agreement"] < 1 == facts["dense"]["agreement"]
    fewer = evaluate(result, activations="float32", tokens=128)
    assert fewer["tokens"] == 128 and fewer["packed"]["kl"] != facts["packed"]["kl"]


def test_the_table_names_both_directions(result: Path) -> None:
    ran = command("eval", result)
    assert ran.code == 0, ran.err
    for words in ("KL(dense‖·)", "KL(·‖dense)", "top-1", "bits/byte", "test windows of the built"):
        assert words in ran.out


def test_test_windows_of_a_changed_text_are_refused(result: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(result, tmp_path / "copy"))
    path = copied / "autocompress.json"
    facts = json.loads(path.read_text())
    facts["calibration"]["splits"]["test"]["sha256"] = "0" * 32
    path.write_text(json.dumps(facts))
    with pytest.raises(CalibrationError, match=r"must be as it was.*--data"):
        evaluate(copied)
    with pytest.raises(CalibrationError, match="--window must be 64 for the search's test windows"):
        evaluate(result, window=32)


# Tasks


@pytest.fixture(scope="module")
def tasks(result: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks that the shipped script makes of the tiny search's unseen text."""
    folder = tmp_path_factory.mktemp("tasks")
    script = ROOT / "examples" / "tasks" / "make_tasks.py"
    subprocess.run([sys.executable, script, result, folder], check=True, capture_output=True)
    return folder


def questions(tasks: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tasks / f"{name}.jsonl").read_text().splitlines()]


def test_questions_are_from_text_that_no_decision_saw(result: Path, tasks: Path) -> None:
    from pydoc_data.topics import topics

    splits = json.loads((result / "autocompress.json").read_text())["calibration"]["splits"]
    seen = {it for name in ("calibrate", "search", "validate") for it in splits[name]["documents"]}
    plain = [" ".join(text.split()) for text in topics.values()]
    unseen = [it for it in plain if hashlib.sha256(it.encode()).hexdigest()[:16] not in seen]
    assert len(unseen) < len(plain)
    assert len(questions(tasks, "choice")) > 50 and len(questions(tasks, "cloze")) > 20
    for row in questions(tasks, "choice"):
        assert any(f"{row['context']} {row['choices'][row['gold']]}" in it for it in unseen)
        assert len(set(row["choices"])) == 4
    for row in questions(tasks, "cloze"):
        assert any(f"{row['context']} {row['target']}." in it for it in unseen)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, row: dict[str, Any]) -> int:
    """The choice of the largest sum of log-likelihoods."""
    before = tokenizer(row["context"])["input_ids"]
    sums = []
    for text in row["choices"]:
        ids = tokenizer(f"{row['context']} {text}")["input_ids"]
        logp = model(torch.tensor([ids])).logits[0].log_softmax(1)
        sums.append(sum(float(logp[i - 1, ids[i]]) for i in range(len(before), len(ids))))
    return int(np.argmax(sums))


def test_lm_eval_scores_both_models_offline(
    result: Path, tasks: Path, tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = ("--task-folder", tasks, "--task", "choice", "--task", "cloze", "--limit", 12)
    facts = command("eval", result, *asked, "--json").json()
    accuracy = facts["tasks"]["choice"]["acc"]
    assert set(accuracy) == {"dense", "packed", "dense_stderr", "packed_stderr"}
    rows = questions(tasks, "choice")[:12]
    right = [answer(tiny.model, tiny.tokenizer, row) == row["gold"] for row in rows]
    assert accuracy["dense"] == pytest.approx(np.mean(right))
    packed, tokenizer = autocompress.load(result)
    right = [answer(packed, tokenizer, row) == row["gold"] for row in rows]
    assert accuracy["packed"] == pytest.approx(np.mean(right))
    assert facts["tasks"]["cloze"]["perplexity"]["packed"] > 1


def test_tasks_that_cannot_be_scored(tasks: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"a task must be one of .* Did you mean 'cloze'"):
        check_tasks(["clozes"], tasks, None)
    with pytest.raises(ConfigError, match="--task-folder must hold tasks as YAML files"):
        check_tasks(["cloze"], tmp_path, None)
    with pytest.raises(ConfigError, match="--limit must be at least 1"):
        check_tasks(["cloze"], tasks, 0)
    with pytest.raises(ConfigError, match="must go with --task"):
        check_tasks([], tasks, None)
    monkeypatch.setattr("autocompress.tasks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'autocompress\[eval\]'"):
        check_tasks(["cloze"], tasks, None)
