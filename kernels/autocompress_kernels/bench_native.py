"""Our kernels as cases: the C functions themselves, on arguments that are made beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from autocompress_kernels.bench_cases import (
    Case,
    Copies,
    Label,
    Shape,
    Turn,
    Weight,
    error,
    generator,
    is_cold,
    random_input,
)
from autocompress_kernels.bench_weights import Made, bf16_weight, codes_weight, sparse_weight
from autocompress_kernels.calls import matrix
from autocompress_kernels.check import EXACT, rounded_limit
from autocompress_kernels.formats import MODES, PARTS, Packed
from autocompress_kernels.library import failure, load
from autocompress_kernels.memory import arena
from autocompress_kernels.ops import SECOND

CODES = (2, 3, 4, 5, 6, 8)  # bits
SPARSITIES = (50, 70)  # % of a bitmask's elements that are dropped
RANK = 8  # the rank is this part of the smaller side
TABLE = 16  # times more rows than inputs: an embedding, so rows are looked up as well
LOOKED_UP = (4, 8, 16)  # bits
LOOKUPS = 20_000  # prepared calls of a look-up: more rows than the caches hold
F32 = 0  # ack_type
Arguments = tuple[object, ...]
Families = dict[str, tuple[str, ...]]  # mode -> families


class NativeWeight:
    """One packed weight in many copies on huge pages, as a loaded model has them.

    Args:
        made: the weight.
        kernel: of its labels.
        families: mode -> families of its labels; the modes it is timed in.
        copies: how many are made.
        table: whether rows are looked up, too.
    """

    def __init__(
        self,
        made: Made,
        kernel: str,
        families: Families,
        copies: Copies,
        table: bool = False,
    ) -> None:
        self.made, self.kernel, self.families, self.table = made, kernel, families, table
        self.size = made.packed.bytes
        self.matrices, self._keep = copies_in_arena(made.packed, copies(self.size))
        self.turn = Turn(len(self.matrices))

    def cases(self, m: int, threads: int) -> list[Case]:
        found = [self._case(mode, m, threads) for mode in self.families]
        return [*found, self._look_up(m, threads)] if self.table else found

    def _case(self, mode: str, m: int, threads: int) -> Case:
        made = self.made
        format = made.packed.format
        x, y = random_input(m, format.width), torch.empty(m, format.rows)
        calls = [[linear_call(one, mode, x, y, threads)] for one in self.matrices]

        def check() -> tuple[float, float]:
            call_once(load().linear, calls[-1][0])
            return error(y, made.product(x, "a32")), error(y, made.product(x, mode))

        return Case(
            label=Label("native", self.kernel, format.bits, mode, self.families[mode]),
            bytes=self.size,
            function=load().linear,
            copies=calls,
            turn=self.turn,
            check=check,
            limits=(EXACT[mode], rounded_limit(mode, load().isa())),
            cold=is_cold(self.size),
            threads=threads,
            keep=(x, y, self._keep),
        )

    def _look_up(self, m: int, threads: int) -> Case:
        """`m` random rows at a time, of so many that they are cold when their turn comes again."""
        made, parallel = self.made, load().parallel
        format = made.packed.format
        rows = torch.randint(format.rows, (LOOKUPS, m), generator=generator(m))
        y = torch.empty(m, format.width)
        target = (y.data_ptr(), F32, format.width, parallel, threads)
        calls = [
            [(self.matrices[i % len(self.matrices)], line.data_ptr(), 0, m, *target)]
            for i, line in enumerate(rows)
        ]

        def check() -> tuple[float, float]:
            call_once(load().rows, calls[-1][0])
            return error(y, made.rows(rows[-1])), 0.0

        return Case(
            label=Label("native", f"{self.kernel} rows", format.bits, "a32", task="rows"),
            bytes=m * self.size // format.rows,
            function=load().rows,
            copies=calls,
            turn=Turn(LOOKUPS),
            check=check,
            limits=(EXACT["a32"], 0.0),
            cold=is_cold(self.size),
            threads=threads,
            keep=(rows, y, self._keep),
        )


class LowRankWeight:
    """Two factors: x A^T, then its product with B^T onto what is there, in two calls.

    Args:
        first, second: (rank, width) and (rows, rank).
        kernel, mode: of its label.
        copies: how many are made.
    """

    def __init__(self, first: Made, second: Made, kernel: str, mode: str, copies: Copies) -> None:
        self.first, self.second, self.kernel, self.mode = first, second, kernel, mode
        self.size = first.packed.bytes + second.packed.bytes
        count = copies(self.size)
        self.ones, one = copies_in_arena(first.packed, count)
        self.twos, two = copies_in_arena(second.packed, count)
        self.turn, self._keep = Turn(count), (one, two)

    def cases(self, m: int, threads: int) -> list[Case]:
        rank, width = self.first.packed.format.rows, self.first.packed.format.width
        x, inner = random_input(m, width), torch.empty(m, rank)
        y = torch.zeros(m, self.second.packed.format.rows)
        calls = [
            [
                linear_call(one, self.mode, x, inner, threads),
                linear_call(two, SECOND[self.mode], inner, y, threads, add=1),
            ]
            for one, two in zip(self.ones, self.twos, strict=True)
        ]

        def check() -> tuple[float, float]:
            y.fill_(1)  # something to add to
            for call in calls[-1]:
                call_once(load().linear, call)
            wanted = self.second.product(self.first.product(x, "a32"), "a32")
            return error(y - 1, wanted), 0.0

        return [
            Case(
                label=Label("native", self.kernel, self.first.packed.format.bits, self.mode),
                bytes=self.size,
                function=load().linear,
                copies=calls,
                turn=self.turn,
                check=check,
                limits=(EXACT[self.mode], 0.0),
                cold=is_cold(self.size),
                threads=threads,
                keep=(x, inner, y, self._keep),
            )
        ]


def native_weights(shape: Shape, copies: Copies) -> Iterator[tuple[str, Callable[[], Weight]]]:
    """Name and maker of every weight of a shape that is timed."""
    is_table = shape[0] >= TABLE * shape[1]
    for symmetric in (True, False):
        for bits in CODES:
            yield (
                f"native q{bits}{'' if symmetric else ' asym'}",
                partial(_codes, shape, copies, bits, symmetric, is_table),
            )
    yield "native bf16", partial(_dense, shape, copies, is_table)
    for pattern, sparsity in (*(("bitmask", part) for part in SPARSITIES), ("2:4", 50)):
        for bits in (16, 8):
            yield (
                f"native {pattern} {sparsity} {bits}",
                partial(_sparse, shape, copies, bits, pattern, sparsity),
            )
    for bits in (4, 16):
        yield f"native low-rank {bits}", partial(_low_rank, shape, copies, bits)


def _codes(
    shape: Shape, copies: Copies, bits: int, symmetric: bool, is_table: bool
) -> NativeWeight:
    name = "codes" if symmetric else "codes asym"
    families: Families = {mode: (f"{name} {mode}",) for mode in MODES}
    if bits == 8 and symmetric:
        families["a8"] += ("sparse int8 a8",)
    made = codes_weight(shape, bits, symmetric)
    table = is_table and symmetric and bits in LOOKED_UP
    return NativeWeight(made, f"q{bits}" if symmetric else f"q{bits} asym", families, copies, table)


def _dense(shape: Shape, copies: Copies, is_table: bool) -> NativeWeight:
    names = ("codes", "codes asym")
    half = tuple(f"{name} {mode}" for name in names for mode in ("a8", "a16"))
    families: Families = {
        "a16": (*half, "sparse bf16 a16"),
        "a32": tuple(f"{name} a32" for name in names),
    }
    return NativeWeight(bf16_weight(shape), "bf16", families, copies, is_table)


def _sparse(shape: Shape, copies: Copies, bits: int, pattern: str, sparsity: int) -> NativeWeight:
    made = sparse_weight(shape, bits, pattern, sparsity)
    kind, mode = ("bf16", "a16") if bits == 16 else ("int8", "a8")
    name = f"{pattern} {kind}" if pattern == "2:4" else f"{pattern} {sparsity}% {kind}"
    return NativeWeight(made, name, {mode: (f"sparse {kind} {mode}",)}, copies)


def _low_rank(shape: Shape, copies: Copies, bits: int) -> LowRankWeight:
    rank = max(32, min(shape) // RANK // 32 * 32)
    kind, mode = ("bf16", "a16") if bits == 16 else (f"q{bits}", "a8")
    first, second = (
        bf16_weight(part) if bits == 16 else codes_weight(part, bits, True)
        for part in ((rank, shape[1]), (shape[0], rank))
    )
    return LowRankWeight(first, second, f"low-rank {rank} {kind}", mode, copies)


def copies_in_arena(packed: Packed, count: int) -> tuple[list[bytes], object]:
    """`count` copies of a weight side by side on huge pages: each `struct ack_matrix`, and memory.

    The copies are equal, so they are made from one.
    """
    names = list(packed.tensors)
    views = arena(list(packed.tensors.values()) * count)
    matrices = []
    for start in range(0, len(views), len(names)):
        turn = dict(zip(names, views[start : start + len(names)], strict=True))
        values, scales, zeros, masks, offsets = (turn.get(name) for name in PARTS)
        assert values is not None
        matrices.append(matrix(values, scales, zeros, masks, offsets, *packed.numbers))
    return matrices, views


def linear_call(
    weight: bytes, mode: str, x: Tensor, y: Tensor, threads: int, add: int = 0
) -> Arguments:
    """Arguments of `ack_linear`: float32 in and out, no bias."""
    m, width = x.shape
    source = (MODES[mode], m, x.data_ptr(), F32, width, None)
    return (weight, *source, y.data_ptr(), F32, y.shape[1], add, load().parallel, threads)


def call_once(function: Callable[..., int], call: Sequence[object]) -> None:
    """Call a function of the library.

    Raises:
        ValueError: it refuses, which a timed call would hide.
    """
    code = function(*call)
    if code:
        raise failure(code, "a case of the benchmark")
