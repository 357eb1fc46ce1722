"""The packed export: read back exactly, in any process, or refused; never half-written."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import autocompress
from autocompress.backends import BACKENDS
from autocompress.core import Allocation
from autocompress.errors import BackendError, ModelError, OutputError
from autocompress.exporters import native
from autocompress.exporters.native import save_native
from autocompress.integration import WEIGHTS
from autocompress.levels import Dense, parse_level
from autocompress.models import load_model
from autocompress.runtime import (
    PackedEmbedding,
    PackedLinear,
    TiedHead,
    packed_modules,
    prepare,
    used_backends,
)
from autocompress.stitch import StitchedModel

KERNELS = BACKENDS["native"].supports(parse_level("w4g64"), (64, 64), "a8")  # why not, or None
needs_kernels = pytest.mark.skipif(KERNELS is not None, reason=str(KERNELS))
TOKENS = torch.arange(2 * 48).view(2, 48) * 7 % 512
EMBEDDING = "model.embed_tokens"
CODES = f"{EMBEDDING}.codes"


@pytest.fixture(scope="module")
def allocation(tiny_space):
    """All levels of the space, the embedding at 4 bits."""
    levels = tiny_space.levels[0]
    mixed = tuple(levels[i % len(levels)] for i in range(1, 1 + len(tiny_space.layers)))
    assert (tiny_space.layers[0].name, str(mixed[0])) == (EMBEDDING, "w4g64")
    return Allocation(mixed)


@pytest.fixture(scope="module")
def exported(tiny, tiny_space, tiny_database, allocation, tmp_path_factory):
    """A folder with the allocation's packed model. Read only."""
    out = tmp_path_factory.mktemp("native") / "new" / "out"
    save_native(tiny.model, tiny.tokenizer, tiny_space, allocation, tiny_database, out)
    return out


@pytest.fixture
def copied(exported, tmp_path):
    """A copy to damage."""
    return shutil.copytree(exported, tmp_path / "copy")


@torch.inference_mode()
def logits_of(model, tokens=TOKENS):
    return model(input_ids=tokens, use_cache=False).logits


def gap(found, expected):
    """Relative error of logits, Frobenius."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def run(code, *arguments):
    """Run Python code in a fresh process; the last line it printed, its exit code and stderr."""
    child = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    return (child.stdout.strip().splitlines() or [""])[-1], child.returncode, child.stderr


def test_a_fresh_process_computes_the_stitched_logits(exported, stitched, allocation, tmp_path):
    expected = logits_of(stitched.stitch(allocation))
    save_file({"expected": expected, "tokens": TOKENS}, tmp_path / "logits.safetensors")
    code = """if True:
        import sys
        import autocompress  # the first import: nothing else registers the quantizer
        from transformers import AutoModelForCausalLM
        import torch
        from safetensors.torch import load_file
        stored = load_file(sys.argv[2])
        exact, _ = autocompress.load(sys.argv[1], activations="float32")
        ours, _ = autocompress.load(sys.argv[1])
        theirs = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        with torch.inference_mode():
            logits = [model(input_ids=stored["tokens"]).logits for model in (exact, ours, theirs)]
        gaps = [float((it - stored["expected"]).abs().max()) for it in logits]
        largest = float(stored["expected"].abs().max())
        print(*[gap / largest for gap in gaps], torch.equal(*logits[1:]), logits[0].dtype)
    """
    line, status, errors = run(code, exported, tmp_path / "logits.safetensors")
    assert status == 0, errors
    exact, rounded, _, same, dtype = line.split()
    assert float(exact) < 1e-5
    assert float(rounded) < 0.05
    assert (same, dtype) == ("True", "torch.float32")


@pytest.mark.parametrize(
    "activations, least, most",
    [("int8", 1e-3, 3e-2), ("bfloat16", 1e-3, 1e-2), ("float32", 0, 1e-5)],
)
@needs_kernels
def test_activations_can_be_chosen(activations, least, most, exported, stitched, allocation):
    model = stitched.stitch(allocation)
    packed, _ = autocompress.load(exported, activations=activations)
    for tokens in (TOKENS, TOKENS[:1, :9]):  # few rows take other paths
        assert least <= gap(logits_of(packed, tokens), logits_of(model, tokens)) < most
    assert used_backends(packed) == {"native": BACKENDS["native"].version()}


def test_activations_are_part_of_the_folder(
    tiny, tiny_space, tiny_database, stitched, allocation, tmp_path
):
    arguments = tiny.model, tiny.tokenizer, tiny_space, allocation, tiny_database, tmp_path
    expected = logits_of(stitched.stitch(allocation))
    stitched.restore()
    save_native(*arguments, activations="float32")
    assert gap(logits_of(autocompress.load(tmp_path)[0]), expected) < 1e-5
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["activations"] == "float32"
    for name in ("int8", None):  # a folder that names none
        settings.update(activations=name)
        settings = {key: value for key, value in settings.items() if value is not None}
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = settings
        (tmp_path / "config.json").write_text(json.dumps(config))
        packed, _ = autocompress.load(tmp_path)
        assert {module.mode for module in packed_modules(packed)} == {"a8"}


def test_without_autocompress_nothing_loads(exported):
    code = """if True:
        import sys
        from transformers import AutoModelForCausalLM
        assert "autocompress" not in sys.modules
        try:
            model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        except Exception as error:
            print("refused", type(error).__name__)
        else:
            print("LOADED", type(model).__name__)
    """
    line, status, errors = run(code, exported)
    assert (line.split()[0], status) == ("refused", 0), errors


def test_bf16_is_equal_too(tiny_folder, tiny_space, tiny_database, allocation, tmp_path):
    loaded = load_model(str(tiny_folder), torch.bfloat16)
    model = loaded.model
    save_native(model, loaded.tokenizer, tiny_space, allocation, tiny_database, tmp_path)
    expected = logits_of(StitchedModel(model, tiny_space, tiny_database).stitch(allocation))
    packed, _ = autocompress.load(tmp_path, backend="dequantize")
    assert packed.dtype == torch.bfloat16
    assert torch.equal(logits_of(packed), expected)
    packed, _ = autocompress.load(tmp_path)  # weights are not rounded to bf16 on the way
    assert gap(logits_of(packed), expected) < 3e-2


def test_the_dtype_can_be_chosen(exported, stitched, allocation):
    packed, _ = autocompress.load(exported, torch.bfloat16)
    assert logits_of(packed).dtype == torch.bfloat16
    expected = logits_of(stitched.stitch(allocation))
    assert (logits_of(packed) - expected).abs().max() < 0.1 * expected.abs().max()


def test_weights_stay_packed_in_memory(exported, tiny_space, allocation):
    packed, _ = autocompress.load(exported)
    for layer, level in zip(tiny_space.layers, allocation.levels, strict=True):
        module = packed.get_submodule(layer.name)
        assert isinstance(module, PackedLinear | PackedEmbedding) == (level != Dense())
        if level != Dense():
            held = sum(t.numel() * t.element_size() for t in module.buffers()) * 8
            assert held == level.storage_bits(layer.shapes[0])
    assert isinstance(packed.lm_head, TiedHead)
    assert not packed.training
    logits_of(packed)
    for module in packed_modules(packed):
        assert not list(module.buffers()), "the backend holds the weight now"
        assert not any(t.is_inference() for t in module.op.tensors.values())
        padded = tuple(-(-size // 32) * 32 for size in module.shape)
        assert 8 * module.op.bytes <= 1.2 * module.level.storage_bits(padded)


@pytest.mark.parametrize("backend", [None, "dequantize"])
def test_a_prepared_model_still_gives_its_weights_exactly(backend, exported):
    fresh, _ = autocompress.load(exported)
    packed, _ = autocompress.load(exported, backend=backend)
    logits = logits_of(packed)
    before, after = fresh.state_dict(), packed.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for ours, theirs in zip(packed_modules(packed), packed_modules(fresh), strict=True):
        assert torch.equal(ours.weight, theirs.weight)
    fresh.load_state_dict(after)
    packed.load_state_dict(after)
    assert torch.equal(logits_of(packed), logits)


@needs_kernels
def test_prepared_weights_lie_in_one_block(exported):
    packed, _ = autocompress.load(exported)
    logits_of(packed)
    assert not packed._forward_pre_hooks, "the first forward has prepared everything"
    tensors = [t for module in packed_modules(packed) for t in module.op.tensors.values()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
    assert all(t.data_ptr() % 64 == 0 for t in tensors)
    assert prepare(packed) == used_backends(packed) == {"native": BACKENDS["native"].version()}
    again = [t for module in packed_modules(packed) for t in module.op.tensors.values()]
    assert [t.data_ptr() for t in again] == [t.data_ptr() for t in tensors], "once is enough"
    embedding = packed.model.embed_tokens
    assert (
        packed.lm_head.shared[0] is embedding and embedding.kernel_weight() is embedding.op.packed
    )


@needs_kernels
def test_choices_can_change_later(exported):
    packed, _ = autocompress.load(exported)
    first = logits_of(packed)
    assert prepare(packed, backend="dequantize").keys() == {"dequantize"}
    exact = logits_of(packed)
    assert packed.lm_head.shared[0].kernel_weight() is None
    assert prepare(packed, "float32", "native").keys() == {"native"}
    assert gap(logits_of(packed), exact) < 1e-5
    prepare(packed, "int8")
    assert torch.equal(logits_of(packed), first)


@needs_kernels
def test_a_prepared_model_compiles_whole(exported):
    packed, _ = autocompress.load(exported)
    block = packed.model.layers[1].mlp
    compiled = torch.compile(block, fullgraph=True)
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        with pytest.raises(Exception, match="prepared before it is compiled"):
            compiled(x)
        prepare(packed)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))


@needs_kernels
def test_layers_that_do_not_run_on_kernels_are_named(exported, monkeypatch):
    packed, _ = autocompress.load(exported)
    monkeypatch.setattr("autocompress.backends.native._missing", lambda: "no compiler was there")
    with pytest.warns(
        UserWarning, match="13 of 18 packed layers run on 'dequantize', not 'native': no"
    ):
        used = prepare(packed)
    assert set(used) <= {"aten", "dequantize"}
    assert packed.model.embed_tokens.backend == "aten", "its 4 bits in groups of 64 are ATen's, too"
    chosen, _ = autocompress.load(exported, backend="dequantize")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(chosen)
    assert gap(logits_of(packed), logits_of(chosen)) < 1e-2
    with pytest.raises(BackendError, match="native: no compiler was there"):
        autocompress.load(exported, backend="native")


def test_unknown_choices_are_refused(exported):
    with pytest.raises(BackendError, match=r"activations must be one of .* 'int4'.* mean 'int8'"):
        autocompress.load(exported, activations="int4")
    with pytest.raises(BackendError, match=r"one of native, aten, dense, dequantize\. Got 'natve'"):
        autocompress.load(exported, backend="natve")
    with pytest.raises(BackendError, match="dense: it runs dense layers only"):
        autocompress.load(exported, backend="dense")


def test_the_file_names_every_tensor_once(exported, tiny_space, tiny_database, allocation):
    stored = load_file(exported / WEIGHTS)
    names = {name for name in stored if not name.endswith((".codes", ".scales", ".zeros"))}
    dense = {
        f"{layer.name}.weight"
        for layer, level in zip(tiny_space.layers, allocation.levels, strict=True)
        if level == Dense()
    }
    norms = {name for name in names if "norm" in name}
    assert names == dense | norms
    assert all(stored[name].dtype == torch.bfloat16 for name in names)
    parts = tiny_database.load(EMBEDDING, parse_level("w4g64")).tensors
    for part, tensor in parts.items():
        assert torch.equal(stored[f"{EMBEDDING}.{part}"], tensor)


def test_a_packed_embedding_gathers_its_dense_rows():
    generator = torch.Generator().manual_seed(0)
    for key in ("w2g64", "w3g32", "w4", "w5g64sym", "w6g64", "w8g32", "w8sym"):
        for width in (64, 72, 30):  # 30: rows do not begin at a byte
            module = PackedEmbedding(parse_level(key), (50, width), torch.float32, 3.0)
            for name, buffer in module.named_buffers():
                shape = buffer.shape
                noise = torch.randint(256, shape, generator=generator)
                buffer.copy_(noise / 256 if name == "scales" else noise)
            tokens = torch.tensor([[0, 49, 7], [7, 1, 13]])
            assert torch.equal(module(tokens), 3 * module.dense_weight()[tokens]), (key, width)
            assert module(tokens[:, :0]).shape == (2, 0, width)


@pytest.mark.parametrize("key", ["w4g64", "w4g8"])
def test_a_module_alone_prepares_itself(key):
    module = PackedLinear(parse_level(key), (16, 64), torch.float32, None)
    module.scales.fill_(1)
    with torch.inference_mode():
        assert module(torch.ones(2, 64)).shape == (2, 16)
    assert not any(tensor.is_inference() for tensor in module.op.tensors.values())
    assert module.backend in repr(module)


def test_it_generates(exported):
    packed, tokenizer = autocompress.load(exported)
    prompt = tokenizer("The statement", return_tensors="pt")
    written = packed.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert written.shape == (1, prompt["input_ids"].shape[1] + 4)


# --- damage ----------------------------------------------------------------------------------

BYTES = {
    "one byte less": lambda data: data[:-1],
    "one byte more": lambda data: data + b"x",
    "half a header": lambda data: data[:50],
    "nothing": lambda data: b"",
}
TENSORS = {
    "no scales": lambda tensors: tensors.pop(f"{EMBEDDING}.scales"),
    "no norm": lambda tensors: tensors.pop("model.norm.weight"),
    "one more": lambda tensors: tensors.update(more=torch.zeros(1)),
    "fewer codes": lambda tensors: tensors.update({CODES: tensors[CODES][:-4].clone()}),
}
SETTINGS = {
    "another level": lambda settings: settings["levels"].update({EMBEDDING: "w3g64"}),
    "an unknown level": lambda settings: settings["levels"].update({EMBEDDING: "q4_0"}),
    "an unknown layer": lambda settings: settings["levels"].update({"model.nothing": "w3g64"}),
    "the next format": lambda settings: settings.update(format=2),
    "unknown activations": lambda settings: settings.update(activations="int4"),
}


def check_refused(folder, message="must be|must hold|format 2"):
    with pytest.raises(ModelError, match=message):
        autocompress.load(folder)


@pytest.mark.parametrize("damage", BYTES)
def test_a_file_of_another_length_is_refused(damage, copied):
    data = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(BYTES[damage](data))
    check_refused(copied, str(copied / WEIGHTS))


@pytest.mark.parametrize("damage", TENSORS)
def test_other_tensors_are_refused(damage, copied):
    tensors = load_file(copied / WEIGHTS)
    TENSORS[damage](tensors)
    save_file(tensors, copied / WEIGHTS, metadata={"format": "pt"})
    check_refused(copied)


@pytest.mark.parametrize("damage", SETTINGS)
def test_other_settings_are_refused(damage, copied):
    config = json.loads((copied / "config.json").read_text())
    SETTINGS[damage](config["quantization_config"])
    (copied / "config.json").write_text(json.dumps(config))
    check_refused(copied)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_missing_file_is_refused(name, copied):
    (copied / native.MANIFEST).write_text("{}")
    (copied / name).unlink()
    check_refused(copied)


def test_a_folder_of_something_else_is_refused(tiny_folder, tmp_path):
    for folder in (tiny_folder, tmp_path, tmp_path / "none"):
        with pytest.raises(ModelError, match=r"a result folder must hold autocompress\.json"):
            autocompress.load(folder)


# --- a full disk -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), SafetensorError("I/O error: No space left")]
)
def test_a_full_disk_leaves_nothing_that_looks_whole(
    error, tiny, tiny_space, tiny_database, allocation, tmp_path, monkeypatch
):
    def fail(tensors, draft, metadata):
        draft.write_bytes(b"half")
        raise error

    monkeypatch.setattr(native, "save_file", fail)
    with pytest.raises(OutputError, match="No space left"):
        save_native(
            tiny.model, tiny.tokenizer, tiny_space, allocation, tiny_database, tmp_path / "out"
        )
    assert list((tmp_path / "out").iterdir()) == []


FULL_DISK = """if True:
    import json, resource, signal, sys
    from pathlib import Path
    import torch
    from autocompress.core import Allocation, SearchSpace
    from autocompress.database import LevelDatabase
    from autocompress.errors import OutputError
    from autocompress.exporters.native import save_native
    from autocompress.levels import parse_level
    from autocompress.models import find_layers, load_model
    job = json.loads(sys.argv[1])
    loaded = load_model(job["model"], torch.float32)
    levels = tuple(map(parse_level, job["levels"]))
    layers = find_layers(loaded.model, ("blocks", "embedding", "head"))
    space = SearchSpace("test", layers, tuple((level,) for level in levels))
    database = LevelDatabase.open(Path(job["database"]), job["identity"])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number, most in enumerate(job["most"]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            arguments = loaded.model, loaded.tokenizer, space, Allocation(levels), database
            save_native(*arguments, Path(job["out"]) / str(number))
        except OutputError as error:
            print(error)
"""


def test_a_disk_that_is_really_full_leaves_nothing_that_looks_whole(
    exported, tiny_folder, tiny_database, allocation, tmp_path
):
    """The process may not write files of more bytes: one too few for the weights, then enough."""
    weights = (exported / WEIGHTS).stat().st_size
    job = {
        "model": str(tiny_folder),
        "levels": list(map(str, allocation.levels)),
        "database": str(tiny_database.path),
        "identity": tiny_database.identity,
        "out": str(tmp_path),
        "most": [weights - 1, weights],
    }
    _, status, errors = run(FULL_DISK, json.dumps(job))
    assert status == 0, errors
    assert list((tmp_path / "0").iterdir()) == []
    with pytest.raises(ModelError):
        autocompress.load(tmp_path / "0")
    autocompress.load(tmp_path / "1")
