"""Dropped sublayers: which modules belong together, what is left of a model, its cache."""

import copy

import pytest
import torch
import transformers
from conftest import make_llama
from runs import command, promised_bytes, write_config

import autocompress
from autocompress.core import Allocation, SearchSpace
from autocompress.errors import LevelError, SpaceError
from autocompress.exporters.native import save_native
from autocompress.integration import WEIGHTS
from autocompress.latency import Use, layer_parts, layer_prices, needed_points
from autocompress.latency_store import LatencyStore
from autocompress.lean import LeanDecoder, lean_decoder
from autocompress.levels import Drop, Unread, module_levels, parse_level
from autocompress.models import find_layers, set_weight, weight_of
from autocompress.packing import pack_modules
from autocompress.removal import Nothing, Skipped, ZeroLinear, find_removed
from autocompress.spaces import SpaceConfig, build_space, load_space
from autocompress.stitch import StitchedModel
from autocompress.structure import find_roles, layers_for
from autocompress.targets import Target

DENSE, DROP = parse_level("dense"), parse_level("drop")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
GATED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES = {
    "Llama": GATED,
    "Qwen2": GATED,  # biases of q, k and v
    "Gemma3": {**GATED, **SLIDING, "head_dim": 8},  # two kinds of attention, norms of outputs
    "GPT2": {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4},  # (in, out), all biases
    "OPT": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32},  # no module around the FFN
    "Mixtral": {**GATED, "num_local_experts": 2},
}
LENGTH = 20  # tokens; more than a sliding window


def space_of(model, tie, keys=("dense", "drop")):
    config = SpaceConfig("depth", tuple(map(parse_level, keys)), tie=tie)
    return build_space(config, layers_for(model, config))


def dropping(space, *places):
    """Drop the layers at these places, dense elsewhere."""
    wanted = {place % len(space.layers) for place in places}
    return Allocation(tuple(DROP if i in wanted else DENSE for i in range(len(space.layers))))


def make_family(name):
    """Four blocks of random weights, biases among them."""
    import transformers

    from autocompress.experts import unfuse_experts

    kinds = {"Gemma3": "Gemma3TextConfig", "GPT2": "GPT2Config"}
    config = getattr(transformers, kinds.get(name, f"{name}Config"))
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    heads = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, heads)(config(**FAMILIES[name], **ends))
        for parameter in made.parameters():
            if parameter.dim() == 1:  # biases and norms would be zeros and ones
                parameter.data += 0.1 * torch.randn_like(parameter)
    unfuse_experts(made)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return make_family(request.param)


@torch.inference_mode()
def test_what_is_left_computes_what_zero_weights_do_token_by_token_too(model):
    """Also without the first block, the last one, and all attention of one kind."""
    tokens = torch.arange(1, LENGTH + 1).view(1, -1) * 7 % 64
    for tie, places in (
        *(("blocks", it) for it in ((0,), (-1,), (0, 1), (0, 2), (1, 3))),
        *(("sublayers", it) for it in ((0,), (-1,), (0, 2), (0, 3, -2))),
    ):
        space = space_of(model, tie)
        levels = space.module_levels(dropping(space, *places))
        zeroed, left = copy.deepcopy(model), copy.deepcopy(model)
        for name in (name for name, level in levels.items() if level == DROP):
            set_weight(zeroed.get_submodule(name), 0 * weight_of(zeroed.get_submodule(name)))
        pack_modules(left, levels, torch.float32, removed=find_removed(model, levels))
        expected = zeroed(input_ids=tokens, use_cache=False).logits
        assert torch.equal(left(input_ids=tokens, use_cache=False).logits, expected)
        cache, steps = None, []
        for token in tokens[0]:
            out = left(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[:, -1])
        assert torch.allclose(torch.stack(steps, 1), expected, atol=1e-5), (tie, places)


def test_sublayers_are_found_without_names(model):
    """Each is what writes and all that feeds it; a sublayer's layers are neighbours."""
    space = space_of(model, "sublayers")
    for layer in space.layers:
        stored = layer.module_levels(DROP)
        assert stored.count(Drop()) == 1
        assert stored.count(Unread()) == len(stored) - 1 >= 1
    assert len(space_of(model, "blocks").layers) == 4


def test_roles_of_a_llama(tiny):
    block = "model.layers.0."
    roles = find_roles(tiny.model, [layer.name for layer in find_layers(tiny.model)])
    feeding = {f"{block}self_attn.{name}_proj" for name in "qkv"}
    writer = f"{block}self_attn.o_proj"
    assert roles[writer].writes
    assert roles[writer].feeders == feeding
    assert all(roles[name].readers == {writer} and not roles[name].writes for name in feeding)
    assert roles[f"{block}mlp.down_proj"].feeders == {
        f"{block}mlp.{name}_proj" for name in ("gate", "up")
    }


@pytest.fixture(scope="module")
def space(tiny):
    return space_of(tiny.model, "sublayers", ("dense", "w4g64", "drop"))


@pytest.fixture(scope="module")
def database(tiny, space, tiny_windows, build_levels, tmp_path_factory):
    path = tmp_path_factory.mktemp("removal") / "database"
    return build_levels(tiny, space, tiny_windows.calibrate[:4], path)


@pytest.fixture
def drops(tiny, space, database):
    made = StitchedModel(tiny.model, space, database)
    yield made
    made.restore()


ALLOCATIONS = {
    "first attention": {0: "drop"},
    "first block": {0: "drop", 1: "drop"},
    "last FFN": {5: "drop", 2: "w4g64"},
    "all attention": {0: "drop", 2: "drop", 4: "drop"},
    "last block": {4: "drop", 5: "drop", 1: "w4g64"},
}


@pytest.fixture(params=ALLOCATIONS)
def allocation(request, space):
    chosen = ALLOCATIONS[request.param]
    levels = [parse_level(chosen.get(i, "dense")) for i in range(len(space.layers))]
    return Allocation(tuple(levels))


@torch.inference_mode()
def test_a_result_is_what_was_searched_and_as_small_as_promised(
    tiny, space, database, drops, allocation, tmp_path
):
    tokens = torch.arange(48).view(1, 48) * 7 % 512
    expected = drops.stitch(allocation)(input_ids=tokens, use_cache=False).logits[0]
    drops.restore()
    save_native(tiny.model, tiny.tokenizer, space, allocation, database, tmp_path)
    model, _ = autocompress.load(tmp_path, activations="float32")
    assert torch.allclose(model(input_ids=tokens).logits[0], expected, atol=2e-5)
    stored, outside = promised_bytes(tiny.model, space, allocation)
    size = (tmp_path / WEIGHTS).stat().st_size
    assert stored + 0.98 * outside < size < stored + outside + 6000  # header
    dropped = [
        layer for layer, lv in zip(space.layers, allocation.levels, strict=True) if lv == DROP
    ]
    assert not any(name in dict(model.named_modules()) for it in dropped for name in it.modules)


@torch.inference_mode()
@pytest.mark.parametrize("decoder", ["lean", "plain"])
def test_greedy_generation_is_that_of_whole_forwards(
    tiny, space, database, allocation, decoder, tmp_path
):
    save_native(tiny.model, tiny.tokenizer, space, allocation, database, tmp_path)
    model, _ = autocompress.load(tmp_path, activations="float32")
    prompt = torch.arange(3, 9)
    if decoder == "lean":
        steps = lean_decoder(model, 64)
        if not isinstance(steps, LeanDecoder):
            assert "kernels" in steps  # not built here
            pytest.skip(steps)
    else:
        from autocompress.generation import PlainDecoder

        steps = PlainDecoder(model, 64)
    known = prompt.tolist()
    logits = steps.prefill(prompt)
    for _ in range(12):
        whole = model(input_ids=torch.tensor([known]), use_cache=False).logits[0, -1]
        assert torch.allclose(logits, whole, atol=0.02 * float(whole.abs().max()))
        known.append(int(whole.argmax()))
        logits = steps.step(known[-1])


def test_nothing_is_computed_or_cached_where_a_sublayer_was(tiny, space):
    levels = space.module_levels(dropping(space, 0, 1, 2, 5))
    left = copy.deepcopy(tiny.model)
    pack_modules(left, levels, torch.float32, removed=find_removed(tiny.model, levels))
    blocks = left.model.layers
    assert isinstance(blocks[0], Skipped)
    assert isinstance(blocks[1].self_attn, Nothing)
    assert isinstance(blocks[2].mlp, Nothing)
    assert not any(isinstance(module, ZeroLinear) for module in left.modules())
    out = left(input_ids=torch.arange(5).view(1, 5), use_cache=True)
    used = [it for it in out.past_key_values.layers if it.is_initialized]
    assert len(used) == 1
    assert out.past_key_values.get_seq_length() == 5


def test_what_is_measured_alone_is_the_whole_sublayer(drops, space, tiny_windows):
    """The sensitivity of a drop is that of its output: what feeds it counts nothing."""
    from autocompress.sensitivity import fisher_sensitivities

    windows = tiny_windows.search[:2]
    found = fisher_sensitivities(drops, windows).mean
    exact = fisher_sensitivities(drops, windows, method="exact").mean
    for one, other in zip(found, exact, strict=True):
        assert one[DROP] > one[parse_level("w4g64")] > 0
        assert one[DROP] == pytest.approx(other[DROP], rel=0.3)
    assert drops.current[space.layers[0].modules[0]] == DENSE


def test_other_layers_are_calibrated_on_a_model_that_drops_nothing(
    tiny, tiny_windows, build_levels, tmp_path
):
    depth = space_of(tiny.model, "sublayers")
    alone = build_levels(tiny, depth, tiny_windows.calibrate[:4], tmp_path / "depth")
    writers = [n for n, lv in depth.module_levels(dropping(depth, *range(6))).items() if lv == DROP]
    assert set(alone.entries) == set(writers)
    for name in writers:
        assert alone.error(name, DROP) == pytest.approx(1, abs=0.05)
        assert alone.load(name, DROP).bits == 0
    last = alone.row_errors(writers[-1], DROP)
    assert float(last.sum()) > 0


@pytest.mark.parametrize(
    ("tie", "message"),
    [
        ((), r"cannot take drop: .* '.*q_proj' with all that reads it.* without .*o_proj"),
        ((("o_proj",),), "all that reads it"),
        (
            (("q_proj", "k_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")),
            "without .*v_proj",
        ),
    ],
)
def test_parts_of_a_sublayer_are_not_dropped(tiny, tie, message):
    with pytest.raises(SpaceError, match=message):
        space_of(tiny.model, tie)


def test_what_writes_is_not_dropped_without_what_feeds_it(tiny):
    layers = {layer.name: layer for layer in layers_for(tiny.model, load_space("depth"))}
    writer = layers["model.layers.0.self_attn.o_proj"]
    with pytest.raises(LevelError, match=r"with all that feeds it.*k_proj, .*q_proj, .*v_proj"):
        module_levels(DROP, writer.modules, writer.roles, writer.shapes)


def test_the_embedding_is_not_dropped(tiny):
    config = SpaceConfig("all", (DENSE, DROP), ("blocks", "embedding"), "sublayers")
    with pytest.raises(SpaceError, match=r"embed_tokens' cannot take drop: .* sublayer of a block"):
        build_space(config, layers_for(tiny.model, config))


def test_a_model_of_nothing_is_refused(tiny):
    config = SpaceConfig("none", (DROP,), tie="sublayers")
    with pytest.raises(SpaceError, match="must leave something of the model"):
        build_space(config, layers_for(tiny.model, config))
    pins = (("*", DROP),)
    config = SpaceConfig("depth", (DENSE, DROP), tie="sublayers", pins=pins)
    with pytest.raises(SpaceError, match="drops all that is in scope"):
        build_space(config, layers_for(tiny.model, config))


def test_the_shipped_spaces_leave_out_sublayers(tiny):
    for name in ("depth", "joint-sublayers"):
        config = load_space(name)
        found = build_space(config, layers_for(tiny.model, config))
        assert [len(layer.modules) for layer in found.layers] == [4, 3] * 3
        assert all(levels[-1] == DROP for levels in found.levels)


def test_a_search_for_depth_ends_in_a_shorter_model(tiny_folder, tmp_path):
    config = write_config(tmp_path / "config.toml", tiny_folder, prefix="dense", spend=4000)
    options = ("--config", config, "--space", "depth", "--run", tmp_path / "run", "--json")
    too_small = command("search", *options, "--budget", "1%", "--out", tmp_path / "none")
    assert too_small.code == 2
    assert "the cheapest allocation of 'depth'" in too_small.err
    out = tmp_path / "result"
    facts = command("search", *options, "--budget", "70%", "--out", out).json()
    chosen = [entry["level"] for entry in facts["allocation"]]
    assert set(chosen) == {"dense", "drop"}
    assert facts["effective_bits"] <= 0.7 * 16
    decoded = command("dequantize", out, "--out", tmp_path / "dense")
    assert decoded.code == 0, decoded.err
    model, _ = autocompress.load(out)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=model.dtype)
    ids = torch.arange(24)[None] % stock.config.vocab_size
    torch.testing.assert_close(stock(ids).logits, model(ids).logits)
    left = sum(p.numel() for p in model.parameters())
    assert left < 0.9 * sum(p.numel() for p in make_llama(0).parameters())


def test_what_is_dropped_takes_no_time(space, tmp_path):
    names = [name for layer in space.layers for name in layer.modules]
    uses = {name: (Use("decode", 1.0, 1),) for name in names}
    shapes = {part.shape for layer in space.layers for part in layer_parts(layer, uses)}
    backends = {(level, shape): "native" for level in space.levels[0] for shape in shapes}
    points = needed_points(space, uses, Target(), backends)
    timed = {str(level) for row in points.values() for level in row.values()}
    assert timed == {"dense", "w4g64"}
    store = LatencyStore(tmp_path / "store.json", {})
    dropping_only = SearchSpace("drop", space.layers, ((DROP,),) * len(space.layers))
    prices = layer_prices(dropping_only, uses, Target(), backends, {}, store)
    assert [row[DROP] for row in prices.middle] == [0.0] * len(space.layers)
