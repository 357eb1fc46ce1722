"""compressed-tensors `pack-quantized`: the codes of a result, bit by bit, without its library.

A weight (out, in) of b-bit codes is `weight_packed`, int32 (out, ceil(in * b / 32)): every row is a
dense little-endian bit stream that begins at a word; `weight_scale` (out, groups); `weight_shape`,
int64. Its signed codes are stored plus 2^(b-1), which are our unsigned ones. 2, 4 and
8 bits are the same in every version; the others are read since compressed-tensors 0.18.

W8A8 is `int-quantized`: `weight` in int8, one scale per row, activations rounded while running.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autocompress.exporters.native import STORAGE
from autocompress.exporters.shards import Piece, write_weights
from autocompress.exporters.source import Source
from autocompress.exporters.writing import write_companions
from autocompress.levels import Level, Quantize
from autocompress.models import is_linear
from autocompress.packed import Packed
from autocompress.packed.bits import pack
from autocompress.packed.quantized import stored_codes
from autocompress.runtimes import Runtime, find_runtime
from autocompress.runtimes.rules import check_levels

DEFAULT = "ct-transformers"
PACKED, INT8 = "pack-quantized", "int-quantized"
WORD = 32  # bits


@dataclass(frozen=True)
class CompressedTensorsExporter:
    """Writes a folder that transformers, vLLM and SGLang read."""

    reader: str = "transformers"

    def write(self, source: Source, runtime: Runtime | None, out: Path) -> dict[str, Any]:
        chosen = runtime or find_runtime(DEFAULT)
        levels = {name: source.level(name) for name in source.scope}
        check_levels(chosen, levels, {n: source.shape(n) for n in levels}, source.parts)
        exact = all(_exact(source.packed(name)) for name in source.levels)
        scales = STORAGE if exact else torch.float16
        int8 = bool(getattr(chosen, "int8_activations", False))
        files = write_weights(out, [*_pieces(source, levels, scales, int8), *_plain(source)])
        config = source.config | {
            # Scales that bf16 cannot hold are exact in float32 only: let loaders begin there.
            "dtype": str(STORAGE if exact else torch.float32).removeprefix("torch."),
            "quantization_config": _quantization(source, levels, int8),
        }
        write_companions(source, config, out)
        return {"files": files, "runtime": chosen.name, "bytes": _promised(source, levels, chosen)}


EXPORTER = CompressedTensorsExporter()


def _exact(packed: Packed) -> bool:
    """Whether bf16 holds every scale."""
    scales = packed.tensors["scales"].float()
    return torch.equal(scales, scales.to(STORAGE).float())


def _pieces(
    source: Source, levels: dict[str, Level], scales: torch.dtype, int8: bool
) -> Iterable[Piece]:
    """The quantized weights."""
    for name, level in levels.items():
        if isinstance(level, Quantize):
            size = level.storage_bits(source.shape(name)) // 8
            yield Piece(size, partial(_tensors, source, name, level, scales, int8))


def _tensors(
    source: Source, name: str, level: Quantize, dtype: torch.dtype, int8: bool
) -> dict[str, Tensor]:
    """One module's tensors under the names that others look for."""
    packed, their = source.packed(name), source.their(name)
    scales = packed.tensors["scales"].to(dtype)
    if as_int8(level, int8):
        codes = stored_codes(level, packed.shape, packed.tensors)
        weight = (codes.to(torch.int16) - 128).to(torch.int8)
        return {f"{their}.weight": weight, f"{their}.weight_scale": scales}
    return {
        f"{their}.weight_packed": packed_rows(level, packed),
        f"{their}.weight_scale": scales,
        f"{their}.weight_shape": torch.tensor(packed.shape, dtype=torch.int64),
    }


def as_int8(level: Level, int8: bool) -> bool:
    """Whether a level runs with activations in int8."""
    return int8 and isinstance(level, Quantize) and level.bits == 8


def packed_rows(level: Quantize, packed: Packed) -> Tensor:  # (out, words), int32
    """The codes of every row as a bit stream that begins at a word."""
    rows, width = packed.shape
    if width * level.bits % WORD == 0:  # our stream has no gaps between rows either
        used = rows * width * level.bits // 8
        stream: Tensor = packed.tensors["codes"][:used]
        return stream.clone().view(torch.int32).view(rows, -1)
    codes = stored_codes(level, packed.shape, packed.tensors)
    padded = torch.nn.functional.pad(codes, (0, -width % WORD))
    words = pack(padded, level.bits).view(torch.int32).view(rows, -1)
    return words[:, : -(-width * level.bits // WORD)]


def _plain(source: Source) -> Iterable[Piece]:
    """Everything that is not packed, under the names that others look for."""
    for name in source.plain():
        tensor = source.tensor(name)
        yield Piece(tensor.nbytes, partial(_one, source, name))


def _one(source: Source, name: str) -> dict[str, Tensor]:
    return {source.their(name): source.tensor(name)}


def _quantization(source: Source, levels: dict[str, Level], int8: bool) -> dict[str, Any]:
    """`quantization_config`: a group of exact module names for each level."""
    groups: dict[str, Any] = {}
    for name, level in levels.items():
        if isinstance(level, Quantize):
            group = groups.setdefault(str(level), _group(level, int8))
            group["targets"].append(source.their(name))
    formats = {group["format"] for group in groups.values()} or {PACKED}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": _ignored(source, levels),
        "config_groups": groups,
    }


def _group(level: Quantize, int8: bool) -> dict[str, Any]:
    activations = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    return {
        "targets": [],
        "format": INT8 if as_int8(level, int8) else PACKED,
        "weights": {
            "num_bits": level.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if level.group_size is None else "group",
            "group_size": level.group_size,
            "dynamic": False,
        },
        "input_activations": activations if as_int8(level, int8) else None,
        "output_activations": None,
    }


def _ignored(source: Source, levels: dict[str, Level]) -> list[str]:
    """Linear modules that stay dense; routers of mixtures of experts among them."""
    linears = [
        name
        for name, module in source.model.named_modules()
        if is_linear(module) or name.endswith((".gate", ".router"))
    ]
    return [source.their(n) for n in linears if not isinstance(levels.get(n), Quantize)]


def _promised(source: Source, levels: dict[str, Level], runtime: Runtime) -> int:
    """What the weights take at most, by the cost table of a search for this runtime."""
    layers = sum(
        level.storage_bits(source.shape(name)) // 8
        + runtime.extra_bytes(source.their(name), level, source.shape(name))
        for name, level in levels.items()
    )
    inside = {f"{name}.weight" for name in levels}
    outside = [name for name in source.plain() if name not in inside]
    return layers + sum(
        source.tensor(name).nbytes + 120 + len(source.their(name)) for name in outside
    )
