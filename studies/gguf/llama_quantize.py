"""llama.cpp's own quantizer beside ours: the types of its mixes, the bytes of its encoder.

    pip install --target site llama-cpp-python==0.3.36          # builds llama.cpp, 8 CPU minutes
    PYTHONPATH=site python studies/gguf/llama_quantize.py MODEL WORK

MODEL is a folder. llama.cpp's converter writes it in float32, `llama_model_quantize` quantizes that
file by every mix of `gguf_mixes.py` and by every type alone ("pure"), all with one importance
matrix of random numbers. Every tensor's type is compared with `stored_type`, its bytes with what
our encoder makes of the same rows.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, LlamaFileType

from autocompress.exporters import gguf_driver
from autocompress.exporters.gguf_base import converter_folder
from autocompress.gguf_mixes import BASE, NAMES, stored_type
from autocompress.levels import parse_level
from autocompress.levels.gguf import BLOCKS
from autocompress.operators.gguf import encode

THEIRS = {  # kind -> name in a GGUF file of the Llama family
    "embedding": "token_embd",
    "q": "blk.{}.attn_q",
    "k": "blk.{}.attn_k",
    "v": "blk.{}.attn_v",
    "output": "blk.{}.attn_output",
    "gate": "blk.{}.ffn_gate",
    "up": "blk.{}.ffn_up",
    "down": "blk.{}.ffn_down",
}


def convert(model: Path, out: Path) -> None:
    """Write the model as a GGUF file in float32."""
    driver = [sys.executable, "-P", gguf_driver.__file__, str(converter_folder())]
    subprocess.run([*driver, str(model), str(out)], check=True, capture_output=True)


def weights(path: Path) -> dict[str, Any]:
    """Every tensor with two dimensions of a GGUF file, by name."""
    return {it.name: it for it in GGUFReader(path).tensors if len(it.shape) == 2}


def importance(base: dict[str, Any]) -> dict[str, np.ndarray]:
    """A positive number for every input of every weight."""
    rng = np.random.default_rng(0)
    return {
        name: rng.lognormal(size=int(tensor.shape[0])).astype(np.float32)
        for name, tensor in base.items()
    }


def quantize(
    base: Path, out: Path, kind: LlamaFileType, matrix: dict[str, np.ndarray], pure: bool
) -> None:
    """llama.cpp's quantizer, one thread."""
    import llama_cpp

    rows = [*matrix.items(), (None, np.zeros(0, np.float32))]  # ends at a name of null
    entries = (llama_cpp.llama_model_imatrix_data * len(rows))()
    for entry, (name, values) in zip(entries, rows, strict=True):
        entry.name = None if name is None else name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = len(values)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread, settings.ftype, settings.pure = 1, int(kind), pure
    settings.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    code = llama_cpp.llama_model_quantize(str(base).encode(), str(out).encode(), settings)
    if code:
        raise RuntimeError(f"llama_model_quantize returned {code} for {kind.name}")


def expected_types(mix: str, config: dict[str, Any]) -> dict[str, str]:
    """The type of every tensor by `gguf_mixes.py`."""
    blocks = config["num_hidden_layers"]
    queries = config["num_attention_heads"] // config["num_key_value_heads"]
    wide = {"down": config["intermediate_size"]}
    wide["output"] = config["num_attention_heads"] * config.get(
        "head_dim", config["hidden_size"] // config["num_attention_heads"]
    )
    found = {}
    for last, kind in NAMES.items():
        for block in range(1 if kind == "embedding" else blocks):
            module = last if kind == "embedding" else f"model.layers.{block}.x.{last}"
            width = wide.get(kind, config["hidden_size"])
            chosen = stored_type(mix, module, width, blocks, queries)
            found[f"{THEIRS[kind].format(block)}.weight"] = chosen
    return found


def differing_bytes(
    base: dict[str, Any], made: dict[str, Any], matrix: dict[str, np.ndarray]
) -> Iterator[tuple[str, str, bool]]:
    """Name, type and whether the bytes differ, of every quantized tensor."""
    for name, tensor in made.items():
        kind = tensor.tensor_type.name
        if kind in BLOCKS:
            rows = torch.from_numpy(np.array(base[name].data))
            level: Any = parse_level(kind)
            ours = encode(rows, level, torch.from_numpy(matrix[name]))
            yield name, kind, not np.array_equal(ours, np.asarray(tensor.data))


def main() -> None:
    """Convert, quantize, compare, count."""
    parser = argparse.ArgumentParser(description="llama.cpp's own quantizer beside ours.")
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--mixes", nargs="*", default=tuple(BASE))
    parser.add_argument("--types", nargs="*", default=tuple(BLOCKS), help="each alone")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    base_path, path = given.work / "base.gguf", given.work / "quantized.gguf"
    convert(given.model, base_path)
    base = weights(base_path)
    matrix = importance(base)
    config = json.loads((given.model / "config.json").read_text())
    for mix in given.mixes:
        quantize(base_path, path, LlamaFileType[f"MOSTLY_{mix}"], matrix, pure=False)
        made, expected = weights(path), expected_types(mix, config)
        types = {name: tensor.tensor_type.name for name, tensor in made.items()}
        other = [
            (name, expected.get(name), it) for name, it in types.items() if it != expected[name]
        ]
        rows = list(differing_bytes(base, made, matrix))
        print(json.dumps({"mix": mix, "other_types": other} | counted(rows)), flush=True)
    for kind in given.types:
        if f"MOSTLY_{kind}" in LlamaFileType.__members__:
            quantize(base_path, path, LlamaFileType[f"MOSTLY_{kind}"], matrix, pure=True)
            rows = list(differing_bytes(base, weights(path), matrix))
            print(json.dumps({"type": kind} | counted(rows)), flush=True)


def counted(rows: list[tuple[str, str, bool]]) -> dict[str, Any]:
    """How many tensors were compared, and which have other bytes."""
    return {"tensors": len(rows), "other_bytes": [it[:2] for it in rows if it[2]]}


if __name__ == "__main__":
    main()
