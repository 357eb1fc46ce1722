"""Checks every kernel against the reference, on a GPU or in the interpreter.

    python -m autocompress_kernels.triton_kernels.check
    TRITON_INTERPRET=1 python -m autocompress_kernels.triton_kernels.check

The first is the thing to run on a GPU before anything else: it never has been.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autocompress_kernels.triton_kernels import reference
from autocompress_kernels.triton_kernels.layout import BitmaskWeight, QuantizedWeight
from autocompress_kernels.triton_kernels.pack import pack_bitmask, pack_quantized

BITS = (2, 3, 4, 5, 6, 8)
ROWS_OF_X = (1, 5, 33)
SHAPES = ((70, 100), (1, 1), (17, 257), (130, 64), (33, 95))  # outputs, inputs
PROGRAMS = (1, 2, 256)  # the least: inputs in one part, in parts of several steps, of one step
GROUPS = (None, 32, 64, 96)
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Relative to the norm of the result. For the narrow types it is the rounding of the result alone,
# which the interpreter cuts off in bfloat16 where a GPU rounds to nearest.
TOLERANCES = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-11}


class Case(NamedTuple):
    """One product. `bits` is 16 for a bitmask, and then `density` is the share that is kept."""

    bits: int
    zeros: bool
    group: int | None
    shape: tuple[int, int]
    m: int
    dtype: str
    programs: int
    density: float = 1.0
    values: str = "bfloat16"

    def __str__(self) -> str:
        return "-".join(str(part) for part in self)


def cases() -> list[Case]:
    """Every bits x zeros x rows of x with one group and with several, the rest in turn."""
    found = []
    for i, (bits, zeros, m) in enumerate(product(BITS, (False, True), ROWS_OF_X)):
        for j in range(2):
            shape, group = SHAPES[(7 * i + 3 * j) % 5], GROUPS[j * (1 + (i + i // 3) % 3)]
            dtype, programs = (
                list(TYPES)[(i + i // 6 + j) % 3],
                PROGRAMS[(i // 3 + i // 9 + 2 * j) % 3],
            )
            found.append(Case(bits, zeros, group, shape, m, dtype, programs))
    for i, (m, values) in enumerate(product(ROWS_OF_X, ("bfloat16", "float16"))):
        for j, density in enumerate((0.0, 0.3, 0.6, 1.0)):
            dtype = values if (i + j) % 2 else "float32"
            shape, programs = SHAPES[(i + 2 * j) % 5], PROGRAMS[(i + j) % 3]
            found.append(Case(16, False, None, shape, m, dtype, programs, density, values))
    return found


def quantized(case: Case, generator: torch.Generator) -> tuple[QuantizedWeight, Tensor]:
    """A weight for the kernels, and the dense one in float64."""
    (rows, width), top = case.shape, 1 << case.bits
    groups = -(-width // (case.group or width))
    integers = partial(torch.randint, 0, top, dtype=torch.uint8, generator=generator)
    codes, zeros = integers((rows, width)), integers((rows, groups)) if case.zeros else None
    scales = (torch.rand(rows, groups, generator=generator) + 0.1).half()
    weight = pack_quantized(codes, scales, zeros, bits=case.bits, group=case.group)
    dense = reference.dequantize(codes, scales, zeros, bits=case.bits, group=case.group)
    return weight, dense


def sparse(case: Case, generator: torch.Generator) -> tuple[BitmaskWeight, Tensor]:
    """A sparse weight for the kernels, and the dense one."""
    kept = torch.rand(case.shape, generator=generator) < case.density
    dense = (torch.randn(case.shape, generator=generator) * kept).to(TYPES[case.values])
    weight = pack_bitmask(dense)
    assert weight.values.numel() == int((dense != 0).sum())
    return weight, dense


def relative_errors() -> dict[str, float]:
    """Case -> norm of the error over the norm of the result. In the interpreter, also bounds."""
    from autocompress_kernels.triton_kernels import interpreter, ops

    device = "cpu" if ops.interpreted() else "cuda"
    if device == "cpu":
        interpreter.widen_dot()
        allow = interpreter.watch_memory()
    errors = {}
    for seed, case in enumerate(cases()):
        generator = torch.Generator().manual_seed(seed)
        make: Any = sparse if case.bits == 16 else quantized
        weight, dense = make(case, generator)
        x = torch.randn(case.m, case.shape[1], generator=generator).to(TYPES[case.dtype])
        bias = torch.randn(case.shape[0], generator=generator) if seed % 2 else None
        there = None if bias is None else bias.to(device)
        work = ops.plan(x.to(device), weight.to(device), there, case.programs)
        work.y.fill_(float("nan"))  # an output that nothing writes shows
        if device == "cpu":
            allow([t for t in work.arguments if isinstance(t, Tensor)], work.y)
        y = ops.run(work).to(x.dtype).cpu()
        expected = reference.linear(x, dense, bias)
        assert y.shape == expected.shape, f"{tuple(y.shape)} is not {tuple(expected.shape)}"
        errors[str(case)] = float((y - expected).norm()) / max(float(expected.norm()), 1e-30)
    return errors


if __name__ == "__main__":
    found = relative_errors()
    print(json.dumps(found, indent=1))
    limits = {str(case): TOLERANCES[case.dtype] for case in cases()}
    sys.exit(not all(found[name] <= limit for name, limit in limits.items()))
