"""A runtime's rules as a legal search space, and as a check of a finished allocation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from autocompress.core import Allocation, Layer, SearchSpace
from autocompress.errors import SpaceError
from autocompress.levels import Level, Shape
from autocompress.runtimes import Runtime
from autocompress.spaces import Pin, SpaceConfig, build_space

_EXPERT = re.compile(r".*\.experts\.(?:unfused\.)?\d+\.\w+")


def part_of(name: str, parts: Mapping[str, str]) -> str:
    """Where a module stands: what `parts` says, or by its name an expert's linear or a block's."""
    return parts.get(name) or ("experts" if _EXPERT.fullmatch(name) else "blocks")


def runtime_space(runtime: Runtime) -> SpaceConfig:
    """The space of a search that names none."""
    return SpaceConfig(runtime.name, runtime.levels, runtime.scope, description=runtime.summary)


def legal_space(
    runtime: Runtime,
    config: SpaceConfig,
    layers: Sequence[Layer],
    parts: Mapping[str, str],
    pins: Sequence[Pin] = (),
) -> tuple[SearchSpace, list[str]]:
    """The part of a space that a runtime can load, and what was left out, for people.

    Args:
        config: what the user wants; the runtime's ties are added to its own.
        layers: one module each, in forward order.
        parts: module -> its part of the model, for those that are no linears of blocks.
        pins: that win over those of `config`.

    Raises:
        SpaceError: a layer is left with no level, or a pin names one that it cannot take.
    """
    tie = config.tie
    if not isinstance(tie, str):  # whole sublayers hold what runtimes fuse
        fused = {name for group in runtime.tie for name in group}
        tie = runtime.tie + tuple(group for group in tie if fused.isdisjoint(group))
    together = expert_group if runtime.ties_experts else None
    wanted = build_space(replace(config, tie=tie), layers, pins, together, shapes=False)
    allowed, reasons = [], Counter[tuple[str, str]]()
    for layer, levels in zip(wanted.layers, wanted.levels, strict=True):
        why = {level: _refusal(runtime, level, layer, parts) for level in levels}
        if all(why.values()):
            raise _illegal(runtime, layer, *next(iter(why.items())))
        allowed.append(tuple(level for level in levels if why[level] is None))
        reasons.update((str(level), reason) for level, reason in why.items() if reason)
    notes = [
        f"{level} is left out of {count} of {len(allowed)} layers for {runtime.name}: {reason}"
        for (level, reason), count in reasons.items()
    ]
    return SearchSpace(wanted.name, wanted.layers, tuple(allowed)), notes


def expert_group(name: str) -> str | None:
    """The layer of all experts, if a module is part of one."""
    return "experts" if _EXPERT.fullmatch(name) else None


def check_levels(
    runtime: Runtime,
    levels: Mapping[str, Level],
    shapes: Mapping[str, Shape],
    parts: Mapping[str, str],
) -> None:
    """Check that a runtime can load modules at levels.

    Args:
        levels, shapes: module -> level, (out, in).
        parts: as in `legal_space`.

    Raises:
        SpaceError: it cannot; names the module and the rule.
    """
    for name, level in levels.items():
        reason = runtime.refuses(level, shapes[name], part_of(name, parts))
        if reason is not None:
            raise _illegal(runtime, Layer(name, (name,), (shapes[name],)), level, reason)
    for group in tied_groups(runtime, list(levels)):
        first, *others = group
        for name in others:
            if levels[name] != levels[first]:
                raise SpaceError(
                    f"'{first}' and '{name}' must share one level for {runtime.name}, which "
                    f"fuses them. Got {levels[first]} and {levels[name]}. Search again with "
                    f"--runtime {runtime.name}, or export to another."
                )


def tied_groups(runtime: Runtime, names: Sequence[str]) -> list[list[str]]:
    """The modules that a runtime fuses, group by group."""
    found: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        experts = expert_group(name) if runtime.ties_experts else None
        group = next((i for i, tie in enumerate(runtime.tie) if last in tie), None)
        if experts is not None:
            found.setdefault((experts, -1), []).append(name)
        elif group is not None:
            found.setdefault((parent, group), []).append(name)
    return [group for group in found.values() if len(group) > 1]


def check_allocation(
    runtime: Runtime, space: SearchSpace, allocation: Allocation, parts: Mapping[str, str]
) -> None:
    """Check that a runtime can load an allocation.

    Raises:
        SpaceError: it cannot; names the layer and the rule.
    """
    levels, shapes = {}, {}
    for layer, level in zip(space.layers, allocation.levels, strict=True):
        for name, shape in zip(layer.modules, layer.shapes, strict=True):
            levels[name], shapes[name] = level, shape
    check_levels(runtime, levels, shapes, parts)


def _refusal(runtime: Runtime, level: Level, layer: Layer, parts: Mapping[str, str]) -> str | None:
    """The first reason why a layer cannot take a level."""
    for name, shape in zip(layer.modules, layer.shapes, strict=True):
        reason = runtime.refuses(level, shape, part_of(name, parts))
        if reason is not None:
            return reason
    return None


def _illegal(runtime: Runtime, layer: Layer, level: Level, reason: str | None) -> SpaceError:
    shapes = ", ".join(f"{rows} x {width}" for rows, width in dict.fromkeys(layer.shapes))
    return SpaceError(
        f"layer '{layer.name}' ({shapes}) must be at a level that {runtime.name} can load. Got "
        f"{level}: {reason}. Give it another level, or choose another runtime."
    )
