"""How much of a weight levels store: exact counts, in whole bytes."""

from __future__ import annotations

import re
from fractions import Fraction
from math import ceil

Shape = tuple[int, int]  # (out_features, in_features)

DENSE_BITS = 16  # a dense weight ships as bf16 or fp16
SCALE_BITS = 16  # scales are fp16

PERCENT = r"(\d{1,3}(?:\.\d{1,2})?)"  # of a key


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits, packed eight codes to `bits` bytes."""
    return ceil(count / 8) * bits


def part_of(count: int, percent: float) -> int:
    """`percent` % of `count`, rounded down, exactly: 12.1 % of 1000 is 121."""
    return int(count * Fraction(str(percent)) / 100)


def match_percent(pattern: str, key: str) -> float | None:
    """The percentage in a key; `pattern` holds `PERCENT`."""
    match = re.fullmatch(pattern, key)
    return None if match is None else float(match[1])
