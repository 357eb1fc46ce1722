"""Layers made of several modules: tied by name, or whole sublayers and blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from autocompress.core import Layer, SearchSpace
from autocompress.levels import Drop, Level, Width

TIES = ("sublayers", "blocks")  # what modules can be tied to without naming them
Tie = tuple[tuple[str, ...], ...] | str
Whole = Callable[[str], str | None]  # module -> the layer that it is part of
BLOCK = re.compile(r"(?:.*?\.)??\d+\.")  # up to the first number of a dotted name


def _fuse(members: Sequence[Layer], name: str | None = None) -> Layer:
    """One layer of all modules; without a name, theirs joined."""
    first, *others = members
    joined = "+".join([first.name, *(layer.name.rpartition(".")[2] for layer in others)])
    return Layer(
        name or joined,
        tuple(module for layer in members for module in layer.modules),
        tuple(shape for layer in members for shape in layer.shapes),
        tuple(role for layer in members for role in layer.roles),
    )


def tie_layers(layers: Sequence[Layer], tie: Tie, together: Whole) -> tuple[Layer, ...]:
    """Layers with the modules of one parent and one tie group fused, at the first one's place.

    Args:
        layers: one module each.
        together: wins over groups; whole sublayers and blocks win over both.
    """
    if isinstance(tie, str):
        return _tie_whole(layers, tie)
    group_of = {suffix: group for group, suffixes in enumerate(tie) for suffix in suffixes}
    fused: dict[tuple[str, int | str | None], list[Layer]] = {}
    for layer in layers:
        parent, _, suffix = layer.name.rpartition(".")
        whole = together(layer.name)
        key = (parent, group_of.get(suffix, suffix)) if whole is None else (whole, None)
        fused.setdefault(key, []).append(layer)
    return tuple(
        _fuse(members, name if kind is None else None) for (name, kind), members in fused.items()
    )


def _tie_whole(
    layers: Sequence[Layer],  # one module each, with roles where they are in blocks
    tie: str,  # of `TIES`
) -> tuple[Layer, ...]:
    """Sublayers or blocks as one layer each, at the first module's place; others as they are."""
    owner = {layer.name: layer.name for layer in layers}
    for layer in layers:
        for role in layer.roles:
            for reader in role.readers:
                _join(owner, layer.name, reader)
            if tie == "blocks" and (match := BLOCK.match(layer.name)):
                _join(owner, layer.name, _first(layers, match[0]))
    fused: dict[str, list[Layer]] = {}
    for layer in layers:
        fused.setdefault(_root(owner, layer.name), []).append(layer)
    return tuple(_fuse(members) for members in fused.values())


def keeps_some(levels: Sequence[Sequence[Level]]) -> bool:
    """Whether some layer may keep anything."""
    return any(not isinstance(level, Drop) for allowed in levels for level in allowed)


def _first(layers: Sequence[Layer], prefix: str) -> str:
    return next(layer.name for layer in layers if layer.roles and layer.name.startswith(prefix))


def _root(owner: dict[str, str], name: str) -> str:
    while owner[name] != name:
        name = owner[name]
    return name


def _join(owner: dict[str, str], one: str, other: str) -> None:
    """Make two modules members of one layer; those outside the scope are none's."""
    if other in owner:
        owner[_root(owner, other)] = _root(owner, one)


def feeders(space: SearchSpace) -> dict[str, tuple[str, ...]]:
    """Module that may become narrower -> those that feed it."""
    return {
        writer: tuple(it for it in layer.modules if it != writer)
        for layer, levels in zip(space.layers, space.levels, strict=True)
        for level in levels
        if isinstance(level, Width)
        for writer, own in zip(layer.modules, layer.module_levels(level), strict=True)
        if isinstance(own, Width)
    }
