"""Anyone's folders: described, examined for a runtime, decoded, or refused by what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import command
from safetensors.torch import load_file, save_file
from test_export import Made, logits_of, make, read
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from autocompress import exporting
from autocompress.core import Allocation
from autocompress.doctor import examine
from autocompress.errors import ModelError, OutputError, SpaceError
from autocompress.exporters.source import Source
from autocompress.exporting import export
from autocompress.folders import describe_folder, read_folder
from autocompress.levels import parse_level
from autocompress.loading import dequantize, load_any
from autocompress.models import find_layers
from autocompress.spaces import SpaceConfig, build_space

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tiny_folder, build_levels):
    path = tmp_path_factory.mktemp("llama")
    return make("llama", path, tiny_folder, build_levels, ("blocks",))


@pytest.fixture(scope="module")
def result(llama, tmp_path_factory):
    """q at 3 bits, k and v at 4, the others at 8. Read only."""
    levels = [parse_level("w8g32sym")] * len(llama.space.layers)
    for index, layer in enumerate(llama.space.layers):
        for end, key in (("q_proj", "w3g32sym"), ("k_proj", "w4g32sym"), ("v_proj", "w4g32sym")):
            if layer.name.endswith(end):
                levels[index] = parse_level(key)
    return llama.result(tmp_path_factory.mktemp("r") / "r", Allocation(tuple(levels)))


@pytest.fixture(scope="module")
def exported(result, tmp_path_factory):
    """That, as compressed-tensors. Read only."""
    out = tmp_path_factory.mktemp("e") / "out"
    export(result, out, check=False)
    return out


@pytest.fixture
def copied(exported, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_a_folder_is_described_from_its_headers(exported, llama):
    facts = describe_folder(exported)
    levels = {row["name"]: row["level"] for row in facts["modules"]}
    assert levels["model.layers.0.self_attn.q_proj"] == "w3g32sym"
    assert levels["model.layers.1.mlp.down_proj"] == "w8g32sym"
    assert levels["model.embed_tokens"] == "dense"
    shapes = {row["name"]: tuple(row["shape"]) for row in facts["modules"]}
    assert all(shapes[la.name] == la.shapes[0] for la in llama.space.layers)
    assert "w3g32sym" in command("inspect", exported).out
    assert command("inspect", exported, "--json").json()["method"] == "compressed-tensors"


def test_a_plan_is_shown_and_holds_no_weights(result, tmp_path):
    plan = tmp_path / "plan"
    export(result, plan, format="plan")
    for path in (plan, plan / "plan.json"):
        ran = command("inspect", path)
        assert ran.code == 0 and "w3g32sym" in ran.out and f"--plan {path} --out" in ran.out
    assert {row["level"] for row in command("inspect", plan, "--json").json()["plan"]} == {
        *("w3g32sym", "w4g32sym", "w8g32sym")
    }
    for name in ("eval", "dequantize"):
        ran = command(name, plan, *(() if name == "eval" else ("--out", tmp_path / "out")))
        assert ran.code == 2 and f"build --plan {plan}" in ran.err


def test_the_doctor_finds_what_a_runtime_would_stop_at(exported):
    assert examine(exported, "transformers") == []
    found = {finding.where: finding for finding in examine(exported, "vllm")}
    assert found["model.layers.0.self_attn.q_proj"].fatal
    assert "fused" in found["model.layers.0.self_attn.q_proj"].what
    assert not found["the machine with vLLM"].fatal
    assert any("bits must be" in finding.what for finding in examine(exported, "sglang"))
    assert "GGUF files only" in examine(exported, "llama.cpp")[0].what
    ran = command("doctor", exported, "--runtime", "vllm")
    assert ran.code == 1 and "does not load" in ran.out
    assert command("doctor", exported, "--runtime", "transformers").code == 0
    assert command("doctor", exported, "--runtime", "vlm").code == 2


def test_the_doctor_knows_our_format_and_dense_ones(result, tiny_folder):
    assert "does not know the format" in examine(result, "vllm")[0].what
    for runtime in ("transformers", "vllm", "sglang"):
        assert examine(tiny_folder, runtime) == []


def test_the_doctor_knows_architectures(tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    for runtime, fatal in (("transformers", True), ("vllm", False)):
        (finding,) = examine(folder, runtime)
        assert finding.fatal is fatal and "Did you mean 'llama'" in finding.what
    assert command("doctor", folder, "--runtime", "transformers").code == 1
    with pytest.raises(ModelError, match="transformers knows: llama, mistral"):
        load_any(folder, torch.float32)


def test_the_doctor_knows_what_vllm_multiplies_on_a_cpu(exported):
    found = {finding.where: finding for finding in examine(exported, "vllm-cpu")}
    assert "AVX-512" in found["the machine with vLLM"].what, "k and v have 4 bits"
    whats = [f.what for f in examine(exported, "vllm-cpu") if f.where.endswith("1.mlp.down_proj")]
    assert any("W8A16" in what for what in whats)


def test_the_doctor_knows_the_packing_of_old_versions(copied):
    weights = load_file(copied / WEIGHTS)
    name = "model.layers.0.self_attn.q_proj.weight_packed"
    weights[name] = torch.zeros(64, 7, dtype=torch.int32)  # 64 codes of 3 bits, 10 to a word
    save_file(weights, copied / WEIGHTS)
    (finding,) = examine(copied, "transformers")
    assert finding.where == name and "before 0.18" in finding.what


def test_every_format_is_decoded_to_the_same_dense_model(result, exported, tiny_folder, tmp_path):
    export(result, tmp_path / "dense", format="dense", check=False)
    expected = logits_of(read(tmp_path / "dense"))
    for number, folder in enumerate((result, exported, tmp_path / "dense")):
        facts = dequantize(folder, tmp_path / str(number))
        assert facts["bytes"] > 0
        assert "quantization_config" not in json.loads(
            (tmp_path / str(number) / "config.json").read_text()
        )
        assert torch.equal(logits_of(read(tmp_path / str(number))), expected)
    with pytest.raises(OutputError, match="must be new or empty"):
        dequantize(result, tmp_path / "0")


def test_no_bars_of_transformers_are_shown_and_they_are_back_behind(tiny_folder, tmp_path, capsys):
    enabled = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        dequantize(tiny_folder, tmp_path / "dense")
        assert logging.is_progress_bar_enabled() and capsys.readouterr().err == ""
    finally:
        if not enabled:
            logging.disable_progress_bar()


def test_foreign_folders_are_scored(exported, tiny_folder):
    few = ("--tokens", 128, "--window", 64, "--json")
    alone = command("eval", exported, *few, "--model", tiny_folder).json()
    assert alone["method"] == "compressed-tensors" and alone["packed"]["kl"] > 0.1
    dense = command("eval", tiny_folder, *few).json()
    assert dense["packed"]["kl"] is None and dense["dense"] is None
    tasks = command("eval", tiny_folder, "--task", "choice")
    assert tasks.code == 2 and "must go with a result of a search" in tasks.err
    same = command("eval", tiny_folder, *few, "--model", tiny_folder).json()
    assert same["packed"]["kl"] == pytest.approx(0, abs=1e-4)  # its weights as bf16 ships them
    assert same["packed"]["perplexity"] == pytest.approx(dense["packed"]["perplexity"], rel=1e-3)


def test_low_rank_parts_are_an_adapter(llama, build_levels, tmp_path):
    import numpy as np
    from peft import PeftModel

    levels = tuple(map(parse_level, ("r4+w4g32sym", "r8+w3g32sym", "w4g32sym")))
    layers = find_layers(llama.loaded.model, ("blocks",))
    space = build_space(SpaceConfig("rank", levels), layers)
    calibrate = np.random.default_rng(0).integers(0, 512, (4, 64))
    database = build_levels(llama.loaded, space, calibrate, tmp_path / "l", levels[2])
    made = Made(llama.loaded, space, database)
    mixed = Allocation(tuple(levels[i % 3] for i in range(len(layers))))
    facts = export(rank_result(made, tmp_path / "r", mixed), tmp_path / "out", format="peft",
                   check=False)  # fmt: skip
    assert facts["export"]["base"] == "compressed-tensors"
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {4, 8}
    described = describe_folder(tmp_path / "out")
    shown = {row["name"]: row["level"] for row in described["modules"]}
    rows = zip(layers, mixed.levels, strict=True)
    assert all(shown[layer.name] == str(level) for layer, level in rows)
    assert described["file_bytes"] == facts["file_bytes"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    logits_of(base)
    merged = PeftModel.from_pretrained(base, tmp_path / "out/adapter").merge_and_unload()
    opened = Source.open(tmp_path / "r")
    for name in opened.levels:
        assert torch.equal(merged.get_submodule(name).weight, opened.weight(name))
    again, _, method = load_any(tmp_path / "out", torch.float32)
    assert method == "peft" and torch.equal(logits_of(again), logits_of(opened.stitched()))
    ran = command("export", tmp_path / "r", "--out", tmp_path / "x", "--runtime", "ct-transformers")
    assert ran.code == 2 and "r4+w4g32sym" in ran.err


def rank_result(made: Made, out: Path, allocation: Allocation) -> Path:
    """As `Made.result`: a runtime's table has no low-rank levels, so 4 bits stand in for sizes."""
    plain = Made(made.loaded, made.space, made.database)
    made.result(out, plain.space.uniform(parse_level("w4g32sym")))
    facts = json.loads((out / "autocompress.json").read_text())
    from autocompress.exporters.native import save_native

    save_native(
        *(made.loaded.model, made.loaded.tokenizer, made.space, allocation, made.database, out)
    )
    for row, level in zip(facts["allocation"], allocation.levels, strict=True):
        row["level"] = str(level)
    (out / "autocompress.json").write_text(json.dumps(facts))
    return out


def test_an_adapter_needs_low_rank_parts(result, tmp_path):
    with pytest.raises(SpaceError, match="must have low-rank parts"):
        export(result, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


def test_nothing_is_uploaded_unless_asked_and_checked(result, tmp_path, monkeypatch):
    import huggingface_hub

    calls: list[str] = []

    class Hub:
        def create_repo(self, name, exist_ok):
            calls.append(name)

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    export(result, tmp_path / "a", check=False)
    assert calls == []
    with pytest.raises(OutputError, match="read back first"):
        export(result, tmp_path / "b", check=False, push_to_hub="me/model")
    with pytest.raises(OutputError, match=r"must take the upload\. Got: ConnectionError"):
        exporting.publish(tmp_path / "a", "me/model")
    assert calls == ["me/model"]


# --- bad input -------------------------------------------------------------------------------


def test_pickled_weights_are_refused(tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")
    for name, *more in (("inspect",), ("eval",), ("doctor", "--runtime", "vllm"),
                        ("dequantize", "--out", tmp_path / "out")):  # fmt: skip
        ran = command(name, folder, *more)
        assert ran.code == 2 and "pickled weights (pytorch_model.bin)" in ran.err
    assert not (tmp_path / "out").exists()


def test_half_written_and_truncated_folders_are_refused(copied, exported):
    with (copied / WEIGHTS).open("r+b") as file:
        file.truncate((exported / WEIGHTS).stat().st_size - 9)
    with pytest.raises(ModelError, match="truncated or damaged"):
        read_folder(copied)
    (copied / "autocompress.json").unlink()
    with pytest.raises(ModelError, match="half-written"):
        read_folder(copied)
    with pytest.raises(ModelError, match="must be a folder"):
        read_folder(copied / "nothing")


def test_codes_that_no_group_describes_are_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    del config["quantization_config"]["config_groups"]["w3g32sym"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"Got none for 'model\.layers\.0\.self_attn\.q_proj'"):
        describe_folder(copied)


def test_a_missing_tensor_is_not_left_random(copied):
    weights = load_file(copied / WEIGHTS)
    del weights["model.norm.weight"]
    save_file(weights, copied / WEIGHTS)
    with pytest.raises(ModelError, match="must hold every weight"):
        load_any(copied, torch.float32)
