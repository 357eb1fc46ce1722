"""Equally narrow blocks, exported: a plain smaller configuration, or zeros where there is none."""

import json

import pytest
import torch
from runs import command
from test_export_depth import TOKENS, packed, stock_logits
from test_removal import make_family

from autocompress.core import Allocation
from autocompress.exporting import export
from autocompress.levels import parse_level
from autocompress.models import LoadedModel
from autocompress.spaces import SpaceConfig, build_space
from autocompress.stitch import StitchedModel
from autocompress.structure import layers_for

WIDTHS = ("dense", "drop", "width50%")
SMALLER = {  # family -> settings of half the FFN and half the heads, and what attention may be at
    "Llama": ({"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}, 1),
    "Qwen2": ({"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}, 1),
    "Gemma3": ({"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}, 1),
    "Mixtral": ({"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}, 1),
    "OPT": ({"ffn_dim": 32}, 0),  # its attention counts heads itself
    "GPT2": ({"n_inner": 64}, 0),
}


def narrow_space(model, heads, widths=WIDTHS):
    config = SpaceConfig("width", tuple(map(parse_level, widths)), tie="sublayers")
    pins = () if heads else (("*attn*", parse_level("dense")),)
    return build_space(config, layers_for(model, config), pins)


@pytest.fixture(scope="module", params=SMALLER)
def family(request, tiny, build_levels, tmp_path_factory):
    """Name, model, space and database."""
    model = make_family(request.param)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # as it ships
    space = narrow_space(model, SMALLER[request.param][1])
    loaded = LoadedModel(model, tiny.tokenizer, "tiny", "x")
    tokens = torch.arange(32).view(2, 16).numpy() % 64
    path = tmp_path_factory.mktemp("narrow") / "database"
    return request.param, model, space, build_levels(loaded, space, tokens, path)


def allocated(space, places=(), other="dense"):
    """Every layer at its last level but those at `places`."""
    levels = [allowed[-1] for allowed in space.levels]
    for place in places:
        levels[place] = parse_level(other)
    return Allocation(tuple(levels))


@torch.inference_mode()
def exported(family, tokenizer, allocation, out):
    """What the export says of itself, and how far its logits are from those that were searched."""
    _, model, space, database = family
    result = packed(model, tokenizer, space, allocation, out / "result", database)
    facts = export(result, out / "out", format="dense", check=False)
    stitched = StitchedModel(model, space, database)
    expected = stitched.stitch(allocation)(input_ids=TOKENS, use_cache=False).logits
    stitched.restore()
    gap = (stock_logits(out / "out") - expected).abs().max() / expected.abs().max()
    return facts, float(gap)


def test_stock_transformers_computes_what_was_searched(family, tiny, tmp_path):
    _, model, space, _ = family
    wanted = SMALLER[family[0]][0]
    facts, gap = exported(family, tiny.tokenizer, allocated(space), tmp_path)
    assert gap <= 1e-5, "fewer terms add up in another order"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in wanted} == wanted == facts["export"]["narrower"]
    assert facts["file_bytes"] < 2 * sum(p.numel() for p in model.parameters())


def test_blocks_that_differ_are_whole_with_zeros(family, tiny, tmp_path):
    space = family[2]
    free = [i for i, levels in enumerate(space.levels) if len(levels) > 1]
    facts, gap = exported(family, tiny.tokenizer, allocated(space, free[-1:]), tmp_path)
    assert gap <= 1e-5
    assert "narrower" not in facts["export"]


def test_a_block_less_and_the_others_narrower(family, tiny, tmp_path):
    if family[0] not in ("Llama", "Qwen2"):
        pytest.skip("two families with a setting for every size are enough")
    allocation = allocated(family[2], (0, 1, 4), "drop")  # of two layers a block
    facts, gap = exported(family, tiny.tokenizer, allocation, tmp_path)
    assert gap <= 1e-5
    assert facts["export"]["narrower"]["intermediate_size"] == 32
    assert facts["export"]["blocks"] == [1, 2, 3]
    assert facts["export"]["zeroed"] == ["model.layers.1.self_attn.o_proj"]


def test_a_narrow_quantized_model_is_one_for_other_runtimes(
    tiny, tiny_windows, build_levels, tmp_path
):
    """Of 160 channels 128 stay: whole groups."""
    space = narrow_space(tiny.model, heads=False, widths=("dense", "width80%+w4g32sym"))
    database = build_levels(tiny, space, tiny_windows.calibrate[:4], tmp_path / "database")
    own = (tiny.model, tiny.tokenizer, space, allocated(space))
    result = packed(*own, tmp_path / "result", database)
    options = ("--format", "compressed-tensors", "--out", tmp_path / "out")
    done = command("export", result, *options)
    assert done.code == 0, done.err
    assert "a narrower model: intermediate_size 128\n" in done.out
    assert "weights equal, logits differ by 0 at most" in done.out
