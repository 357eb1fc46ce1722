"""Levels that calibration activations pass through: of a whole database, and of one layer."""

from __future__ import annotations

from collections.abc import Sequence

from autocompress.core import SearchSpace
from autocompress.errors import LevelError
from autocompress.levels import (
    UNCHANGED,
    WHOLE,
    Dense,
    GgufType,
    Level,
    Quantize,
    Rows,
    Shape,
)

PREFIX = Quantize(3, 64)
BLOCK = 256  # inputs that blocks of every level divide


def nearest(level: Level, allowed: Sequence[Level], shape: Shape) -> Level:
    """The allowed level closest in storage at a shape; dense if none keeps anything."""
    bits = _about(level, shape)
    keeping = [lv for lv in allowed if not isinstance(lv, (*WHOLE, Rows))]
    return min(keeping, key=lambda lv: abs(lv.storage_bits(shape) - bits), default=Dense())


def _about(level: Level, shape: Shape) -> float:
    """Bits of a level at a shape, or what they would be if its blocks could be cut."""
    try:
        return level.storage_bits(shape)
    except LevelError:
        rows, width = shape
        whole = -(-width // BLOCK) * BLOCK
        return level.storage_bits((rows, whole)) * width / whole


def default_prefix(space: SearchSpace) -> Level:
    """What calibration activations pass through where nobody says.

    `w3g64`, or the level nearest to it, where some level stores all weights as codes; in spaces of
    other levels that would be their very smallest, so there it is the one of middle size, which is
    `s50` in `sparse-unstructured`; dense where layers are only dropped
    or narrowed.
    """
    levels = [lv for lv in space.all_levels() if not isinstance(lv, (*UNCHANGED, *WHOLE))]
    if any(isinstance(lv, Quantize | GgufType) for lv in levels):
        return PREFIX
    sizes = {level: _size(level, space) for level in levels}
    known = sorted((lv for lv in levels if sizes[lv] is not None), key=lambda lv: sizes[lv] or 0)
    return known[len(known) // 2] if known else Dense()


def _size(level: Level, space: SearchSpace) -> int | None:
    """Bits of all layers at a level; None where one of them cannot take it."""
    try:
        return sum(level.storage_bits(shape) for it in space.layers for shape in it.shapes)
    except LevelError:
        return None
