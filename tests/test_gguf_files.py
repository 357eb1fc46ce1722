"""Anyone's GGUF files: what they hold, and what is wrong with those that are no models."""

from __future__ import annotations

import re

import numpy as np
import pytest
from runs import command

from autocompress.errors import ModelError
from autocompress.gguf_files import check_loadable, describe_gguf


def write_file(path, arch="llama", tensors=True):
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(path, arch)
    writer.add_name("a stranger's model")
    writer.add_token_list(["a", "b", "c"])
    if tensors:
        weight = np.linspace(-1, 1, 8 * 64, dtype=np.float32).reshape(8, 64)
        kind = GGMLQuantizationType.Q8_0
        writer.add_tensor("blk.0.ffn_down.weight", quantize(weight, kind), raw_dtype=kind)
        writer.add_tensor("output_norm.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def stranger(tmp_path):
    return write_file(tmp_path / "stranger.gguf")


def test_tensors_are_described(stranger):
    facts = describe_gguf(stranger)
    assert facts["architecture"] == "llama"
    assert facts["file_bytes"] == stranger.stat().st_size
    assert facts["tensors"][0] == {
        "name": "blk.0.ffn_down.weight",
        "type": "Q8_0",
        "shape": [8, 64],
        "weights": 512,
        "bits": 8.5,
        "bytes": 544,
    }
    assert facts["types"]["F32"] == {"weights": 64, "bytes": 256}
    assert facts["bits_per_weight"] == pytest.approx(8 * 800 / 576)
    assert facts["metadata"]["tokenizer.ggml.tokens"] == "3 values"


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_inspect_shows_them(stranger, as_folder):
    path = stranger.parent if as_folder else stranger
    shown = command("inspect", path)
    assert shown.code == 0, shown.err
    assert re.search(r"blk\.0\.ffn_down\.weight +│ Q8_0 +│ +8 x 64 │ +8\.5 │ +544", shown.out)
    assert "576 weights, 11.1111 bits per weight" in shown.out
    assert command("inspect", path, "--json").json()["types"]["Q8_0"]["bytes"] == 544


def damaged_magic(path):
    path.write_bytes(b"GGML" + path.read_bytes()[4:])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:60])


def cut_in_the_tensors(path):
    path.write_bytes(path.read_bytes()[:-200])


def many_tensors(path):
    data = bytearray(path.read_bytes())
    data[8:16] = (1 << 62).to_bytes(8, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_magic, "must start with 'GGUF'"),
        (cut_in_the_header, "must hold all that its header describes.*truncated"),
        (cut_in_the_tensors, "must hold all that its header describes.*truncated"),
        (many_tensors, "must hold all that its header describes"),
    ],
)
def test_damaged_files_are_refused(stranger, damage, message):
    damage(stranger)
    with pytest.raises(ModelError, match=message):
        describe_gguf(stranger)
    ran = command("inspect", stranger)
    assert ran.code == 2
    assert ran.err.startswith("error: a")
    assert len(ran.err.splitlines()) == 1


def test_a_file_without_tensors_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="must hold tensors"):
        describe_gguf(write_file(tmp_path / "empty.gguf", tensors=False))


def test_an_unknown_architecture_names_those_that_are_known(tmp_path):
    with pytest.raises(ModelError, match=r"decodes: .*llama.*qwen2.*Got 'nonsense'"):
        check_loadable(write_file(tmp_path / "odd.gguf", arch="nonsense"))


def test_a_known_architecture_passes(stranger):
    check_loadable(stranger)
