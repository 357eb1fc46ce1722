"""Which statistics each layer of a database is solved with."""

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from autocompress.build import input_statistics
from autocompress.core import SearchSpace
from autocompress.experts import unfuse_experts
from autocompress.levels import parse_level
from autocompress.models import LoadedModel, find_layers, load_model
from autocompress.operators import Solver, solve
from autocompress.prefix_levels import default_prefix, nearest
from autocompress.spaces import SpaceConfig, build_space, list_spaces
from autocompress.stitch import StitchedModel
from autocompress.structure import layers_for
from autocompress.tracing import hidden_states


def space_of(loaded, scope):
    layers = find_layers(loaded.model, scope)
    levels = (parse_level("w2g64"), parse_level("w4g64"))
    return SearchSpace("test", layers, (levels,) * len(layers))


@pytest.fixture
def windows(tiny_windows):
    return tiny_windows.calibrate[:8]


def test_a_layer_that_no_token_reaches_is_rounded_and_stored(build_levels, tmp_path):
    config = Qwen3MoeConfig(
        **{"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
        **{"num_experts": 8, "num_experts_per_tok": 1, "vocab_size": 512, "head_dim": 16},
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    unfuse_experts(model)
    loaded = LoadedModel(model, None, "moe", "moe")
    windows = np.arange(4).reshape(1, 4)  # four tokens for eight experts
    database = build_levels(loaded, space_of(loaded, ("blocks",)), windows, tmp_path / "moe")
    level = parse_level("w2g64")
    unreached = []
    for layer in find_layers(model):
        weight = model.get_submodule(layer.name).weight
        [[rounded]] = solve([weight], input_statistics(None, weight.shape[1]), [level], Solver())
        same = torch.equal(database.load(layer.name, level).dense(), rounded.packed.dense())
        unreached += [layer.name] if same else []
        assert 0 < database.error(layer.name, level) < 1
    experts = {name.rpartition(".")[0] for name in unreached}
    assert len(unreached) == 3 * len(experts)
    assert 4 <= len(experts) < 8


def test_a_tied_embedding_is_solved_with_the_input_of_the_head(
    tiny, windows, build_levels, tmp_path
):
    space = space_of(tiny, ("blocks", "embedding"))
    database = build_levels(tiny, space, windows, tmp_path / "tied")
    hidden = hidden_with_prefix(tiny, database, windows)
    weight = tiny.model.lm_head.weight
    check_solved(database, "model.embed_tokens", weight, input_statistics(hidden, 64))


def test_an_untied_embedding_is_solved_without_statistics_and_the_head_with_its_own(
    tiny_folder, windows, build_levels, tmp_path
):
    untied = load_model(str(tiny_folder), torch.float32)
    head = torch.nn.Parameter(untied.model.lm_head.weight.flip(0), requires_grad=False)
    untied.model.lm_head.weight = head
    untied.model.config.tie_word_embeddings = False
    space = space_of(untied, ("blocks", "embedding", "head"))
    database = build_levels(untied, space, windows, tmp_path / "untied")
    hidden = hidden_with_prefix(untied, database, windows)
    check_solved(database, "lm_head", head, input_statistics(hidden, 64))
    embedding = untied.model.model.embed_tokens.weight
    check_solved(database, "model.embed_tokens", embedding, input_statistics(None, 64))


def hidden_with_prefix(loaded, database, windows):
    """The head's input when the blocks, not the embedding, are at the prefix level."""
    layers = find_layers(loaded.model)
    space = SearchSpace("blocks", layers, ((parse_level("w4g64"),),) * len(layers))
    stitched = StitchedModel(loaded.model, space, database)
    model = stitched.stitch(space.uniform(parse_level("w4g64")))
    with torch.inference_mode():
        hidden = hidden_states(model, torch.from_numpy(windows))
    stitched.restore()
    return hidden


def check_solved(database, name, weight, statistics):
    level = parse_level("w2g64")
    [[expected]] = solve([weight], statistics, [level], Solver())
    assert torch.equal(database.load(name, level).dense(), expected.packed.dense())
    assert database.error(name, level) == pytest.approx(expected.error, rel=1e-3)


def test_statistics_are_the_mean_of_the_outer_products():
    x = torch.randn(3, 7000, 5, dtype=torch.float64)
    found = input_statistics(x.float(), 5)
    flat = x.reshape(-1, 5)
    assert found.tokens == 21_000
    expected = flat.T @ flat / 21_000
    torch.testing.assert_close(found.hessian.double(), expected, rtol=1e-4, atol=1e-4)


def test_every_shipped_space_is_calibrated_behind_a_usable_model(tiny):
    """The level nearest to w3g64 is the smallest where there are no codes, such as s90."""
    found = {}
    for config in list_spaces():
        space = build_space(config, layers_for(tiny.model, config), shapes=False)
        found[config.name] = str(default_prefix(space))
    others = {"sparse-unstructured": "s50", "lowrank": "r40%", "depth": "dense"}
    others["width"] = "dense"
    assert found == dict.fromkeys(found, "w3g64") | others


def test_a_level_that_some_layer_cannot_take_is_no_prefix(tiny):
    for keys, wanted in ((("r8", "r24", "r30", "dense"), "r24"), (("r40", "r60", "drop"), "dense")):
        config = SpaceConfig("ranks", tuple(map(parse_level, keys)))
        layers = find_layers(tiny.model)
        space = SearchSpace("ranks", layers, (config.levels,) * len(layers))
        assert str(default_prefix(space)) == wanted


@pytest.mark.parametrize(
    ("allowed", "found"),
    [(("dense",), "dense"), (("q8_0", "q4_0", "dense"), "q4_0"), (("q4_0", "q5_0"), "q4_0")],
)
def test_a_prefix_that_a_width_cannot_take_has_a_nearest_level(allowed, found):
    """Blocks of 256 inputs do not divide 576."""
    levels = [parse_level(key.upper() if key != "dense" else key) for key in allowed]
    chosen = nearest(parse_level("Q3_K"), levels, (576, 576))
    assert str(chosen).lower() == found
