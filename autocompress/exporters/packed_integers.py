"""compressed-tensors `pack-quantized`: the codes of a result, bit by bit, without its library.

A weight (out, in) of b-bit codes is `weight_packed`, int32 (out, ceil(in * b / 32)): every row is a
dense little-endian bit stream that begins at a word; `weight_scale` (out, groups); `weight_shape`,
int64. Its signed codes are stored plus 2^(b-1), which are our unsigned ones. 2, 4 and
8 bits are the same in every version; the others are read since compressed-tensors 0.18.

W8A8 is `int-quantized`: `weight` in int8, one scale per row, activations rounded while running.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autocompress.experts import UnfusedExperts
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
from autocompress.runtimes.rules import check_levels, part_of

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
        facts: dict[str, Any] = {"files": files, "runtime": chosen.name}
        eight = [name for name, level in levels.items() if as_int8(level, int8)]
        if eight:
            facts["int8_activations"] = eight
        facts["rounded"] = {"experts": config["dtype"]}
        return facts | {"bytes": _promised(source, levels, chosen, exact)}


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
    if part_of(name, source.parts) == "experts" and dtype != STORAGE:
        dtype = torch.float32  # transformers computes with experts in the type of their scales
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
    dense = [
        name
        for name, module in source.model.named_modules()
        if isinstance(module, UnfusedExperts) and f"{name}.unfused.0.up_proj" not in source.levels
    ]
    for name in source.plain():
        if not name.startswith(tuple(f"{experts}." for experts in dense)):
            yield Piece(source.tensor(name).nbytes, partial(_one, source, name))
    for name in dense:  # fused: one by one, transformers would look for their codes
        gate = source.tensor(f"{name}.unfused.0.gate_proj.weight")
        count = len(source.model.get_submodule(name).unfused)
        yield Piece(3 * count * gate.nbytes, partial(_fused, source, name, count))


def _one(source: Source, name: str) -> dict[str, Tensor]:
    return {source.their(name): source.tensor(name)}


def _fused(source: Source, name: str, count: int) -> dict[str, Tensor]:
    """Dense experts in transformers' own form."""

    def stacked(*kinds: str) -> Tensor:
        each = [[f"{name}.unfused.{i}.{kind}.weight" for kind in kinds] for i in range(count)]
        return torch.stack([torch.cat([source.tensor(it) for it in row]) for row in each])

    return {
        f"{name}.gate_up_proj": stacked("gate_proj", "up_proj"),
        f"{name}.down_proj": stacked("down_proj"),
    }


def _quantization(source: Source, levels: dict[str, Level], int8: bool) -> dict[str, Any]:
    """`quantization_config`: a group of exact module names for each level."""
    groups: dict[str, Any] = {}
    for name, level in levels.items():
        if isinstance(level, Quantize):
            group = groups.setdefault(str(level), _group(level, int8))
            target = _target(source.their(name))
            if target not in group["targets"]:
                group["targets"].append(target)
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


def _target(name: str) -> str:
    """An exact name; experts by the patterns that vLLM and transformers look for."""
    return re.sub(r".*?(\w+)\.experts\.\d+\.(\w+)", r"re:.*\1.experts.*.\2", name)


def _group(level: Quantize, int8: bool) -> dict[str, Any]:
    found = scheme(level) | {"targets": [], "format": PACKED}
    if as_int8(level, int8):
        activations = {"strategy": "token", "dynamic": True}
        eight = {"num_bits": 8, "type": "int", "symmetric": True}
        found |= {"format": INT8, "input_activations": eight | activations}
    return found


def scheme(level: Quantize) -> dict[str, Any]:
    """How compressed-tensors writes a level down."""
    return {
        "weights": {
            "num_bits": level.bits,
            "type": "int",
            "symmetric": level.symmetric,
            "strategy": "channel" if level.group_size is None else "group",
            "group_size": level.group_size,
            "dynamic": False,
        },
        "input_activations": None,
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


def _promised(source: Source, levels: dict[str, Level], runtime: Runtime, exact: bool) -> int:
    """What the weights take at most, by the cost table of a search for this runtime."""
    layers = sum(
        level.storage_bits(source.shape(name)) // 8
        + runtime.extra_bytes(source.their(name), level, source.shape(name))
        for name, level in levels.items()
    )
    inside = {f"{name}.weight" for name in levels}
    outside = [name for name in source.plain() if name not in inside]
    wide = () if exact else [n for n in source.levels if part_of(n, source.parts) == "experts"]
    return (
        layers
        + sum(source.tensor(n).nbytes + 120 + len(source.their(n)) for n in outside)
        + sum(source.packed(n).tensors["scales"].nbytes for n in wide)
    )
