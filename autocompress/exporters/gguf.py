"""GGUF: the blocks of a result, byte by byte, in a file that llama.cpp and transformers read."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autocompress.errors import SpaceError
from autocompress.exporters.gguf_base import (
    Array,
    Rows,
    check_architecture,
    read_tensors,
    rows_of,
    write_base,
)
from autocompress.exporters.source import Source
from autocompress.files import disk_errors
from autocompress.levels import GgufType, Level
from autocompress.runtimes import Runtime, find_runtime
from autocompress.runtimes.rules import check_levels

FILE = "model.gguf"
QUANTIZATION_VERSION = 2  # of ggml: files with quantized tensors must name it
# `general.file_type` is what tools show: the nearest of llama.cpp's mixes by the commonest type.
FILE_TYPES = {
    "Q4_0": "Q4_0",
    "Q4_1": "Q4_1",
    "Q5_0": "Q5_0",
    "Q5_1": "Q5_1",
    "Q8_0": "Q8_0",
    "Q2_K": "Q2_K",
    "Q3_K": "Q3_K_M",
    "Q4_K": "Q4_K_M",
    "Q5_K": "Q5_K_M",
    "dense": "BF16",
}


@dataclass(frozen=True)
class GgufExporter:
    """Writes one file, with a type for every tensor."""

    reader: str = "gguf"

    def write(self, source: Source, runtime: Runtime | None, out: Path) -> dict[str, Any]:
        chosen = runtime or find_runtime("gguf")
        levels = {name: source.level(name) for name in source.scope}
        check_levels(chosen, levels, {n: source.shape(n) for n in levels}, source.parts)
        check_architecture(source)
        with tempfile.TemporaryDirectory(dir=out, prefix=".gguf-") as folder:
            base = write_base(source, source.scope, Path(folder))
            promised = write_file(source, base, out / FILE)
        return {"files": [FILE], "runtime": chosen.name, "bytes": promised}


EXPORTER = GgufExporter()


def write_file(source: Source, base: Path, path: Path) -> int:
    """Write the file; returns its bytes at most: tensors with their alignment, and the frame.

    Raises:
        SpaceError: modules that the file holds as one tensor are at several levels.
        OutputError: the disk refused.
    """
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(base)
    arch = reader.fields["general.architecture"].contents()
    draft = path.with_name(f".{path.name}")
    writer = GGUFWriter(draft, arch)
    _copy_metadata(reader, writer, source)
    widths = [source.shape(name)[1] for name in source.scope]
    arrays = dict(read_tensors(reader))
    plans = {name: rows_of(array, widths) for name, array in arrays.items()}
    total = base.stat().st_size - sum(array.nbytes for array in arrays.values())
    with disk_errors(path.parent):
        for name, array in arrays.items():
            data, kind = _tensor(source, array, plans[name])
            writer.add_tensor_info(name, _shape(array, data), data.dtype, data.nbytes, kind)
            total += data.nbytes + writer.data_alignment
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, array in arrays.items():
            writer.write_tensor_data(_tensor(source, array, plans[name])[0])
        writer.close()
        draft.replace(path)
    return total


def _shape(array: Array, data: Array) -> tuple[int, ...]:
    """What a tensor's description is made from: of bytes where there are blocks."""
    return (*array.shape[:-1], data.shape[-1]) if data.dtype == np.uint8 else array.shape


def _tensor(source: Source, array: Array, plan: Rows | None) -> tuple[Array, Any]:
    """A tensor's data as it is stored, and its type."""
    from gguf import GGMLQuantizationType

    if plan is None:
        exact = array.ndim > 1 and np.array_equal(array, _rounded(array))
        if exact:  # as dense weights ship; norms and biases stay in float32, as llama.cpp has them
            return _bfloat16(array), GGMLQuantizationType.BF16
        return np.ascontiguousarray(array, dtype=np.float32), GGMLQuantizationType.F32
    level = _level(source, plan)
    rows = _gather(source, plan, level)
    data = rows.reshape(*array.shape[:-1], rows.shape[-1])
    if isinstance(level, GgufType):
        return data, GGMLQuantizationType[level.name]
    return data, GGMLQuantizationType.BF16


def _level(source: Source, plan: Rows) -> Level:
    """The one level of the modules that a tensor holds.

    Raises:
        SpaceError: they have several.
    """
    names = [source.scope[module] for module in np.unique(plan.modules)]
    first = source.level(names[0])
    for name in names:
        if source.level(name) != first:
            raise SpaceError(
                f"'{names[0]}' and '{name}' must share one level for gguf, which stores them as "
                f"one tensor. Got {first} and {source.level(name)}. Tie them in the search space."
            )
    return first


def _gather(source: Source, plan: Rows, level: Level) -> Array:  # (rows, bytes of a row), uint8
    """The rows of a tensor, from the modules they belong to."""
    parts: dict[int, Array] = {}
    for module in np.unique(plan.modules):
        name = source.scope[module]
        if isinstance(level, GgufType):
            parts[module] = source.packed(name).tensors["blocks"].numpy()
        else:
            parts[module] = _bfloat16(source.weight(name).numpy())
    width = next(iter(parts.values())).shape[1]
    gathered = np.empty((len(plan.rows), width), dtype=np.uint8)
    for module, rows in parts.items():
        here = plan.modules == module
        gathered[here] = rows[plan.rows[here]]
    return gathered


def _rounded(array: Array) -> Array:
    return torch.from_numpy(np.array(array)).bfloat16().float().numpy()


def _bfloat16(array: Array) -> Array:  # (..., 2 * in), uint8
    """bf16 as bytes."""
    values = torch.from_numpy(np.array(array)).bfloat16().contiguous()
    return values.view(torch.uint8).numpy().reshape(*array.shape[:-1], 2 * array.shape[-1])


def _copy_metadata(reader: Any, writer: Any, source: Source) -> None:
    """Everything the converter wrote, but for what says how tensors are stored."""
    from gguf import GGUFValueType, LlamaFileType

    own = ("general.architecture", "general.file_type", "general.quantization_version")
    for field in reader.fields.values():
        if field.name in own or field.name.startswith("GGUF."):
            continue
        kind, *inner = field.types
        if kind == GGUFValueType.ARRAY:
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner[-1])
        else:
            writer.add_key_value(field.name, field.contents(), kind)
    commonest = Counter(str(source.level(name)) for name in source.scope).most_common(1)[0][0]
    kind = FILE_TYPES.get(commonest, commonest)
    known = f"MOSTLY_{kind}" in LlamaFileType.__members__
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"] if known else LlamaFileType.GUESSED)
    writer.add_quantization_version(QUANTIZATION_VERSION)
