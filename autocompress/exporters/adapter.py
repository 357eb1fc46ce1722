"""Low-rank compensation as a PEFT adapter on what the other parts store.

The base is a compressed-tensors folder where its levels allow it, else a dense one; the adapter is
in its folder `adapter`. Ranks by module are its `rank_pattern`; alpha equals the rank, so
that nothing is scaled. W + B A is what our packed form stands for, so B is its left factor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from autocompress.errors import SpaceError
from autocompress.exporters import dense, packed_integers
from autocompress.exporters.native import STORAGE
from autocompress.exporters.source import Source
from autocompress.files import write_atomically, write_json
from autocompress.folders import ADAPTER
from autocompress.levels import Joint, Level, LowRank
from autocompress.packed.low_rank import factors
from autocompress.runtimes import Runtime, find_runtime
from autocompress.runtimes.rules import check_levels


@dataclass(frozen=True)
class AdapterExporter:
    """Writes a base model and the adapter that compensates it."""

    reader: str = "peft"

    def write(self, source: Source, runtime: Runtime | None, out: Path) -> dict[str, Any]:
        added = {name: low_rank_of(source, name) for name in source.levels}
        ranked = {name: level for name, level in added.items() if level is not None}
        if not ranked:
            raise SpaceError(
                "an adapter must have low-rank parts to hold. Got a result without any. Search "
                "a space with levels such as r8+w4g64sym, or choose another format."
            )
        base = without_adapter(source)
        facts = _write_base(base, runtime, out)
        tensors, ranks = {}, {}
        for name, level in ranked.items():
            left, right = (
                _smallest(part)
                for part in factors(level, source.shape(name), source.packed(name).tensors)
            )
            their = source.their(name)
            tensors[f"base_model.model.{their}.lora_A.weight"] = right.contiguous()
            tensors[f"base_model.model.{their}.lora_B.weight"] = left.contiguous()
            ranks[their] = left.shape[1]
        _write_adapter(tensors, ranks, out)
        files = [*facts["files"], f"{ADAPTER}/adapter_model.safetensors"]
        size = sum(tensor.nbytes + 200 for tensor in tensors.values())
        return facts | {
            "files": files,
            "bytes": facts["bytes"] + size,
            "largest_rank": max(ranks.values()),
        }


EXPORTER = AdapterExporter()


def low_rank_of(source: Source, name: str) -> LowRank | None:
    """The low-rank part beside others of a module's level.

    Raises:
        SpaceError: the level is factors alone, which no adapter can hold.
    """
    level = source.level(name)
    if isinstance(level, LowRank):
        raise SpaceError(
            f"an adapter must compensate a weight. Got '{name}' at {level}, which is two factors "
            "and nothing else. Export it as dense or native."
        )
    if isinstance(level, Joint) and level.low_rank is not None:
        if source.parts.get(name) is not None:
            raise SpaceError(
                f"an adapter must be on linears of blocks. Got '{name}', the "
                f"{source.parts[name]}, at {level}. Export it as dense or native."
            )
        return level.low_rank
    return None


def without_adapter(source: Source) -> Source:
    """The source with every level but its low-rank part; its tensors are the same file's."""
    levels: dict[str, Level] = {
        name: level.base if isinstance(level, Joint) and level.low_rank else level
        for name, level in source.levels.items()
    }
    return replace(source, levels=levels)


def _write_base(base: Source, runtime: Runtime | None, out: Path) -> dict[str, Any]:
    """The base, in codes if the runtime takes its levels; one that is named must."""
    chosen = runtime or find_runtime(packed_integers.DEFAULT)
    levels = {name: base.level(name) for name in base.scope}
    try:
        check_levels(chosen, levels, {n: base.shape(n) for n in levels}, base.parts)
    except SpaceError:
        if runtime is not None:
            raise
        facts = dense.EXPORTER.write(base, None, out)
        return facts | {"base": "dense", "rounded": {"base": facts["rounded"]["*"]}}
    return packed_integers.EXPORTER.write(base, chosen, out) | {"base": "compressed-tensors"}


def _smallest(factor: Tensor) -> Tensor:
    """In bf16 where that holds it exactly."""
    small = factor.to(STORAGE)
    return small if torch.equal(small.float(), factor) else factor


def _write_adapter(tensors: dict[str, Tensor], ranks: dict[str, int], out: Path) -> None:
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {name: rank for name, rank in ranks.items() if rank != common}
    folder = out / ADAPTER
    folder.mkdir(exist_ok=True)

    def write(draft: Path) -> None:
        save_file(tensors, draft, metadata={"format": "pt"})

    write_atomically(folder / "adapter_model.safetensors", write)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "..",
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
    }
    write_json(folder / "adapter_config.json", config)
