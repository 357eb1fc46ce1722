"""Dropped sublayers, exported: fewer blocks in a plain configuration, or weights of zero."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from runs import allocation_rows, command
from test_removal import DROP, dropping, make_family, space_of
from transformers import AutoModelForCausalLM

from autocompress.core import Allocation
from autocompress.errors import SpaceError
from autocompress.exporters.depth import GONE, without_dropped
from autocompress.exporters.native import save_native
from autocompress.exporters.source import Source
from autocompress.exporting import export
from autocompress.files import write_json
from autocompress.folders import MANIFEST, MARK, describe_folder
from autocompress.levels import parse_level
from autocompress.models import set_weight, weight_of
from autocompress.operators import Solver, Statistics, solve

TOKENS = torch.arange(1, 21).view(1, 20) * 7 % 64
NOTHING = SimpleNamespace(load=lambda name, level: SimpleNamespace(tensors={}))  # at drop
PLACES = {  # tie -> places that are dropped
    "blocks": (0, -1),
    "sublayers": (0, 2, 3, -1),
}
BIASED = ("GPT2",)  # what a block without weights adds


def packed(model, tokenizer, space, allocation, out, database=NOTHING):
    """A result folder without scores, and the logits of what it stands for."""
    save_native(model, tokenizer, space, allocation, database, out)
    facts = {
        "allocation": allocation_rows(space, allocation, "dense"),
        "effective_bits": 8.0,
        "dense_bytes": 0,
        "total_bytes": 10**9,
    }
    facts |= {"space": {"runtime": None, "scope": ["blocks"]}, "settings": {}}
    model_facts = {"name": "m", "source": "/gone", "fingerprint": "0"}
    write_json(out / MANIFEST, facts | {"model": model_facts})
    (out / MARK).touch()
    return out


@torch.inference_mode()
def zeroed_logits(model, levels, others=MappingProxyType({})):
    """Of the dense model as its file holds it, with dropped weights at zero, and other ones."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    for name in (name for name, level in levels.items() if level == DROP):
        set_weight(model.get_submodule(name), 0 * weight_of(model.get_submodule(name)))
    for name, weight in others.items():
        set_weight(model.get_submodule(name), weight)
    return model(input_ids=TOKENS, use_cache=False).logits


@torch.inference_mode()
def stock_logits(folder):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model(input_ids=TOKENS, use_cache=False).logits


@pytest.fixture(scope="module", params=("Llama", "Gemma3", "GPT2", "Mixtral"))
def family(request):
    return request.param, make_family(request.param)


def blocks_left(name, levels):
    """Numbers of the blocks that are more than nothing."""
    rows = [(int(re.search(r"\.(\d+)\.", module)[1]), level) for module, level in levels.items()]
    left = {number for number, level in rows if name in BIASED or not isinstance(level, GONE)}
    return sorted(left)


@pytest.mark.parametrize("tie", PLACES)
def test_stock_transformers_computes_what_was_searched(family, tiny, tie, tmp_path):
    name, model = family
    space = space_of(model, tie)
    allocation = dropping(space, *PLACES[tie])
    levels = space.module_levels(allocation)
    result = packed(model, tiny.tokenizer, space, allocation, tmp_path / "r")
    facts = export(result, tmp_path / "out", format="dense", check=False)
    expected = zeroed_logits(model, levels)
    gap = (stock_logits(tmp_path / "out") - expected).abs().max() / expected.abs().max()
    assert gap <= (1e-6 if name == "Mixtral" else 0), "fused experts add up in another order"
    assert facts["export"]["blocks"] == blocks_left(name, levels)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    count = config.get("num_hidden_layers", config.get("n_layer"))
    assert count == len(facts["export"]["blocks"])
    assert facts["file_bytes"] <= facts["export"]["bytes"]


def test_what_each_format_says_of_dropped_sublayers(tiny, tmp_path):
    """A block less in any; half of one in dense only."""
    model, space = tiny.model, space_of(tiny.model, "sublayers")
    shorter = packed(model, tiny.tokenizer, space, dropping(space, 2, 3), tmp_path / "shorter")
    done = command("export", shorter, "--format", "dense", "--out", tmp_path / "dense")
    assert done.code == 0, done.err
    assert "read back by transformers: 14 weights equal, logits differ by 0 at most" in done.out
    assert "2 of 3 blocks; the others are left out" in done.out
    for format in ("compressed-tensors", "plan"):
        options = ("--format", format, "--out", tmp_path / format, "--no-check")
        done = command("export", shorter, *options)
        assert done.code == 0, done.err
    config = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    half = packed(model, tiny.tokenizer, space, dropping(space, 2), tmp_path / "half")
    refused = command("export", half, "--format", "compressed-tensors", "--out", tmp_path / "no")
    assert refused.code == 2
    assert "every sublayer must be there in format 'compressed-tensors'" in refused.err
    assert "layers.1.self_attn.o_proj" in refused.err
    assert not (tmp_path / "no").exists()
    decoded = command("dequantize", half, "--out", tmp_path / "plain")
    assert decoded.code == 0, decoded.err


def test_blocks_that_stay_keep_their_own_codes(tiny, tmp_path):
    """8 bits, dropped, 4 bits: the second of two blocks has 4."""
    space = space_of(tiny.model, "blocks", ("w4g32sym", "w8g32sym", "drop"))
    allocation = Allocation(tuple(map(parse_level, ("w8g32sym", "drop", "w4g32sym"))))

    def load(name, level):
        if isinstance(level, GONE):
            return SimpleNamespace(tensors={})
        weight = weight_of(tiny.model.get_submodule(name)).float()
        solver = Solver(scale_bits=8)
        return solve([weight], Statistics(None, 0), [level], solver)[0][0].packed

    database = SimpleNamespace(load=load)
    result = packed(tiny.model, tiny.tokenizer, space, allocation, tmp_path / "r", database)
    export(result, tmp_path / "out", format="compressed-tensors", check=False)
    rows = describe_folder(tmp_path / "out")["modules"]
    bits = {row["name"][:14]: row["level"] for row in rows if ".layers." in row["name"]}
    assert bits == {"model.layers.0": "w8g32sym", "model.layers.1": "w4g32sym"}
    codes = {
        name: load(name, level).dense()
        for name, level in space.module_levels(allocation).items()
        if not isinstance(level, GONE)
    }
    expected = zeroed_logits(tiny.model, space.module_levels(allocation), codes)
    assert torch.equal(stock_logits(tmp_path / "out"), expected)


def test_a_block_whose_kind_follows_from_its_number_is_not_renumbered():
    """Every second block is a mixture of experts, counted from the first."""
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 1}
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 4, "vocab_size": 64, **small}
    config |= {**experts, "intermediate_size": 64, "decoder_sparse_step": 2}

    def left(**settings):
        packing = {"removed": {"model.layers.0": 0}}
        levels = {"model.layers.0.self_attn.o_proj": DROP}
        source = Source(Path(), config | settings, {"allocation": []}, levels, packing)
        return without_dropped(source)

    with pytest.raises(SpaceError, match=r"block 1, which would be block 0 .*Export it as native"):
        left()
    named = left(decoder_sparse_step=1, mlp_only_layers=[0, 2])
    assert named.config["mlp_only_layers"] == [1]
    assert named.kept == (1, 2, 3)
