"""Levels that keep some weights and drop the others."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil, comb
from typing import ClassVar, Self

from autocompress.errors import LevelError
from autocompress.levels.storage import (
    DENSE_BITS,
    PERCENT,
    Shape,
    match_percent,
    packed_bytes,
    part_of,
)

GROUPS = (2, 4, 8)  # m of n:m
STRETCH = 255  # inputs whose outliers are counted together: places and counts fit a byte


@dataclass(frozen=True, slots=True, order=True)
class Prune:
    """Some weights in bf16, the others zero.

    Unstructured (`s50`): any, marked in a mask of one bit per weight. Of each `of` consecutive
    inputs of a row (`2:4` keeps 2 of 4): the number of the kept combination, in as few bits as
    name all of them: 3 for 2:4, 7 for 4:8.

    Args:
        sparsity: dropped weights, percent, above 0 and below 100, two decimals at most.
        of: 2, 4 or 8, m of `n:m`, where `sparsity` leaves a whole n; None for any weights.
    """

    form: ClassVar[str] = "s{percent dropped} or {n}:{m}, such as s50, 2:4, 4:8"

    sparsity: float
    of: int | None = None

    def __post_init__(self) -> None:
        if self.of is not None and self.of not in GROUPS:
            raise LevelError(f"m of n:m must be one of {GROUPS}. Got {self.of}.")
        if not 0 < self.sparsity < 100:
            raise LevelError(
                f"sparsity must be above 0 % and below 100 %. Got {self.sparsity:g} %. "
                "Write 'dense' to keep all."
            )
        if self.of is not None and self.kept_of * 100 != (100 - self.sparsity) * self.of:
            raise LevelError(f"n of n:{self.of} must be whole. Got {self.sparsity:g} % dropped.")

    def __str__(self) -> str:
        return f"s{self.sparsity:g}" if self.of is None else f"{self.kept_of}:{self.of}"

    @classmethod
    def parse(cls, key: str) -> Self | None:
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", key)
        if match is None:
            sparsity = match_percent(f"s{PERCENT}", key)
            return None if sparsity is None else cls(sparsity)
        kept, of = int(match[1]), int(match[2])
        if not 0 < kept < of or of not in GROUPS:
            raise LevelError(
                f"n:m must keep n of each m inputs, m one of {GROUPS} and 0 < n < m. Got '{key}'."
            )
        return cls(100 * (of - kept) / of, of)

    @property
    def kept_of(self) -> int:
        """n of n:m."""
        return round((self.of or 0) * (100 - self.sparsity) / 100)

    @property
    def index_bits(self) -> int:
        """Bits that name which inputs of a group are kept; 1 for each input of a mask."""
        return 1 if self.of is None else (comb(self.of, self.kept_of) - 1).bit_length()

    def kept(self, shape: Shape) -> int:
        """Weights that are stored.

        Raises:
            LevelError: m does not divide the inputs.
        """
        rows, width = shape
        if self.of is None:
            return rows * width - part_of(rows * width, self.sparsity)
        if width % self.of:
            raise LevelError(
                f"the inputs of a layer at {self} must be a multiple of {self.of}. Got {width}. "
                "Give the layer other levels."
            )
        return rows * width // self.of * self.kept_of

    def mask_bits(self, shape: Shape) -> int:
        """Bits that say which weights are kept."""
        return packed_bytes(shape[0] * shape[1] // (self.of or 1), self.index_bits) * 8

    def storage_bits(self, shape: Shape) -> int:
        return self.mask_bits(shape) + self.kept(shape) * DENSE_BITS

    def parameters(self, shape: Shape) -> int:
        return self.kept(shape)


@dataclass(frozen=True, slots=True, order=True)
class Outliers:
    """A few weights in bf16 beside the codes of all; a part of `Joint` levels only.

    Stored as values, places in stretches of 255 inputs, and how many each stretch has, in a byte
    each.

    Args:
        percent: of all weights, above 0 and at most 10, two decimals at most.
    """

    form: ClassVar[str] = "o{percent}%"

    percent: float

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 10:
            raise LevelError(
                f"outliers must be above 0 % and at most 10 %. Got {self.percent:g} %. More bits "
                "for all weights take less room than more outliers."
            )

    def __str__(self) -> str:
        return f"o{self.percent:g}%"

    @classmethod
    def parse(cls, key: str) -> Self | None:
        percent = match_percent(f"o{PERCENT}%", key)
        return None if percent is None else cls(percent)

    def count(self, shape: Shape) -> int:
        """How many, at least one."""
        return max(1, part_of(shape[0] * shape[1], self.percent))

    def stretches(self, width: int) -> int:
        """Stretches in a row of `width` inputs."""
        return ceil(width / STRETCH)

    def storage_bits(self, shape: Shape) -> int:
        return self.count(shape) * (DENSE_BITS + 8) + shape[0] * self.stretches(shape[1]) * 8
