"""Levels that store every weight: dense, or as integer codes with scales."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Self

from autocompress.errors import LevelError
from autocompress.levels.storage import DENSE_BITS, SCALE_BITS, Shape, packed_bytes


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

    def parameters(self, shape: Shape) -> int:
        return shape[0] * shape[1]


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

    def code_bits(self, count: int) -> int:
        """Bits of `count` codes, with the padding to whole bytes."""
        return packed_bytes(count, self.bits) * 8

    def grid_bits(self, shape: Shape) -> int:
        """Bits of the scales and zeros of a weight of `shape`."""
        groups = shape[0] * self.groups(shape[1])
        return groups * SCALE_BITS + (0 if self.symmetric else self.code_bits(groups))

    def storage_bits(self, shape: Shape) -> int:
        return self.code_bits(shape[0] * shape[1]) + self.grid_bits(shape)

    def parameters(self, shape: Shape) -> int:
        return shape[0] * shape[1]
