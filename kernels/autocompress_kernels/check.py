"""Random matrices through every kernel against float64.

    python -m autocompress_kernels.check --cases 10000 --seed 0

Two errors per case, both relative (Frobenius):
  exact    to the product in float64. A case with few numbers can round unluckily, so the limit
           holds for all cases of a mode, an instruction set and a type, pooled;
  rounded  to the product of the activations as the mode rounds them. That is free of luck, so
           the limit holds for every case: it finds a wrong tail that would drown in rounding.
Activations are uniform in [-1, 1]. Rounding normal ones to int8 costs more, whatever the kernel:
0.53, 0.59 and 0.65 % with one scale per 32, 64 and 128 inputs, where uniform ones cost 0.39 %.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from autocompress_kernels import reference
from autocompress_kernels.formats import BITS, MODES, Packed
from autocompress_kernels.library import load, missing
from autocompress_kernels.ops import linear
from autocompress_kernels.pack import pack_bf16, pack_codes, pack_sparse

GROUPS = (32, 64, 96, 128, 160, 256, None)
PATTERNS = (*("full",) * 6, "bitmask", "2:4")  # full ones more often
EXACT = {"a8": 6e-3, "a16": 3e-3, "a32": 1e-5}  # pooled
BF16_OUTPUT = 4e-3  # half a unit in the last place, relative; a third of it pooled
ROUNDED = {"a8": 1e-3, "a16": 1e-5, "a32": 1e-5}  # int8 ties may fall to the other side
BLAS = 5e-3  # a16 with many rows: BLAS rounds weights and products to bf16
THIN = 1e-3  # a16 of sparse codes: offsets of dropped ones cancel, but few kept ones are small


@dataclass(frozen=True)
class Case:
    """One matrix and the product asked of it.

    Args:
        packed: the weight.
        x: (m, width), float32 or bf16, its rows maybe not side by side in memory.
        bias: (rows,), float32, or none.
        mode, isa: the kernel.
    """

    packed: Packed
    x: Tensor
    bias: Tensor | None
    mode: str
    isa: str

    def errors(self) -> tuple[float, float]:
        """The exact and the rounded error."""
        dense = reference.weight(self.packed)
        found = linear(self.x, self.packed, self.bias, self.mode)
        pair = []
        for mode in ("a32", self.mode):
            wanted = reference.linear(self.x, self.packed, self.bias, mode)
            pair.append(reference.relative_error(found, wanted, self.x, dense))
        return pair[0], pair[1]

    def most(self) -> float:
        """The limit of the rounded error."""
        limit = ROUNDED[self.mode]
        if self.mode == "a16" and self.x.shape[0] > 32:
            limit = BLAS
        elif self.mode == "a16" and self.packed.format.pattern != "full":
            limit = THIN
        return limit + (BF16_OUTPUT if self.kind == "bf16" else 0)

    @property
    def kind(self) -> str:
        """The type of x and y."""
        return "bf16" if self.x.dtype == torch.bfloat16 else "float32"

    def __str__(self) -> str:
        zeros = "asymmetric" if "zeros" in self.packed.tensors else "symmetric"
        place = f"{self.mode} on {self.isa}, M={len(self.x)}, {self.kind}"
        return f"{self.packed.format}, {zeros}, {place}"


@dataclass
class Tally:
    """What was found for one mode on one instruction set, with one type of x and y."""

    cases: int = 0
    squares: float = 0.0  # of exact errors
    worst_exact: float = 0.0
    worst_rounded: float = 0.0
    failed: list[str] = field(default_factory=list)

    def add(self, case: Case) -> None:
        """Run a case."""
        exact, rounded = case.errors()
        self.cases += 1
        self.squares += exact**2
        self.worst_exact = max(self.worst_exact, exact)
        self.worst_rounded = max(self.worst_rounded, rounded)
        if not rounded <= case.most():
            self.failed.append(f"{case}: rounded error {rounded:.1e}, above {case.most():.0e}")

    @property
    def pooled(self) -> float:
        """Root mean square of the exact errors."""
        return (self.squares / max(1, self.cases)) ** 0.5


def random_packed(random: Random, rows: int, width: int, pattern: str, bits: int) -> Packed:
    """A weight with random codes, scales in [0.1, 1), zeros half of the time, or normal bf16."""
    generator = torch.Generator().manual_seed(random.getrandbits(60))
    group = random.choice(GROUPS)
    keep = torch.rand((rows, width), generator=generator) < random.uniform(0.05, 1)
    keep[0, 0] = True  # an error relative to nothing says nothing
    if pattern == "2:4":
        order = torch.rand((rows, -(-width // 4), 4), generator=generator).argsort(2)
        keep = (order < 2).view(rows, -1)[:, :width]
    if bits == 16:
        weight = torch.randn((rows, width), generator=generator).to(torch.bfloat16)
        return pack_bf16(weight) if pattern == "full" else pack_sparse(weight, keep, pattern)
    shape = (rows, 1 if group is None else -(-width // group))
    codes = torch.randint(1 << bits, (rows, width), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(shape, generator=generator) * 0.9 + 0.1).half()
    if pattern != "full":
        return pack_sparse(codes, keep, pattern, scales, group)
    zeros = torch.randint(1 << bits, shape, dtype=torch.uint8, generator=generator)
    return pack_codes(codes, scales, random.choice((zeros, None)), bits, group)


def random_input(random: Random, count: int, width: int) -> Tensor:  # (count, width)
    """Uniform in [-1, 1), float32 or bf16; a third of them are slices of something wider."""
    generator = torch.Generator().manual_seed(random.getrandbits(60))
    wider = width + random.choice((0, 0, 1, 7))
    x = torch.rand((count, wider), generator=generator) * 2 - 1
    return x.to(random.choice((torch.float32, torch.bfloat16)))[:, :width]


def random_cases(count: int, seed: int) -> Iterator[Case]:
    """Cases of all formats, modes and instruction sets, mostly of odd sizes."""
    random = Random(seed)
    isas = load().isas()
    for _ in range(count):
        pattern = random.choice(PATTERNS)
        bits = random.choice(BITS if pattern == "full" else (8, 16))
        rows = random.choice((random.randint(1, 40), random.randint(1, 200), 64))
        width = random.choice((random.randint(1, 70), random.randint(1, 700), 576))
        m = random.choice((1, 1, random.randint(1, 33), random.randint(33, 48)))
        packed = random_packed(random, rows, width, pattern, bits)
        x = random_input(random, m, width)
        bias = torch.tensor([random.gauss(0, 1) for _ in range(rows)])
        bias_or_none = random.choice((bias, None))
        yield Case(packed, x, bias_or_none, random.choice(tuple(MODES)), random.choice(isas))


Found = dict[tuple[str, str, str], Tally]  # by mode, instruction set, type


def run(cases: Iterable[Case], progress: Callable[[int], None] = lambda done: None) -> Found:
    """Every case on its instruction set; the one in use before is back afterwards."""
    library = load()
    before = library.isa()
    found: Found = {}
    try:
        for done, case in enumerate(cases, start=1):
            library.select_isa(case.isa)
            found.setdefault((case.mode, case.isa, case.kind), Tally()).add(case)
            progress(done)
    finally:
        library.select_isa(before)
    return found


def failures(found: Found) -> list[str]:
    """What is above its limit."""
    failed = [line for tally in found.values() for line in tally.failed]
    for (mode, isa, kind), tally in found.items():
        limit = max(EXACT[mode], BF16_OUTPUT / 2 if kind == "bf16" else 0)
        if not tally.pooled <= limit:
            failed.append(f"{mode} on {isa}, {kind}: {tally.pooled:.1e} pooled, above {limit:.0e}")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run random cases and print the worst errors by mode and path; 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description="Random matrices through every kernel.")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    reason = missing()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2

    def show(done: int) -> None:
        if done % 1000 == 0:
            print(f"{done} cases", file=sys.stderr)

    found = run(random_cases(options.cases, options.seed), show)
    print("mode  path         type     cases  exact, pooled  exact, worst  rounded, worst")
    for (mode, isa, kind), tally in sorted(found.items()):
        print(
            f"{mode:5} {isa:12} {kind:7}  {tally.cases:5}  {tally.pooled:13.2e}"
            f"  {tally.worst_exact:12.2e}  {tally.worst_rounded:14.2e}"
        )
    failed = failures(found)
    for line in failed:
        print(f"FAILED {line}")
    print(f"{options.cases} cases, seed {options.seed}: {len(failed) or 'no'} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
