"""Levels that store a weight as the product of two thin matrices."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Self

from autocompress.errors import LevelError
from autocompress.levels.quantize import Quantize
from autocompress.levels.storage import DENSE_BITS, PERCENT, Shape, part_of


@dataclass(frozen=True, slots=True)
class LowRank:
    """`left @ right` of shapes (out, rank) and (rank, in), in bf16 or both quantized.

    Key: `r{rank}` or `r{percent}%` of the break-even rank out * in / (out + in), at which bf16
    factors are as large as the dense weight; what follows without a plus is the level of the
    factors: `r64`, `r25%`, `r50%w8g64`. Above 100 % only quantized factors are smaller than
    the dense weight.

    Args:
        rank: at least 1; or None.
        percent: of the break-even rank, above 0, two decimals at most; or None. The rank is
            rounded down, to 1 at least.
        factors: None for bf16. Groups of the left factor run along the rank.
    """

    form: ClassVar[str] = (
        "r{rank}[w...] or r{percent of the break-even rank}%[w...], such as r64, r25%, r50%w8g64"
    )

    rank: int | None = None
    percent: float | None = None
    factors: Quantize | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.percent is None):
            raise LevelError("a low-rank level must have a rank or a percentage. Got both or none.")
        if not (self.rank or self.percent or 0) > 0:
            raise LevelError(f"a rank must be above 0. Got '{self}'.")

    def __str__(self) -> str:
        size = f"{self.rank}" if self.percent is None else f"{self.percent:g}%"
        return f"r{size}{self.factors or ''}"

    @classmethod
    def parse(cls, key: str) -> Self | None:
        match = re.fullmatch(rf"r(?:(\d{{1,6}})|{PERCENT}%)(w.*)?", key)
        if match is None:
            return None
        rank, percent, rest = match.groups()
        factors = Quantize.parse(rest) if rest else None
        if rest and factors is None:
            return None
        return cls(int(rank) if rank else None, float(percent) if percent else None, factors)

    def rank_of(self, shape: Shape) -> int:
        """The rank of a weight of `shape`.

        Raises:
            LevelError: it is above the full rank.
        """
        rows, width = shape
        rank = self.rank
        if rank is None:
            assert self.percent is not None
            rank = max(1, part_of(rows * width, self.percent) // (rows + width))
        if rank > min(shape):
            raise LevelError(
                f"the rank of a layer at {self} must be at most {min(shape)}, the full rank of "
                f"{rows} x {width}. Got {rank}. Lower it or give the layer other levels."
            )
        return rank

    def factor_shapes(self, shape: Shape) -> tuple[Shape, Shape]:
        """(out, rank) and (rank, in)."""
        rank = self.rank_of(shape)
        return (shape[0], rank), (rank, shape[1])

    def storage_bits(self, shape: Shape) -> int:
        left, right = self.factor_shapes(shape)
        if self.factors is not None:
            return self.factors.storage_bits(left) + self.factors.storage_bits(right)
        return DENSE_BITS * (left[0] * left[1] + right[0] * right[1])

    def parameters(self, shape: Shape) -> int:
        return self.rank_of(shape) * (shape[0] + shape[1])
