"""What the benchmark times: a multiplication by one weight, of which many copies lie in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

COLD = 3  # times the last-level cache: what the copies of one weight take together
MOST_COPIES = 512  # more would cost more time to make than they are worth
SMALLEST_CACHE = 32 << 20  # bytes; assumed where the system does not tell
RIVAL_LIMIT = 0.1  # relative error above which a rival computes something else; without VNNI,
# sums of ATen's int8 saturate: 0.052 to 0.057 measured with AVX2
BANK = 496  # different rows of a weight; longer ones repeat them, which no kernel can notice
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
Shape = tuple[int, int]  # rows (outputs), width (inputs)
Copies = Callable[[int], int]  # bytes of a weight -> how many copies are made


@dataclass(frozen=True)
class Label:
    """What a kernel is.

    Args:
        runtime: 'native', 'aten' or 'ggml'.
        kernel: its name within the runtime.
        bits: of a weight's element, without scales and masks.
        mode: of native activations ('a8', 'a16', 'a32'); else what x is.
        families: of kernels that differ in how much they store: more should not be faster.
        task: 'linear', or 'rows': looks rows up.
    """

    runtime: str
    kernel: str
    bits: int
    mode: str
    families: tuple[str, ...] = ()
    task: str = "linear"

    def __str__(self) -> str:
        return f"{self.runtime} {self.kernel} {self.mode}"


class Turn:
    """Whose turn it is among the copies: shared by all cases of a weight, so that none is warm."""

    def __init__(self, copies: int) -> None:
        self._copies, self._next = copies, 0

    def take(self, calls: int) -> Iterator[int]:
        """The next `calls` copies, round and round."""
        first = self._next
        self._next = (first + calls) % self._copies
        return (number % self._copies for number in range(first, first + calls))


@dataclass
class Case:
    """One kernel on one shape, for one number of rows of x and of threads.

    Args:
        label: what it is.
        bytes: of weights that a multiplication reads.
        function: what is called; a call is `function(*arguments)`.
        copies: for each copy of the weight, or graph of several, the arguments of its calls.
        turn: over `copies`.
        each: multiplications per entry of `copies`.
        check: runs it and returns (error, rounded error); the second is 0 for rivals.
        limits: of both errors.
        cold: whether the copies are larger than the caches together.
        threads: that it may use.
        keep: what the arguments point into.
    """

    label: Label
    bytes: int
    function: Callable[..., object]
    copies: Sequence[Sequence[tuple[object, ...]]]
    turn: Turn
    check: Callable[[], tuple[float, float]]
    limits: tuple[float, float]
    cold: bool
    threads: int
    each: int = 1
    keep: object = field(default=None, repr=False)

    def calls(self, count: int) -> list[tuple[object, ...]]:
        """The arguments of the next `count` entries, one after the other."""
        return list(chain.from_iterable(self.copies[i] for i in self.turn.take(count)))


class Weight(Protocol):
    """A weight in memory, in one format, in all its copies."""

    def cases(self, m: int, threads: int) -> list[Case]:
        """All kernels that read it, for `m` rows of x and a number of threads."""


def last_level_cache() -> int:
    """Bytes of the largest cache, at least `SMALLEST_CACHE`."""
    found = [SMALLEST_CACHE]
    for size in CACHES.glob("index*/size"):
        text = size.read_text().strip()
        if text[:-1].isdecimal() and text[-1] in "KMG":
            found.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(found)


def copies_of(size: int) -> int:
    """Copies of `size` bytes that are `COLD` times the caches, 2 at least, within reason."""
    return min(MOST_COPIES, max(2, math.ceil(COLD * last_level_cache() / size)))


def is_cold(size: int) -> bool:
    """Whether `copies_of(size)` are larger than the caches."""
    return copies_of(size) * size > 1.5 * last_level_cache()


def bank_rows(rows: int) -> Tensor:  # (rows,), int64
    """For each row of a weight, the row of the bank that it repeats."""
    return torch.arange(rows) % min(rows, BANK)


def generator(*numbers: int) -> torch.Generator:
    """Random numbers that are the same in every run."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % (1 << 62)
    return torch.Generator().manual_seed(seed)


def random_input(m: int, width: int) -> Tensor:  # (m, width), float32
    """Activations, uniform in [-1, 1): as in `autocompress_kernels.check`, and for its reason."""
    return torch.rand((m, width), generator=generator(m, width)) * 2 - 1


def error(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference, relative to that of float64 `wanted`."""
    return float((found.double() - wanted).norm() / wanted.norm())
