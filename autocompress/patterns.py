"""Patterns on the names of layers, and the least that matching layers must store."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from autocompress.core import Layer
from autocompress.errors import LevelError, SpaceError
from autocompress.levels import Level


def matches(pattern: str, module: str, layer: Layer) -> bool:
    """Whether a pattern names a module, or the layer it is part of."""
    return fnmatchcase(module, pattern) or fnmatchcase(layer.name, pattern)


def check_matches(pattern: str, layers: Sequence[Layer]) -> None:
    """Check that a pattern names something.

    Raises:
        SpaceError: it does not; names what is near.
    """
    if any(matches(pattern, module, layer) for layer in layers for module in layer.modules):
        return
    names = [module for layer in layers for module in layer.modules]
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
    raise SpaceError(
        f"a pattern must match the name of at least one layer in scope. '{pattern}' matches none. "
        f"Near names: {', '.join(near)}."
    )


def at_least(
    layer: Layer, levels: tuple[Level, ...], minimums: Sequence[tuple[str, Level]]
) -> tuple[Level, ...]:
    """The levels that store no less of the layer than every minimum that matches it.

    Levels that the layer's shape cannot have stay, for whoever checks shapes.

    Raises:
        SpaceError: none is left, or the layer cannot take a minimum.
    """
    kept = levels
    for pattern, minimum in minimums:
        if not any(matches(pattern, module, layer) for module in layer.modules):
            continue
        least = _bits(layer, minimum)
        if least is None:
            raise SpaceError(
                f"layer '{layer.name}' must be able to take its minimum. Got {minimum} for "
                f"{', '.join(f'{rows} x {width}' for rows, width in layer.shapes)}."
            )
        sizes = {level: _bits(layer, level) for level in kept}
        kept = tuple(level for level, bits in sizes.items() if bits is None or bits >= least)
    if not kept:
        lowest = ", ".join(str(level) for _, level in minimums)
        raise SpaceError(
            f"a minimum must leave every layer a level. '{layer.name}' has "
            f"{', '.join(map(str, levels))}, all below {lowest}. Lower the minimum, or give the "
            "layer more."
        )
    return kept


def _bits(layer: Layer, level: Level) -> int | None:
    try:
        return layer.storage_bits(level)
    except LevelError:
        return None
