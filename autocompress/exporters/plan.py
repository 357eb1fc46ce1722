"""A result as recipes: our plan, a tensor-type file of llama.cpp, a recipe of llm-compressor."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from autocompress.errors import ModelError, OutputError
from autocompress.exporters.packed_integers import scheme
from autocompress.exporters.source import Source
from autocompress.files import write_atomically, write_json
from autocompress.levels import Dense, Drop, GgufType, Level, Quantize, Shape, parse_level
from autocompress.plans import PLAN, BuildPlan
from autocompress.runtimes import Runtime

# Bits -> type of llama.cpp, with blocks of 256 inputs and of 32.
NEAREST = {
    2: ("q2_k", "q4_0"),
    3: ("q3_k", "q4_0"),
    4: ("q4_k", "q4_0"),
    5: ("q5_k", "q5_0"),
    6: ("q6_k", "q8_0"),
    8: ("q8_0", "q8_0"),
}
TYPES, RECIPE = "tensor-types.txt", "recipe.yaml"


@dataclass(frozen=True)
class PlanExporter:
    """Writes no model: what others need to make one like it, and what we need to make it again."""

    reader: None = None

    def write(self, source: Source, runtime: Runtime | None, out: Path) -> dict[str, Any]:
        if runtime is not None:
            raise OutputError(f"a plan must name no runtime. Got {runtime.name}. Leave it out.")
        write_json(out / PLAN, make_plan(source).json())
        files, left_out = [PLAN], {}
        for name, make in ((TYPES, tensor_types), (RECIPE, recipe)):
            text = make(source)
            if text.startswith("#!"):
                left_out[name] = text.removeprefix("#!")
            else:
                _write(out / name, text)
                files.append(name)
        size = sum((out / name).stat().st_size for name in files)
        return {"files": files, "bytes": size, "left_out": left_out}


EXPORTER = PlanExporter()


def make_plan(source: Source) -> BuildPlan:
    """The plan that builds a result again.

    Raises:
        ModelError: the result was written before plans were.
    """
    manifest = source.manifest
    try:
        settings, scope = dict(manifest["settings"]), tuple(manifest["space"]["scope"])
        rows = manifest["allocation"]
        levels = {row["layer"]: parse_level(row["level"]) for row in rows}
        prefixes = {row["layer"]: parse_level(row["prefix"]) for row in rows}
    except KeyError as error:
        raise ModelError(
            f"a result must say how it was built. Got '{source.folder}' without {error}, of "
            "an older autocompress. Search again; its run folder spares the work."
        ) from error
    single = {m: levels[row["layer"]] for row in rows for m in row["modules"]}
    before = {m: prefixes[row["layer"]] for row in rows for m in row["modules"]}
    return BuildPlan(
        manifest["model"]["fingerprint"], settings, scope, _short(single), _short(before)
    )


def _short(levels: Mapping[str, Level]) -> tuple[tuple[str, Level], ...]:
    """One pattern where all agree."""
    if len(set(levels.values())) == 1:
        return (("*", next(iter(levels.values()))),)
    return tuple(levels.items())


def tensor_types(source: Source) -> str:
    """Lines `pattern=type` for `llama-quantize --tensor-type-file`, or '#!' and why there are none.

    Types are llama.cpp's nearest in bits: it rounds anew, so its model is not ours.
    """
    import gguf

    kind = source.config["model_type"]
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if kind not in known:
        return f"#!llama.cpp names the tensors of its own architectures only, not of {kind}"
    if any(isinstance(level, Drop) for level in source.levels.values()):
        return "#!llama.cpp quantizes every tensor and drops none"
    names = gguf.get_tensor_name_map(known[kind], source.config["num_hidden_layers"])
    lines = []
    for module in source.scope:
        their = names.get_name(source.their(module))
        if their is not None:
            pattern = re.escape(f"{their}.weight")  # it is searched for, so q is not q_norm
            lines.append(f"{pattern}={nearest_type(source.level(module), source.shape(module))}")
    return "\n".join([*lines, ""])


def nearest_type(level: Level, shape: Shape) -> str:
    """The type of llama.cpp that is nearest to a level in bits."""
    match level:
        case GgufType():
            return level.name.lower()
        case Dense():
            return "bf16"
        case Quantize():
            bits = level.bits
        case _:
            stored = level.storage_bits(shape) / (shape[0] * shape[1])
            bits = min(NEAREST, key=lambda known: abs(known + 0.5 - stored))
    return NEAREST[bits][0 if shape[1] % 256 == 0 else 1]


def recipe(source: Source) -> str:
    """A GPTQ recipe of llm-compressor with a group per level, or '#!' and why there is none."""
    groups: dict[str, Any] = {}
    for name in source.scope:
        level = source.level(name)
        if isinstance(level, Quantize):
            group = groups.setdefault(f"group_{level}", scheme(level) | {"targets": []})
            group["targets"].append(source.their(name))
        elif not isinstance(level, Dense):
            return f"#!llm-compressor has no {level}"
    if not groups:
        return "#!there is nothing to quantize"
    modifier = {"ignore": ["lm_head"], "config_groups": groups}
    stage = {"quantization_stage": {"quantization_modifiers": {"GPTQModifier": modifier}}}
    text: str = yaml.safe_dump(json.loads(json.dumps(stage)), sort_keys=False)
    return text


def _write(path: Path, text: str) -> None:
    def write(draft: Path) -> None:
        draft.write_text(text)

    write_atomically(path, write)
