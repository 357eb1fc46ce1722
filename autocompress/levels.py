"""Levels: the ways to store a layer's weight, their keys, and exactly how many bits they take."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Protocol, Self

from autocompress.errors import LevelError

Shape = tuple[int, int]  # (out_features, in_features)

DENSE_BITS = 16  # a dense weight ships as bf16 or fp16
SCALE_BITS = 16  # scales are fp16


class Level(Protocol):
    """One way to store one weight. `parse_level(str(level)) == level`."""

    form: ClassVar[str]

    @classmethod
    def parse(cls, key: str) -> Self | None:
        """The level `key` names, or None when the key belongs to another family."""

    def storage_bits(self, shape: Shape) -> int:
        """Bits on disk of a weight of `shape` (out, in), everything counted."""


@dataclass(frozen=True, slots=True, order=True)
class Dense:
    """The weight as it is, in 16 bits."""

    form: ClassVar[str] = "dense"

    def __str__(self) -> str:
        return "dense"

    @classmethod
    def parse(cls, key: str) -> Self | None:
        return cls() if key == "dense" else None

    def storage_bits(self, shape: Shape) -> int:
        return DENSE_BITS * shape[0] * shape[1]


@dataclass(frozen=True, slots=True, order=True)
class Quantize:
    """Integer codes with one fp16 scale (and, if asymmetric, one integer zero) per group.

    `w = scale * (code - zero)`; groups are `group_size` consecutive inputs of one output row,
    the last one shorter when the width is not a multiple. `group_size=None` is one group per row.

    Args:
        bits: width of a code, one of 2, 3, 4, 5, 6, 8.
        group_size: 8 or more inputs, or None for per output channel.
        symmetric: no stored zero; the zero is `2**(bits-1)`.
    """

    form: ClassVar[str] = "w{2,3,4,5,6,8}[g{group size}][sym], such as w3g64, w4g128sym, w8"
    WIDTHS: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 8)

    bits: int
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in self.WIDTHS:
            raise LevelError(f"bits must be one of {self.WIDTHS}. Got {self.bits}.")
        if self.group_size is not None and (self.group_size < 8 or self.group_size % 8):
            raise LevelError(
                f"group_size must be a multiple of 8, at least 8. Got {self.group_size}."
            )

    def __str__(self) -> str:
        group = "" if self.group_size is None else f"g{self.group_size}"
        return f"w{self.bits}{group}{'sym' if self.symmetric else ''}"

    @classmethod
    def parse(cls, key: str) -> Self | None:
        match = re.fullmatch(r"w(\d+)(?:g(\d+))?(sym)?", key)
        if match is None:
            return None
        bits, group, symmetric = match.groups()
        return cls(int(bits), int(group) if group else None, symmetric is not None)

    def groups(self, width: int) -> int:
        """Groups in a row of `width` inputs."""
        return 1 if self.group_size is None else ceil(width / self.group_size)

    def storage_bits(self, shape: Shape) -> int:
        rows, width = shape
        groups = rows * self.groups(width)
        zeros = 0 if self.symmetric else packed_bytes(groups, self.bits) * 8
        return packed_bytes(rows * width, self.bits) * 8 + groups * SCALE_BITS + zeros


LEVELS: tuple[type[Level], ...] = (Dense, Quantize)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits, packed eight codes to `bits` bytes."""
    return ceil(count / 8) * bits


def parse_level(key: str) -> Level:
    """The level named by `key`.

    Raises:
        LevelError: no registered level understands `key`.
    """
    for family in LEVELS:
        level = family.parse(key.strip())
        if level is not None:
            return level
    near = difflib.get_close_matches(key, ["dense", "w2g64", "w3g64", "w4g64", "w8g64"], n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    forms = "; ".join(family.form for family in LEVELS)
    raise LevelError(f"a level must have one of the forms: {forms}. Got '{key}'.{hint}")
