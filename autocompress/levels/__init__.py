"""Levels: the ways to store a layer's weight, their keys, and exactly how many bits they take.

A key is one part, or several joined by plus signs; see `Joint`. To add a family, write a frozen
dataclass in a file of its own and enter it in `LEVELS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar, Protocol, Self

from autocompress.errors import LevelError
from autocompress.levels.gguf import BLOCKS, GgufType
from autocompress.levels.joint import Joint
from autocompress.levels.low_rank import LowRank
from autocompress.levels.prune import Outliers, Prune
from autocompress.levels.quantize import Dense, Quantize
from autocompress.levels.remove import Drop, Role, Unread, drop_modules
from autocompress.levels.storage import DENSE_BITS, SCALE_BITS, Shape, packed_bytes
from autocompress.levels.width import Rows, Width, width_modules

__all__ = [
    "DENSE_BITS",
    "IMPLIED",
    "LEVELS",
    "SCALE_BITS",
    "UNCHANGED",
    "WHOLE",
    "Dense",
    "Drop",
    "GgufType",
    "Joint",
    "Level",
    "LowRank",
    "Outliers",
    "Prune",
    "Quantize",
    "Role",
    "Rows",
    "Shape",
    "Unread",
    "Width",
    "is_unchanged",
    "module_levels",
    "packed_bytes",
    "parse_level",
]

KNOWN = (  # what misspelt keys may have meant
    *("dense", "w2g64", "w3g64", "w4g64", "w8g64", "s50", "2:4", "r25%", "2:4+w4g64", "r8+w3g64"),
    *("drop", "width75%", "width75%+w4g64"),
    *BLOCKS,
)


class Level(Protocol):
    """One way to store one weight. `parse_level(str(level)) == level`."""

    form: ClassVar[str]

    @classmethod
    def parse(cls, key: str) -> Self | None:
        """The level `key` names, or None when the key belongs to another family."""

    def storage_bits(self, shape: Shape) -> int:
        """Bits on disk of a weight of `shape` (out, in), everything counted.

        Raises:
            LevelError: no weight of this shape can be at this level.
        """

    def parameters(self, shape: Shape) -> int:
        """Numbers that products with a weight of `shape` multiply with, at most.

        Codes are as many as weights; dropped weights do not count, both factors of a low rank do.
        A token takes twice as many FLOPs.

        Raises:
            LevelError: no weight of this shape can be at this level.
        """


LEVELS: tuple[type[Level], ...] = (
    *(Dense, Quantize, Prune, LowRank, Joint, GgufType, Drop, Unread),
    *(Width, Rows),
)
UNCHANGED = (Dense, Unread)  # store nothing beside the dense model's weight
IMPLIED = (Unread, Rows)  # what other modules of a layer have, no choices
WHOLE = (Drop, Width)  # of whole sublayers


def is_unchanged(level: Level) -> bool:
    """Whether a module at this level computes what it did, as far as anybody reads it."""
    return isinstance(level, UNCHANGED) or (isinstance(level, Rows) and level.codes is None)


def module_levels(
    level: Level, modules: Sequence[str], roles: Sequence[Role], shapes: Sequence[Shape]
) -> tuple[Level, ...]:
    """What each module of a layer stores when the layer is at `level`.

    Raises:
        LevelError: these modules cannot take the level together.
    """
    if isinstance(level, Drop):
        return drop_modules(modules, roles)
    if isinstance(level, Width):
        return width_modules(level, modules, roles, shapes)
    return (level,) * len(modules)


@lru_cache(maxsize=4096)  # tables of trials name few levels, each many times
def parse_level(key: str) -> Level:
    """The level named by `key`.

    >>> level = parse_level("w3g64")
    >>> level.storage_bits((64, 64)) / (64 * 64)  # 3 bits, a scale and a zero for each 64 weights
    3.296875
    >>> str(parse_level("2:4+w4g64"))
    '2:4+w4g64'

    Raises:
        LevelError: no registered level understands `key`.
    """
    for family in LEVELS:
        level = family.parse(key.strip())
        if level is not None:
            return level
    near = difflib.get_close_matches(key, KNOWN, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    forms = "; ".join(family.form for family in LEVELS)
    raise LevelError(f"a level must have one of the forms: {forms}. Got '{key}'.{hint}")
