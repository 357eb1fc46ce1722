"""Exports: the very weights of the result, through other people's readers, or a clear refusal."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import allocation_rows, command, content
from safetensors.torch import load_file, save_file
from test_models import make_model, save_and_load
from transformers import AutoModelForCausalLM

from autocompress.core import Allocation, SearchSpace
from autocompress.errors import AutocompressError, ModelError, OutputError, SpaceError
from autocompress.exporters import HOMES, find_exporter
from autocompress.exporters.native import save_native
from autocompress.exporters.source import Source
from autocompress.exporting import export
from autocompress.files import write_json
from autocompress.folders import MANIFEST, MARK
from autocompress.levels import Dense, parse_level
from autocompress.models import find_layers
from autocompress.parts import module_parts
from autocompress.runtimes import find_runtime
from autocompress.runtimes.rules import legal_space
from autocompress.session import file_costs
from autocompress.spaces import SpaceConfig
from autocompress.stitch import StitchedModel
from autocompress.verification import _problems, tolerances

SIX = ("w2g32sym", "w3g32sym", "w4g32sym", "w5g32sym", "w6g32sym", "w8g32sym", "dense")
MODELS = ("llama", "llama, tied", "mixtral", "qwen3 moe", "gpt2")
TOKENS = torch.arange(2 * 40).view(2, 40) * 31 % 512


class Made:
    """A model, its legal space for a runtime, and its level database."""

    def __init__(self, loaded: Any, space: SearchSpace, database: Any) -> None:
        self.loaded, self.space, self.database = loaded, space, database

    def result(self, out: Path, allocation: Allocation) -> Path:
        """The result folder of an allocation, as a search writes it, without scores."""
        loaded, space = self.loaded, self.space
        save_native(loaded.model, loaded.tokenizer, space, allocation, self.database, out)
        costs = file_costs(loaded.model, space, find_runtime("ct-transformers"))
        bits, whole = (int(table.total(allocation)) for table in costs)
        facts = {
            "allocation": allocation_rows(space, allocation, "w4g32sym"),
            "model": {"name": "m", "source": "/gone", "fingerprint": loaded.fingerprint},
            "space": {"runtime": "ct-transformers", "scope": ["blocks"]},
            "effective_bits": bits / space.weights,
            "total_bytes": whole,
            "dense_bytes": 2 * loaded.parameters,
            "settings": {"model": "/gone", "runtime": "ct-transformers"},
        }
        write_json(out / MANIFEST, facts)
        (out / MARK).touch()
        return out

    def random(self, seed: int) -> Allocation:
        pick = random.Random(seed).choice
        return Allocation(tuple(pick(row) for row in self.space.levels))

    def logits(self, allocation: Allocation) -> torch.Tensor:
        stitched = StitchedModel(self.loaded.model, self.space, self.database)
        found = logits_of(stitched.stitch(allocation))
        stitched.restore()
        return found


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits.float()


def read(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """What stock transformers makes of a folder."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for parameter in model.parameters():  # decoded experts come in the type of their scales
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def make(name: str, tmp: Path, tokenizer: Path, build: Any, scope: tuple[str, ...]) -> Made:
    loaded = save_and_load(make_model(name), tokenizer, tmp / "model")
    config = SpaceConfig("all", tuple(map(parse_level, SIX)), scope)
    layers, parts = find_layers(loaded.model, scope), module_parts(loaded.model)
    space, _ = legal_space(find_runtime("ct-transformers"), config, layers, parts)
    calibrate = np.random.default_rng(0).integers(0, 512, (4, 64))
    database = build(loaded, space, calibrate, tmp / "levels", parse_level("w4g32sym"))
    return Made(loaded, space, database)


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory, tiny_folder, build_levels):
    scope = ("blocks", "embedding", "head")
    return make(request.param, tmp_path_factory.mktemp("m"), tiny_folder, build_levels, scope)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tiny_folder, build_levels):
    path = tmp_path_factory.mktemp("llama")
    return make("llama", path, tiny_folder, build_levels, ("blocks", "head"))


@pytest.fixture(scope="module")
def result(llama, tmp_path_factory):
    """A result at all levels. Read only."""
    return llama.result(tmp_path_factory.mktemp("result") / "r", llama.random(0))


def test_every_architecture_reloads_with_the_stitched_logits(made, tmp_path):
    allocation = made.random(1)
    for index, layer in enumerate(made.space.layers):
        if layer.name == "experts" and len(made.space.levels[index]) > 1:
            allocation = allocation.swap(index, parse_level("w3g32sym"))
    source = made.result(tmp_path / "r", allocation)
    facts = export(source, tmp_path / "out", check=False)
    model, opened = read(tmp_path / "out"), Source.open(source)
    assert torch.equal(logits_of(opened.stitched()), made.logits(allocation))
    expected = logits_of(opened.stitched(facts["export"]["rounded"]))
    gap = (logits_of(model) - expected).abs().max() / expected.abs().max()
    experts = any(".experts." in layer.modules[0] for layer in made.space.layers)
    assert gap <= (1e-6 if experts else 0), "experts in one product add up in another order"
    assert facts["file_bytes"] <= facts["export"]["bytes"]
    if not experts:  # whose scales are wider here, as bf16 does not hold them
        assert facts["export"]["bytes"] <= made_bytes(made, allocation) * 1.02
    kinds = {type(level) for level in allocation.levels}
    assert len(kinds) > 1 or made.loaded.model.config.model_type == "gpt2"


def made_bytes(made: Made, allocation: Allocation) -> float:
    table = file_costs(made.loaded.model, made.space, find_runtime("ct-transformers"))[1]
    return table.total(allocation)


def test_random_allocations_are_equal_and_within_the_cost_table(llama, tmp_path):
    for seed in range(5):
        allocation = llama.random(seed)
        source = llama.result(tmp_path / f"r{seed}", allocation)
        facts = export(source, tmp_path / f"out{seed}", check=False)
        assert torch.equal(logits_of(read(tmp_path / f"out{seed}")), llama.logits(allocation))
        assert facts["file_bytes"] <= made_bytes(llama, allocation)
        weights = load_file(tmp_path / f"out{seed}" / "model.safetensors")
        packed = 8 * sum(t.nbytes for n, t in weights.items() if n.endswith(("_packed", "_scale")))
        quantized = [
            (layer, level)
            for layer, level in zip(llama.space.layers, allocation.levels, strict=True)
            if level != Dense()
        ]
        assert packed == sum(layer.storage_bits(level) for layer, level in quantized)


def test_scales_of_8_bits_make_bf16_exact_too(llama, tmp_path):
    """Half of fp16 scales would round in bf16: the export then begins in float32, and says so."""
    allocation = llama.space.uniform(parse_level("w4g32sym"))
    source = llama.result(tmp_path / "r", allocation)
    export(source, tmp_path / "fp16", check=False)
    assert json.loads((tmp_path / "fp16/config.json").read_text())["dtype"] == "float32"
    weights = load_file(source / "autocompress.safetensors")
    for name in [n for n in weights if n.endswith(".scales")]:
        weights[name] = weights[name].bfloat16().half()
    save_file(weights, source / "autocompress.safetensors")
    export(source, tmp_path / "bf16", check=False)
    assert json.loads((tmp_path / "bf16/config.json").read_text())["dtype"] == "bfloat16"
    model = read(tmp_path / "bf16", torch.bfloat16)
    logits_of(model)  # decompresses
    opened = Source.open(source)
    for name in opened.levels:
        assert torch.equal(model.get_submodule(name).weight, opened.weight(name).to(torch.bfloat16))


def test_rows_that_end_inside_a_word_are_packed_apart(tmp_path, tiny_folder, build_levels):
    """160 inputs of 3 bits are 15 words; 72 of 3 bits are not whole words."""
    from autocompress.exporters.packed_integers import packed_rows
    from autocompress.packed import pack_quantized

    level = parse_level("w3g8sym")
    codes = torch.randint(0, 8, (5, 72), dtype=torch.uint8)
    packed = pack_quantized(level, codes, torch.ones(5, 9), torch.full((5, 9), 4))
    words = packed_rows(level, packed)
    assert words.shape == (5, 7)
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    assert torch.equal(unpack_from_int32(words, 3, torch.Size((5, 72))) + 4, codes.to(torch.int8))


def test_int8_layers_of_vllm_on_cpu_have_one_group_per_row(llama, tmp_path):
    space = SearchSpace("mixed", llama.space.layers, llama.space.levels)
    made = Made(llama.loaded, space, llama.database)
    eight, four = parse_level("w8g32sym"), parse_level("w4g32sym")
    source = made.result(tmp_path / "r", space.uniform(eight))
    with pytest.raises(SpaceError, match=r"8 bits must be one group per row"):
        export(source, tmp_path / "out", runtime="ct-vllm-cpu")
    assert not (tmp_path / "out").exists(), "a refusal leaves nothing"
    assert four in llama.space.all_levels()


def test_int8_activations_are_compared_within_a_stated_tolerance(llama, build_levels, tmp_path):
    """W8A8 beside W4A16, by stock transformers."""
    runtime = find_runtime("ct-vllm-cpu")
    config = SpaceConfig("cpu", tuple(map(parse_level, ("w4g32sym", "w8sym"))), ("blocks",))
    layers = find_layers(llama.loaded.model, ("blocks",))
    space, _ = legal_space(runtime, config, layers, module_parts(llama.loaded.model))
    calibrate = np.random.default_rng(0).integers(0, 512, (4, 64))
    database = build_levels(llama.loaded, space, calibrate, tmp_path / "levels")
    made = Made(llama.loaded, space, database)
    source = made.result(tmp_path / "r", made.random(0))
    dense = llama.database.path.parent / "model"
    options = ("--runtime", runtime.name, "--model", dense, "--windows", 1)
    ran = command("export", source, "--out", tmp_path / "out", *options)
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "out" / MANIFEST).read_text())["verification"]
    eight = [name for name, level in Source.open(source).levels.items() if str(level) == "w8sym"]
    assert found["int8_activations"] == len(eight) > 0
    assert found["logits"] <= 0.01 * found["largest_logit"]
    assert found["kl"] == pytest.approx(found["kl_stitched"], rel=0.02)
    assert f"{len(eight)} modules round their inputs to 8 bits" in ran.out
    assert "within 1 %" in ran.out
    assert "Inputs of" in (tmp_path / "out" / "README.md").read_text()
    assert tolerances(found) == (0.01, 0.02) and not list(_problems(found))
    for other in ({"logits": 0.02 * found["largest_logit"]}, {"kl": 1.03 * found["kl"]}):
        assert len(list(_problems(found | other))) == 1


def test_a_checked_export_is_read_in_a_fresh_process(result, tmp_path):
    ran = command("export", result, "--out", tmp_path / "out", "--windows", 1)
    assert ran.code == 0, ran.err
    assert "weights equal, logits differ by 0 at most" in ran.out
    facts = json.loads((tmp_path / "out" / MANIFEST).read_text())
    found = facts["verification"]
    assert found["passed"] and found["weights"]["compared"] == 15 and found["logits"] == 0
    assert "'/gone'" in found["kl_unknown"], (
        "without the dense model there is no KL, and it says so"
    )
    card = (tmp_path / "out/README.md").read_text()
    for text in ("compressed-tensors>=0.18", "| model.layers.1.mlp.down_proj |", "transformers"):
        assert text in card
    assert "vLLM" not in card, "levels that differ within q/k/v are not for vLLM"
    assert set(facts["export"]["loads"]) == {"transformers"}


def test_a_wrong_weight_fails_the_export_and_keeps_it(llama, tmp_path, monkeypatch):
    from autocompress.exporters import packed_integers

    right = packed_integers.packed_rows
    monkeypatch.setattr(packed_integers, "packed_rows", lambda *given: right(*given) ^ 1)
    source = llama.result(tmp_path / "r", llama.space.uniform(parse_level("w4g32sym")))
    ran = command("export", source, "--out", tmp_path / "out", "--windows", 1)
    assert ran.code == 2
    assert "15 of 15 weights differ" in ran.err and "logits differ" in ran.err
    facts = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert not facts["verification"]["passed"]
    assert (tmp_path / "out/model.safetensors").exists()
    assert "**FAILED.**" in (tmp_path / "out/README.md").read_text()


def test_large_models_are_written_in_shards(result, tmp_path, monkeypatch):
    from autocompress.exporters import shards

    export(result, tmp_path / "whole", check=False)
    monkeypatch.setattr(shards.write_weights, "__defaults__", (50_000,))
    facts = export(result, tmp_path / "parts", check=False)
    assert len(facts["export"]["files"]) > 2 and set(facts["sha256"]) == set(
        facts["export"]["files"]
    )
    whole, parts = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert torch.equal(logits_of(whole), logits_of(parts))


def test_dense_is_the_stitched_model_in_bf16(made, tmp_path):
    allocation = made.random(2)
    source = made.result(tmp_path / "r", allocation)
    export(source, tmp_path / "out", format="dense", check=False)
    model, opened = read(tmp_path / "out"), Source.open(source)
    expected = logits_of(opened.stitched({"*": "bfloat16"}))
    gap = (logits_of(model) - expected).abs().max() / expected.abs().max()
    assert gap < 1e-6
    card = (tmp_path / "out/README.md").read_text()
    assert "vllm serve out\n" in card and "api_server --model out --dtype bfloat16" in card


def test_native_is_the_result_again(result, tmp_path):
    export(result, tmp_path / "out", format="native", check=False)
    for name in ("autocompress.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (result / name).read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (result / "config.json").read_text()
    )


def test_native_never_loads_without_autocompress(result):
    """Not even with random weights: transformers finds no file that it knows."""
    code = "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    ran = subprocess.run([sys.executable, "-c", code, result], capture_output=True, text=True)
    assert ran.returncode == 1 and "no file named model.safetensors" in ran.stderr


def test_every_format_has_an_exporter_and_an_unknown_one_is_named():
    for name in HOMES:
        assert find_exporter(name).reader in ("transformers", "peft", "gguf", "native", None)
    with pytest.raises(OutputError, match=r"Got 'dens'\. Did you mean 'dense'"):
        find_exporter("dens")


# --- bad input -------------------------------------------------------------------------------


def refused(folder: Path, out: Path, *arguments: object) -> str:
    before = content(out) if out.is_dir() else None
    ran = command("export", folder, "--out", out, *arguments)
    assert ran.code == 2 and ran.out == ""
    assert (content(out) if out.is_dir() else None) == before, "nothing is written"
    return ran.err


def test_an_illegal_allocation_names_layer_and_rule(result, tmp_path):
    error = refused(result, tmp_path / "out", "--runtime", "ct-universal")
    assert "must be at a level that ct-universal can load" in error and "bits must be" in error


def test_a_refused_export_leaves_the_former_one(result, tmp_path):
    out = tmp_path / "out"
    export(result, out, check=False)
    error = refused(result, out, "--runtime", "ct-universal", "--overwrite")
    assert "bits must be" in error
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no draft may be left"


def test_a_folder_that_exists_is_refused(result, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "which holds thesis.txt. Choose another" in refused(result, out)
    assert "Choose another" in refused(result, out, "--overwrite")
    export(result, tmp_path / "ours", format="plan")
    assert "Add --overwrite" in refused(result, tmp_path / "ours")
    ran = command("export", result, "--out", tmp_path / "ours", "--format", "plan", "--overwrite")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("step", ["_facts", "write_card"])
def test_an_export_that_ctrl_c_ended_is_begun_again(step, result, tmp_path, monkeypatch):
    def stop(*given):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(f"autocompress.exporting.{step}", stop)
        with pytest.raises(KeyboardInterrupt):
            export(result, out, format="dense", check=False)
    assert not out.exists()
    export(result, out, format="dense", check=False)


def test_a_half_written_export_says_so(result, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / MARK).touch()
    (out / "model.safetensors").write_bytes(b"half")
    assert "half-written export" in refused(result, out)
    assert "half-written" in refused(out, tmp_path / "other", "--format", "dense")
    export(result, out, check=False, overwrite=True)


@pytest.mark.parametrize("name", ["config.json", MANIFEST, "autocompress.safetensors"])
def test_a_damaged_result_is_refused(name, result, tmp_path):
    copy = Path(shutil.copytree(result, tmp_path / "copy"))
    os.truncate(copy / name, 40)
    with pytest.raises(ModelError):
        export(copy, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_formats_and_runtimes_must_belong_together(result, tiny_folder, tmp_path):
    for wrong in (
        ("--format", "dense", "--runtime", "ct-universal"),
        ("--format", "gguff"),
        ("--runtime", "llamacpp"),
    ):
        refused(result, tmp_path / "out", *wrong)
    assert "finished result" in refused(tiny_folder, tmp_path / "out", "--format", "dense")


def test_a_tensor_of_the_wrong_size_is_refused(llama, tmp_path):
    source = llama.result(tmp_path / "r", llama.space.uniform(parse_level("w4g32sym")))
    weights = load_file(source / "autocompress.safetensors")
    name = next(name for name in weights if name.endswith(".scales"))
    weights[name] = weights[name][:-1].clone()
    save_file(weights, source / "autocompress.safetensors")
    with pytest.raises(AutocompressError, match="scales' must be"):
        export(source, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()
