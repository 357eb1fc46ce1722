"""Narrower sublayers: which channels go, what makes up for them, what is left of a model."""

import copy
import itertools

import pytest
import torch
from runs import command, promised_bytes, write_config
from test_removal import model  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM

import autocompress
from autocompress.core import Allocation
from autocompress.database import LevelDatabase
from autocompress.errors import LevelError, SpaceError
from autocompress.exporters.native import _file_tensors, save_native
from autocompress.exporters.source import Source
from autocompress.generation import PlainDecoder
from autocompress.integration import WEIGHTS
from autocompress.lean import lean_decoder
from autocompress.levels import Width, parse_level
from autocompress.models import LoadedModel, find_layers
from autocompress.operators.width import choose_inputs, refit_inputs
from autocompress.packing import pack_modules
from autocompress.sensitivity import fisher_sensitivities
from autocompress.spaces import SpaceConfig, build_space, load_space
from autocompress.stitch import StitchedModel
from autocompress.structure import find_roles, layers_for

KEYS = ("dense", "w4g64", "width75%", "width50%+w4g64", "width50%", "drop")
TOKENS = torch.arange(48).view(1, 48) * 7 % 512


def space_of(found, tie, keys=KEYS):
    config = SpaceConfig("width", tuple(map(parse_level, keys)), tie=tie)
    return build_space(config, layers_for(found, config))


def layer_of(rows, width, seed=0):
    """A weight, its inputs' Hessian, and the inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, width, generator=generator)
    x[:, 1:] += 0.7 * x[:, :-1]
    return torch.randn(rows, width, generator=generator), x.T @ x / 200, x


@pytest.mark.parametrize("seed", range(4))
def test_what_is_left_is_the_least_squares_solution(seed):
    weight, hessian, x = layer_of(9, 16, seed)
    kept = torch.rand(16, generator=torch.Generator().manual_seed(seed)) > 0.4
    wanted = torch.linalg.lstsq(x[:, kept].double(), x.double() @ weight.double().T).solution.T
    assert torch.allclose(refit_inputs(weight, hessian, kept), wanted.float(), atol=1e-4)


def error_of(weight, hessian, kept):
    full = torch.zeros_like(weight)
    full[:, kept] = refit_inputs(weight, hessian, kept)
    return float((((full - weight) @ hessian) * (full - weight)).sum())


@pytest.mark.parametrize("of", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_channel_that_goes_first_is_the_best_by_trying_all(of, seed):
    weight, hessian, _ = layer_of(5, 16, seed)
    kept = choose_inputs(weight, hessian, of, [16 - of])[16 - of]
    every = []
    for channel in range(16 // of):
        others = torch.ones(16, dtype=torch.bool)
        others[channel * of : (channel + 1) * of] = False
        every.append(error_of(weight, hessian, others))
    assert error_of(weight, hessian, kept) == pytest.approx(min(every), rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_half_of_the_channels_are_nearly_the_best_half(seed):
    weight, hessian, _ = layer_of(5, 10, seed)
    kept = choose_inputs(weight, hessian, 1, [8, 5])
    every = [
        error_of(weight, hessian, torch.tensor([i in chosen for i in range(10)]))
        for chosen in itertools.combinations(range(10), 5)
    ]
    found = error_of(weight, hessian, kept[5])
    assert min(every) <= found * (1 + 1e-6) and found <= 1.3 * min(every)
    assert found < 0.7 * sorted(every)[len(every) // 2]
    assert bool((kept[5] <= kept[8]).all()), "widths are nested"


def test_all_channels_are_the_same_weight():
    weight, hessian, _ = layer_of(9, 16)
    kept = choose_inputs(weight, hessian, 1, [16])[16]
    assert kept.all()
    assert torch.allclose(refit_inputs(weight, hessian, kept), weight, atol=1e-5)


@pytest.fixture(scope="module")
def space(tiny):
    return space_of(tiny.model, "sublayers")


@pytest.fixture(scope="module")
def database(tiny, space, tiny_windows, build_levels, tmp_path_factory):
    path = tmp_path_factory.mktemp("width") / "database"
    return build_levels(tiny, space, tiny_windows.calibrate[:4], path)


@pytest.fixture(scope="module")
def allocation(space):
    """Attention and FFN, narrower in two ways, one dropped, one quantized."""
    keys = ("width50%", "width75%", "width50%+w4g64", "width50%+w4g64", "drop", "w4g64")
    return Allocation(tuple(map(parse_level, keys)))


@pytest.fixture(scope="module")
def stitched(tiny, space, database):
    return StitchedModel(tiny.model, space, database)


def test_channels_of_a_llama(tiny):
    roles = find_roles(tiny.model, [layer.name for layer in find_layers(tiny.model)])
    config = tiny.model.config
    assert roles["model.layers.0.mlp.down_proj"].channels == config.intermediate_size
    assert roles["model.layers.1.self_attn.o_proj"].channels == config.num_key_value_heads
    assert roles["model.layers.0.mlp.up_proj"].channels == 1


def test_all_modules_of_a_sublayer_keep_the_same_channels(tiny, space, database):
    for layer in space.layers:
        for level in map(parse_level, ("width75%", "width50%+w4g64")):
            stored = dict(zip(layer.modules, layer.module_levels(level), strict=True))
            masks = [database.kept(name, own).view(-1, own.of) for name, own in stored.items()]
            assert all(bool((mask == mask[:, :1]).all()) for mask in masks)
            assert all(torch.equal(mask[:, 0], masks[0][:, 0]) for mask in masks)
            for name, mask in zip(stored, masks, strict=True):
                if str(stored[name]).startswith("rows75%"):  # as they are, whatever the prefix was
                    rows = tiny.model.get_submodule(name).weight[mask.flatten()]
                    assert torch.equal(
                        database.load(name, stored[name]).tensors["weight"], rows.bfloat16()
                    )
            bits = sum(database.load(name, own).bits for name, own in stored.items())
            assert bits == layer.storage_bits(level) < layer.storage_bits(parse_level("dense"))


@torch.inference_mode()
def test_what_nobody_reads_changes_nothing(stitched, space, allocation):
    """Zeros in the rows that feed a removed channel, in place of what was there: the same model."""
    expected = stitched.stitch(allocation)(input_ids=TOKENS, use_cache=False).logits
    for name, level in space.module_levels(allocation).items():
        if str(level).startswith("rows"):
            module, kept = stitched.model.get_submodule(name), stitched.database.kept(name, level)
            module.weight = torch.nn.Parameter(module.weight * kept[:, None], requires_grad=False)
            stitched.current[name] = None
    found = stitched.model(input_ids=TOKENS, use_cache=False).logits
    stitched.restore()
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def saved(tiny, space, database, allocation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow")
    save_native(tiny.model, tiny.tokenizer, space, allocation, database, folder)
    return folder


@torch.inference_mode()
def test_the_result_is_what_was_searched_and_as_small_as_promised(
    tiny, stitched, space, allocation, saved
):
    expected = stitched.stitch(allocation)(input_ids=TOKENS, use_cache=False).logits
    stitched.restore()
    left, _ = autocompress.load(saved, activations="float32")
    gap = (left(input_ids=TOKENS).logits - expected).abs().max()
    assert float(gap) < 2e-5 * float(expected.abs().max())
    attention = left.model.layers[0].self_attn
    assert attention.q_proj.weight.shape[0] == tiny.model.config.hidden_size // 2
    assert left.model.layers[0].mlp.down_proj.weight.shape[1] == 120
    stored, outside = promised_bytes(tiny.model, space, allocation)
    size = (saved / WEIGHTS).stat().st_size
    assert stored + 0.98 * outside < size < stored + outside + 8000  # header


@torch.inference_mode()
def test_generation_with_fewer_heads_is_that_of_whole_forwards(saved):
    left, _ = autocompress.load(saved, activations="float32")
    assert "fewer than 4 heads" in str(lean_decoder(left, 64)) or "kernels" in str(
        lean_decoder(left, 64)
    )
    steps, known = PlainDecoder(left, 64), list(range(3, 9))
    logits = steps.prefill(torch.tensor(known))
    for _ in range(6):
        whole = left(input_ids=torch.tensor([known]), use_cache=False).logits[0, -1]
        assert torch.allclose(logits, whole, atol=1e-3 * float(whole.abs().max()))
        known.append(int(whole.argmax()))
        logits = steps.step(known[-1])


def test_sensitivities_count_a_channel_once(stitched, space, tiny_windows):
    windows = tiny_windows.search[:2]
    found = fisher_sensitivities(stitched, windows).mean
    exact = fisher_sensitivities(stitched, windows, method="exact").mean
    for one, other in zip(found, exact, strict=True):
        for level in map(parse_level, ("width75%", "width50%", "width50%+w4g64")):
            assert one[level] == pytest.approx(other[level], rel=0.6)  # an estimate
        assert one[parse_level("drop")] > one[parse_level("width50%")]


def test_a_killed_build_goes_on_to_the_same_bytes(
    tiny, space, database, tiny_windows, build_levels, tmp_path
):
    """Killed when writers were solved and what feeds them was not."""
    path = tmp_path / "database"
    path.mkdir()
    again = LevelDatabase(path, database.identity)
    for name, levels in database.entries.items():
        for key, entry in levels.items():
            if not key.startswith("rows"):
                again.entries.setdefault(name, {})[key] = entry
                again.files[entry["file"]] = database.files[entry["file"]]
                again.shapes[name] = database.shapes[name]
    for file in again.files:
        (path / file).write_bytes((database.path / file).read_bytes())
    again._save()
    found = build_levels(tiny, space, tiny_windows.calibrate[:4], path)
    for name, levels in database.entries.items():
        for level in map(parse_level, levels):
            one, other = database.load(name, level), found.load(name, level)
            assert all(torch.equal(one.tensors[k], other.tensors[k]) for k in one.tensors)
            assert found.error(name, level) == pytest.approx(database.error(name, level), rel=1e-4)


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


@torch.no_grad()
def test_other_families_get_narrower_too(model, build_levels, tmp_path):  # noqa: F811
    """(in, out) weights, biases, FFNs without a module of their own, norms of heads, experts."""
    model = copy.deepcopy(model).to(torch.bfloat16).float()  # as it ships
    config = SpaceConfig("width", (parse_level("dense"), parse_level("width50%")), tie="sublayers")
    layers = layers_for(model, config)
    free, level = [], parse_level("width50%")
    for layer in build_space(
        SpaceConfig("any", (parse_level("dense"),), tie="sublayers"), layers
    ).layers:
        try:
            free.append(layer.module_levels(level))
        except LevelError as error:
            assert "channels" in str(error)
    # OPT's attention counts its heads itself, GPT-2's has one map for queries, keys and values.
    assert len(free) == {"opt": 4, "gpt2": 4, "mixtral": 12}.get(model.config.model_type, 8)
    pins = () if len(free) >= 8 else (("*attn*", parse_level("dense")),)
    space = build_space(config, layers, pins)
    tokens = torch.arange(32).view(2, 16).numpy() % 64
    loaded = LoadedModel(model, NoTokenizer(), "tiny", "x")
    database = build_levels(loaded, space, tokens, tmp_path / "database")
    chosen = Allocation(tuple(allowed[-1] for allowed in space.levels))
    levels = space.module_levels(chosen)
    left = copy.deepcopy(model)
    pack_modules(left, levels, torch.float32)
    left.load_state_dict(_file_tensors(model, levels, {}, database), strict=False)
    stitched = StitchedModel(model, space, database)
    ids = torch.arange(20).view(1, -1) * 7 % 64
    expected = stitched.stitch(chosen)(input_ids=ids, use_cache=False).logits
    stitched.restore()
    gap = (left(input_ids=ids, use_cache=False).logits - expected).abs().max()
    assert float(gap) < 1e-5
    assert sum(p.numel() for p in left.parameters()) < sum(p.numel() for p in model.parameters())
    cache, steps = None, []
    for token in ids[0]:
        out = left(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits[:, -1])
    assert torch.allclose(torch.stack(steps, 1), expected, atol=1e-5)


@pytest.mark.parametrize("key", ["width75%", "width75%+w4g64"])
def test_what_is_no_whole_sublayer_is_refused(tiny, key):
    with pytest.raises(SpaceError, match=r"cannot take width75.*one sublayer of a block.*tie"):
        space_of(tiny.model, (("gate_proj", "up_proj"),), ("dense", key))
    alone = next(it for it in layers_for(tiny.model, load_space("depth")) if "down" in it.name)
    with pytest.raises(LevelError, match=r"with all that feeds it.*without .*gate_proj, .*up_proj"):
        alone.module_levels(parse_level(key))


@pytest.mark.parametrize("key", ["width0%", "width100%", "width100%+w4g64"])
def test_all_or_nothing_is_no_width(key):
    with pytest.raises(LevelError, match=r"above 0 % and below 100 %.*'drop'.*'dense'"):
        parse_level(key)


def test_the_embedding_and_single_heads_have_no_channels(tiny):
    config = SpaceConfig(
        "all", (parse_level("dense"), Width(75)), ("blocks", "embedding"), "sublayers"
    )
    with pytest.raises(
        SpaceError, match=r"embed_tokens' cannot take width75%.*sublayer of a block"
    ):
        build_space(config, layers_for(tiny.model, config))


def test_a_search_for_width_ends_in_a_narrower_model(tiny_folder, tmp_path):
    config = write_config(tmp_path / "config.toml", tiny_folder, spend=4000)
    (tmp_path / "width.toml").write_text(
        'name = "width"\nlevels = ["dense", "width75%", "width50%", "width50%+w4g64"]\n'
        'scope = ["blocks"]\ntie = "sublayers"\n'
    )
    options = ("--config", config, "--space", tmp_path / "width.toml", "--run", tmp_path / "run")
    out = tmp_path / "result"
    found = command("search", *options, "--budget", "10bits", "--out", out, "--json").json()
    assert found["effective_bits"] <= 10
    assert any("width" in entry["level"] for entry in found["allocation"])
    narrow, _ = autocompress.load(out, activations="float32")
    assert command("dequantize", out, "--out", tmp_path / "dense").code == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.inference_mode():
        one, other = (it(input_ids=TOKENS, use_cache=False).logits for it in (narrow, plain))
    assert float((one - other).abs().max()) < 0.02 * float(other.abs().max())  # decoded to bf16
    source = Source.open(out)
    assert source.narrow
    with pytest.raises(SpaceError, match=r"every channel must be there in format 'gguf'.*dense"):
        source.must_be_whole("gguf")
