"""A joint space from file to packed model: built, completed, searched, exported, reloaded."""

import pytest
import torch
from runs import TOKENS, command, write_config
from toys import SMOLLM2, toy_space

import autocompress
from autocompress.backends import BACKENDS
from autocompress.build import lacking_bytes
from autocompress.core import Allocation, Layer, SearchSpace
from autocompress.database import LevelDatabase
from autocompress.errors import SpaceError
from autocompress.exporters.native import other_bytes, save_native
from autocompress.generation import make_decoder
from autocompress.integration import WEIGHTS
from autocompress.latency_cases import find_backend, in_parts
from autocompress.lean import LeanDecoder, lean_decoder
from autocompress.levels import Dense, parse_level
from autocompress.models import find_layers
from autocompress.runtime import packed_modules
from autocompress.spaces import SpaceConfig, build_space, list_spaces
from autocompress.stitch import StitchedModel
from autocompress.targets import Target

KEYS = (
    *("w4g64", "s50", "2:4", "4:8", "r40%", "r60%w8", "s30+w4g32", "2:4+w8sym", "o1%+w4g64"),
    *("r10%+w4g64", "r10%w8+w4g32", "r10%+s50", "r10%+2:4+w4g32", "r10%+o1%+w4g64", "w6g8"),
)
KERNELS = BACKENDS["native"].supports(parse_level("w4g64"), (64, 64), "a8")
TOKENS_IN = torch.arange(2 * 48).view(2, 48) * 7 % 512


@pytest.fixture(scope="module")
def space(tiny):
    """The block linears and the embedding, which is also the head."""
    config = SpaceConfig("joint", tuple(map(parse_level, KEYS)), ("blocks", "embedding"))
    return build_space(config, find_layers(tiny.model, config.scope))


@pytest.fixture(scope="module")
def database(tiny, space, tiny_windows, build_levels, tmp_path_factory):
    path = tmp_path_factory.mktemp("joint") / "database"
    return build_levels(tiny, space, tiny_windows.calibrate[:8], path)


@pytest.fixture(scope="module")
def allocation(space):
    """Every level somewhere, the embedding among them."""
    levels = space.levels[0]
    return Allocation(tuple(levels[(3 + i) % len(levels)] for i in range(len(space.layers))))


@pytest.fixture(scope="module")
def stitched_logits(tiny, space, database, allocation):
    stitched = StitchedModel(tiny.model, space, database)
    found = logits_of(stitched.stitch(allocation))
    stitched.restore()
    return found


@pytest.fixture(scope="module")
def exported(tiny, space, database, allocation, tmp_path_factory):
    out = tmp_path_factory.mktemp("joint") / "out"
    save_native(tiny.model, tiny.tokenizer, space, allocation, database, out)
    return out


@torch.inference_mode()
def logits_of(model):
    return model(input_ids=TOKENS_IN, use_cache=False).logits


def gap(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def test_the_database_holds_packed_levels_and_nothing_dense(space, database):
    for layer, levels in zip(space.layers, space.levels, strict=True):
        for level in levels:
            packed = database.load(layer.name, level)
            assert packed.bits == level.storage_bits(layer.shapes[0])
            assert len(database.row_errors(layer.name, level)) == layer.shapes[0][0]
    stored = sum(layer.storage_bits(level) for layer in space.layers for level in space.levels[0])
    rows = sum(layer.shapes[0][0] * 32 for layer in space.layers) * len(KEYS)
    size = sum((database.path / name).stat().st_size for name in database.files)
    assert size < (stored + rows) / 8 * 1.05 + 300_000  # headers name every tensor


def test_new_joint_levels_are_computed_alone(
    tiny, tiny_windows, build_levels, tmp_path, monkeypatch
):
    import autocompress.solving as solving

    layers = find_layers(tiny.model)
    asked = []

    def spy(weights, statistics, levels, solver):
        asked.append({str(level) for level in levels})
        return found(weights, statistics, levels, solver)

    found = solving.solve
    monkeypatch.setattr(solving, "solve", spy)
    for keys in (("w4g64", "r10%+w4g64"), ("w4g64", "r10%+w4g64", "2:4+w4g64", "s50")):
        asked.clear()
        space = SearchSpace("grown", layers, (tuple(map(parse_level, keys)),) * len(layers))
        grown = build_levels(tiny, space, tiny_windows.calibrate[:4], tmp_path / "grown")
    assert set(map(frozenset, asked)) == {frozenset({"2:4+w4g64"}), frozenset({"s50"})}
    assert set(next(iter(grown.entries.values()))) == {"w4g64", "r10%+w4g64", "2:4+w4g64", "s50"}


def test_an_exact_reload_gives_the_stitched_logits(exported, stitched_logits):
    model, _ = autocompress.load(exported, activations="float32")
    assert {str(module.level) for module in packed_modules(model)} == set(KEYS)
    assert gap(logits_of(model), stitched_logits) < 1e-5
    slow, _ = autocompress.load(exported, activations="float32", backend="dequantize")
    assert gap(logits_of(slow), stitched_logits) < 1e-5


@pytest.mark.skipif(KERNELS is not None, reason=str(KERNELS))
@pytest.mark.parametrize(("activations", "most"), [("int8", 5e-2), ("bfloat16", 1.5e-2)])
def test_the_native_kernels_run_every_level(exported, stitched_logits, activations, most):
    with pytest.warns(UserWarning, match="groups must be multiples of 32"):  # w6g8
        model, _ = autocompress.load(exported, activations=activations)
        logits = logits_of(model)
    used = {str(module.level): module.backend for module in packed_modules(model)}
    assert {key for key, name in used.items() if name != "native"} == {"w6g8"}
    assert 0 < gap(logits, stitched_logits) < most


def test_a_layer_in_parts_is_decoded_by_the_models_own_forward(exported, stitched_logits):
    model, _ = autocompress.load(exported, activations="bfloat16")
    reason = lean_decoder(model, 64)
    assert isinstance(reason, str)
    if KERNELS is None:
        assert reason.endswith("is more than one matrix")
    decoder = make_decoder(model, 64)
    assert not isinstance(decoder, LeanDecoder)
    step = decoder.prefill(TOKENS_IN[0])
    assert gap(step, stitched_logits[0, -1]) < 2e-2


@pytest.mark.skipif(KERNELS is not None, reason=str(KERNELS))
def test_sparse_layers_decode_in_one_native_call(tiny, space, database, tmp_path):
    levels = [lv for lv in space.levels[0] if str(lv)[0] in "s24" and not in_parts(lv)]
    mixed = Allocation(tuple(levels[i % len(levels)] for i in range(len(space.layers))))
    save_native(tiny.model, tiny.tokenizer, space, mixed, database, tmp_path)
    model, _ = autocompress.load(tmp_path, activations="bfloat16")
    decoder = lean_decoder(model, 64)
    assert not isinstance(decoder, str), decoder
    assert gap(decoder.prefill(TOKENS_IN[0]), logits_of(model)[0, -1]) < 2e-2


@pytest.mark.parametrize("key", KEYS)
def test_what_one_native_call_cannot_run_is_not_timed(key):
    found = find_backend(parse_level(key), (64, 64), Target())
    matrices = "r" in key or "o" in key
    assert (isinstance(found, str) and "one matrix for a layer" in found) == matrices


def test_the_file_is_as_large_as_the_costs_say(tiny, space, allocation, exported):
    size = (exported / WEIGHTS).stat().st_size
    levels = sum(
        layer.storage_bits(level) // 8
        for layer, level in zip(space.layers, allocation.levels, strict=True)
    )
    promised = levels + other_bytes(tiny.model, space)
    assert promised - 900 * len(space.layers) < size <= promised  # headers at their largest


def test_a_model_is_saved_again_as_it_was(exported, tmp_path):
    model, _ = autocompress.load(exported)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits_of(model)  # backends take the weights over
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_search_over_a_joint_space_ends_in_a_model(tiny_folder, tmp_path):
    toml = tmp_path / "space.toml"
    levels = '"w2g64", "w4g64", "2:4+w4g64", "r20%+w2g64", "o1%+w2g64", "s70", "r50%w8"'
    toml.write_text(f'name = "joint"\nlevels = [{levels}]\n')
    config = write_config(tmp_path / "config.toml", tiny_folder, TOKENS, prefix="w4g64")
    out = tmp_path / "result"
    ran = command(
        "search", "--config", config, "--space", toml, "--budget", "3.2bits", "--out", out, "--json"
    )
    facts = ran.json()
    chosen = {entry["level"] for entry in facts["allocation"]}
    assert any("+" in key for key in chosen), chosen
    model, _ = autocompress.load(out)
    assert torch.isfinite(logits_of(model)).all()


@pytest.mark.parametrize(
    "name",
    ["sparse-unstructured", "sparse-2-4", "lowrank", "joint-cpu", "joint-everything", "ct-vllm"],
)
def test_the_shipped_spaces_fit_the_default_model(name):
    config = {it.name: it for it in list_spaces()}[name]
    layers = toy_space(1, shapes=SMOLLM2).layers
    space = build_space(config, layers)
    sizes = [layer.storage_bits(level) for layer in layers for level in space.levels[0]]
    assert min(sizes) > 0


def test_forty_levels_of_the_default_model_stay_below_4_gb(tmp_path):
    config = {it.name: it for it in list_spaces()}["joint-everything"]
    space = build_space(config, toy_space(30, shapes=SMOLLM2).layers)
    assert len(config.levels) == 40
    sizes = lacking_bytes(LevelDatabase(tmp_path, {}), space)
    rows = sum(rows for layer in space.layers for rows, _ in layer.shapes)  # a float32 error each
    assert len(sizes) == 39  # all but dense
    assert 1.9e9 < sum(sizes.values()) + 4 * rows * len(sizes) < 2.2e9


@pytest.mark.skipif(KERNELS is not None, reason=str(KERNELS))
@pytest.mark.parametrize("name", ["joint-cpu", "joint-everything"])
def test_every_level_has_a_native_kernel(name):
    config = {it.name: it for it in list_spaces()}[name]
    for level in config.levels:
        if isinstance(level, Dense):
            continue
        for shape in SMOLLM2.values():
            assert BACKENDS["native"].supports(level, shape, "a8") is None


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("2:4", (8, 30), r"layer 'a\.b' cannot take 2:4: the inputs .* multiple of 4\. Got 30"),
        ("r9+w4g64", (8, 30), r"layer 'a\.b' cannot take r9\+w4g64: the rank .* at most 8"),
    ],
)
def test_a_layer_that_cannot_take_a_level_is_named(key, shape, message):
    config = SpaceConfig("test", (parse_level("w4g64"), parse_level(key)))
    with pytest.raises(SpaceError, match=message):
        build_space(config, [Layer("a.b", ("a.b",), (shape,))])
