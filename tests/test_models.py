"""Every architecture from its layers to its packed export, and the folders that are refused."""

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import autocompress
from autocompress.core import Allocation, Layer, SearchSpace
from autocompress.cost import size_tables
from autocompress.database import LevelDatabase
from autocompress.experts import unfuse_experts
from autocompress.exporters.native import other_bytes, save_native
from autocompress.levels import Dense, parse_level
from autocompress.models import LoadedModel, find_layers, is_tied, is_transposed, load_model
from autocompress.spaces import SpaceConfig, build_space
from autocompress.stitch import StitchedModel
from autocompress.tracing import input_groups

BLOCKS = 2
SIZES = {  # of most configurations
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 16}
GPT2 = {"vocab_size": 512, "n_embd": 64, "n_layer": BLOCKS, "n_head": 4, "n_positions": 128}
OPT = SIZES | {"ffn_dim": 160, "word_embed_proj_dim": 64, "init_std": 0.1}
MIXTRAL = GROUPED | {"num_local_experts": 4}
MOE = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 72}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
# Name -> configuration class, its settings, linear layers per block.
ARCHITECTURES = {
    "llama": ("LlamaConfig", GROUPED | UNTIED, 7),
    "llama, tied": ("LlamaConfig", GROUPED | TIED, 7),
    "qwen2": ("Qwen2Config", GROUPED | UNTIED, 7),
    "qwen3": ("Qwen3Config", GROUPED | TIED, 7),
    "gemma2": ("Gemma2Config", GROUPED | TIED, 7),
    "gemma3": ("Gemma3TextConfig", GROUPED | TIED, 7),
    "gpt2": ("GPT2Config", GPT2 | {"initializer_range": 0.1} | TIED, 4),
    "opt": ("OPTConfig", OPT | TIED, 6),
    "phi": ("PhiConfig", SIZES | UNTIED, 6),
    "mistral": ("MistralConfig", GROUPED | UNTIED, 7),
    "mixtral": ("MixtralConfig", MIXTRAL | UNTIED, 4 + 3 * 4),
    "qwen3 moe": ("Qwen3MoeConfig", MOE | UNTIED, 4 + 3 * 4),
}
SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
LEVELS = tuple(map(parse_level, ("w3g64", "w4g32sym", "dense")))
TOKENS = torch.arange(3 * 40).view(3, 40) * 31 % 512


def make_model(name: str, **changes: Any) -> Any:
    """A random model of an architecture; with random norms and biases, or they would not matter."""
    kind, settings, _ = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**settings | changes)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def save_and_load(model: Any, tokenizer_folder: Path, folder: Path) -> LoadedModel:
    """The model as `--model folder` gives it, with a tokenizer."""
    model.save_pretrained(folder)
    for file in tokenizer_folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    return load_model(str(folder), torch.float32)


def full_space(loaded: LoadedModel) -> SearchSpace:
    """All of `LEVELS` for blocks, embedding and head."""
    config = SpaceConfig("all", LEVELS, ("blocks", "embedding", "head"))
    return build_space(config, find_layers(loaded.model, config.scope))


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits.float()


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of logits, Frobenius."""
    return float((found - expected).norm() / expected.norm())


def data_bytes(path: Path) -> int:
    """Bytes of a safetensors file after its header."""
    header = int.from_bytes(path.read_bytes()[:8], "little")
    return path.stat().st_size - 8 - header


@dataclass
class Case:
    """One architecture, its database, and an allocation that uses all of its levels."""

    name: str
    folder: Path
    loaded: LoadedModel
    space: SearchSpace
    database: LevelDatabase
    allocation: Allocation
    before: dict[str, torch.Tensor]  # all weights before the build


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request, tmp_path_factory, tiny_folder, build_levels):
    folder = tmp_path_factory.mktemp("model")
    loaded = save_and_load(make_model(request.param), tiny_folder, folder)
    space = full_space(loaded)
    allocation = Allocation(tuple(LEVELS[i % 3] for i in range(len(space.layers))))
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    calibrate = np.random.default_rng(0).integers(0, 512, (8, 64))
    database = build_levels(loaded, space, calibrate, tmp_path_factory.mktemp("levels"), LEVELS[0])
    yield Case(request.param, folder, loaded, space, database, allocation, before)
    gc.collect()


@pytest.fixture
def stitched_logits(case):
    """Logits of the case's allocation; the model is dense again."""
    model = StitchedModel(case.loaded.model, case.space, case.database)
    found = logits_of(model.stitch(case.allocation))
    model.restore()
    return found


def test_every_linear_of_the_blocks_is_a_layer(case):
    layers = find_layers(case.loaded.model)
    assert len(layers) == BLOCKS * ARCHITECTURES[case.name][2]
    assert len({layer.name for layer in layers}) == len(layers)
    # Independently of modules: every matrix of the saved blocks but the experts' routers.
    saved = load_file(case.folder / "model.safetensors")
    matrices = [
        tensor
        for name, tensor in saved.items()
        if (".layers." in name or ".h." in name) and tensor.dim() >= 2
        if not name.endswith((".gate.weight", ".router.weight"))
    ]
    assert sum(layer.weights for layer in layers) == sum(matrix.numel() for matrix in matrices)


def test_embedding_and_head_are_layers_and_one_when_tied(case):
    model = case.loaded.model
    tied = ARCHITECTURES[case.name][1]["tie_word_embeddings"]
    assert is_tied(model) == tied
    inner = len(find_layers(model))
    outer = [layer for layer in case.space.layers if layer.shapes == ((512, 64),)]
    assert len(case.space.layers) == inner + len(outer)
    assert len(outer) == (1 if tied else 2)
    assert find_layers(model, ("embedding",)) == (outer[0],)
    assert find_layers(model, ("head",)) == (outer[-1],)


def test_modules_that_read_one_input_are_one_group(case):
    names = [layer.name for layer in find_layers(case.loaded.model)]
    groups = input_groups(case.loaded.model, names)
    assert sorted(name for group in groups for name in group) == sorted(names)
    for kinds in SHARING:
        for name in names:
            parent, _, kind = name.rpartition(".")
            if kind == kinds[0] and f"{parent}.{kinds[1]}" in names:
                group = next(group for group in groups if name in group)
                expected = {f"{parent}.{other}" for other in kinds}
                assert {n for n in group if n.startswith(f"{parent}.")} == expected
    outputs = [n for n in names if n.endswith(("o_proj", "out_proj", "dense", "down_proj", "fc2"))]
    assert all((name,) in groups for name in outputs)


def test_building_leaves_the_model_as_it_was(case, build_levels, tmp_path):
    assert case.database.entries.keys() == {m for layer in case.space.layers for m in layer.modules}
    calibrate = np.random.default_rng(0).integers(0, 512, (8, 64))
    dense = build_levels(case.loaded, case.space, calibrate, tmp_path / "dense", Dense())
    after = case.loaded.model.state_dict()
    assert after.keys() == case.before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in case.before.items())
    last = find_layers(case.loaded.model)[-1].name
    weights = [database.load(last, LEVELS[0]).dense() for database in (dense, case.database)]
    assert not torch.equal(*weights), "the prefix matters to the last layer"


def test_stitched_is_the_model_dequantized_by_hand(case, stitched_logits):
    model = load_model(str(case.folder), torch.float32).model
    assert torch.equal(logits_of(model), logits_of(case.loaded.model))
    for layer, level in zip(case.space.layers, case.allocation.levels, strict=True):
        if level != Dense():
            weight = case.database.load(layer.name, level).dense()
            module = model.get_submodule(layer.name)
            module.weight.data.copy_(weight.T if is_transposed(module) else weight)
    assert torch.equal(stitched_logits, logits_of(model))
    assert (stitched_logits - logits_of(case.loaded.model)).abs().max() > 0.01


def test_export_reloads_with_the_stitched_logits_and_the_size_of_the_table(
    case, stitched_logits, tmp_path
):
    model, space = case.loaded.model, case.space
    file = save_native(
        model, case.loaded.tokenizer, space, case.allocation, case.database, tmp_path
    )
    packed, tokenizer = autocompress.load(tmp_path, backend="dequantize")
    assert torch.equal(logits_of(packed), stitched_logits)
    exact, _ = autocompress.load(tmp_path, activations="float32")
    assert gap(logits_of(exact), stitched_logits) < 1e-3
    assert tokenizer("some text") == case.loaded.tokenizer("some text")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert gap(logits_of(plain.eval()), stitched_logits) < 5e-2, "int8 activations"
    promised = size_tables(space, other_bytes(model, space))[1].total(case.allocation)
    assert file.stat().st_size <= promised
    packed_bits = sum(map(Layer.storage_bits, space.layers, case.allocation.levels))
    rest = 2 * (case.loaded.parameters - space.weights)  # everything outside ships in 16 bits
    assert data_bytes(file) == packed_bits // 8 + rest


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_experts_one_by_one_are_the_same_function(name):
    model = make_model(name)
    before = logits_of(model)
    assert unfuse_experts(model) == BLOCKS
    assert unfuse_experts(model) == 0
    torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_a_large_embedding_is_stored_once_and_the_file_is_as_large_as_promised(
    name, tiny_folder, build_levels, tmp_path
):
    loaded = save_and_load(make_model(name, vocab_size=12_000), tiny_folder, tmp_path / "model")
    space = full_space(loaded)
    calibrate = np.random.default_rng(0).integers(0, 512, (4, 64))
    database = build_levels(loaded, space, calibrate, tmp_path / "levels")
    allocation = space.uniform(LEVELS[0])
    model, out = loaded.model, tmp_path / "out"
    file = save_native(model, loaded.tokenizer, space, allocation, database, out)
    promised = size_tables(space, other_bytes(model, space))[1].total(allocation)
    assert 0.99 * promised <= file.stat().st_size <= promised
    expected = logits_of(StitchedModel(model, space, database).stitch(allocation))
    assert torch.equal(logits_of(autocompress.load(out, backend="dequantize")[0]), expected)
    assert gap(logits_of(autocompress.load(out, activations="float32")[0]), expected) < 1e-3
