"""Random matrices through every kernel against float64.

    python -m autocompress_kernels.check --cases 10000 --seed 0

Errors are Frobenius norms over all outputs of a case, relative to
  pooled    the output in float64, over all cases of a mode, a path and a type: the norm of all
            errors by that of all outputs, each case scaled so that an output whose terms have
            random signs has norm 1. The limit of a mode holds for this;
  of y      the output of that single case. No limit: an output of few terms may cancel to nothing,
            and what rounding x has cost is large beside that;
  of terms  |x| |W|^T + |bias| of that single case, which cannot cancel. No limit: it says of a
            large `of y` whether the error was large or the output small;
  rounded   the output for activations as the mode rounds them, or where that cancels, what its
            terms give with random signs. No luck of rounding is in that, so the limit holds for
            every case: it finds a wrong tail that would drown in rounding.
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
DIGITS = (
    1e-4  # a16 of codes on AVX2: x in 2^-14ths of the largest of 64 inputs; bf16 itself is 2e-3
)
BLAS = 5e-3  # a16 with many rows: BLAS rounds weights and products to bf16
THIN = 1e-3  # a16 of sparse codes: offsets of dropped ones cancel, but few kept ones are small


@dataclass(frozen=True)
class Errors:
    """Frobenius norms of a case.

    Args:
        error: of the difference to the output in float64.
        output: of that output.
        usual: what it is for terms of those sizes with random signs.
        terms: of |x| |W|^T + |bias|.
        rounded: the error relative to the output of rounded activations.
    """

    error: float
    output: float
    usual: float
    terms: float
    rounded: float


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

    def errors(self) -> Errors:
        """Compute it, and what it should be."""
        dense, x = reference.weight(self.packed), self.x.double()
        bias = torch.zeros(len(dense)) if self.bias is None else self.bias.double()
        found = linear(self.x, self.packed, self.bias, self.mode).double()
        exact = reference.linear(self.x, self.packed, self.bias)
        rounded = reference.linear(self.x, self.packed, self.bias, self.mode)
        return Errors(
            error=float((found - exact).norm()),
            output=float(exact.norm()),
            usual=float((x.square() @ dense.square().T + bias.square()).sum().sqrt()),
            terms=float((x.abs() @ dense.abs().T + bias.abs()).norm()),
            rounded=reference.relative_error(found, rounded, self.x, dense),
        )

    def most(self) -> float:
        """The limit of the rounded error."""
        limit = rounded_limit(self.mode, self.isa)
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


def rounded_limit(mode: str, isa: str) -> float:
    """The limit of the rounded error of a mode on an instruction set."""
    return DIGITS if (mode, isa) == ("a16", "avx2") else ROUNDED[mode]


@dataclass
class Tally:
    """What was found for one mode on one instruction set, with one type of x and y."""

    cases: int = 0
    errors: float = 0.0  # sum of squares, each case scaled to usual outputs of norm 1
    outputs: float = 0.0  # as that
    of_output: float = 0.0  # the worst
    of_terms: float = 0.0
    rounded: float = 0.0
    failed: list[str] = field(default_factory=list)

    def add(self, case: Case) -> None:
        """Run a case."""
        found = case.errors()
        self.cases += 1
        usual = found.usual or 1.0
        self.errors += (found.error / usual) ** 2
        self.outputs += (found.output / usual) ** 2
        self.of_output = max(self.of_output, found.error / (found.output or 1.0))
        self.of_terms = max(self.of_terms, found.error / (found.terms or 1.0))
        self.rounded = max(self.rounded, found.rounded)
        if not found.rounded <= case.most():
            self.failed.append(
                f"{case}: rounded error {found.rounded:.1e}, above {case.most():.0e}"
            )

    @property
    def pooled(self) -> float:
        """Norm of all errors by that of all outputs."""
        return (self.errors / (self.outputs or 1.0)) ** 0.5


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
    print("mode  path         type     cases    pooled  of y, worst  of terms   rounded")
    for (mode, isa, kind), tally in sorted(found.items()):
        print(
            f"{mode:5} {isa:12} {kind:7}  {tally.cases:5}  {tally.pooled:8.2e}"
            f"  {tally.of_output:11.2e}  {tally.of_terms:8.2e}  {tally.rounded:8.2e}"
        )
    failed = failures(found)
    for line in failed:
        print(f"FAILED {line}")
    print(f"{options.cases} cases, seed {options.seed}: {len(failed) or 'no'} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
