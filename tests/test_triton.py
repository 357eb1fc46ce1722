"""Triton kernels: numbers in the interpreter, and compilation for GPUs that need not be there.

Triton decides whether to interpret when a kernel is defined. So the two halves run in processes of
their own: `python tests/test_triton.py interpret` and `... compile`, which print JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch

from autocompress_kernels.triton_kernels import check, missing, pack
from autocompress_kernels.triton_kernels.check import BITS, TOLERANCES, TYPES, Case, cases
from autocompress_kernels.triton_kernels.layout import (
    BitmaskWeight,
    QuantizedWeight,
    check_format,
)

needs_triton = pytest.mark.skipif(missing() is not None, reason=str(missing()))

TARGETS = (80, 90)  # compute capabilities: A100, H100
VARIANTS = (  # bits, rows of x, type of x
    *product((*BITS, 16), (1, 8), ("bfloat16",)),
    *product((3, 16), (64,), ("bfloat16",)),
    *product((5, 16), (1, 8), ("float32",)),
    *product((4,), (1, 8), ("float16",)),
)


def interpret() -> dict[str, Any]:
    """Relative error of every case, and what `linear` says to bad input."""
    from autocompress_kernels.triton_kernels import ops

    said = {"refused": refusals(ops), "shapes": shapes(ops)}
    return said | {"errors": check.relative_errors()}


def one_weight(values: torch.dtype = torch.float16) -> tuple[Any, Any]:
    """A quantized and a sparse weight of shape (3, 40)."""
    codes, scales = torch.ones(3, 40, dtype=torch.uint8), torch.ones(3, 1, dtype=torch.float16)
    return pack.pack_quantized(codes, scales, bits=4), pack.pack_bitmask(codes.to(values))


def refusals(ops: Any) -> dict[str, str]:
    """Name -> the message of the ValueError."""
    weight, mask = one_weight()
    calls = {
        "width": lambda: ops.linear(torch.ones(2, 41), weight),
        "scalar": lambda: ops.linear(torch.tensor(1.0), weight),
        "type": lambda: ops.linear(torch.ones(2, 40, dtype=torch.float64), weight),
        "bias": lambda: ops.linear(torch.ones(2, 40), weight, torch.ones(4)),
        "bias type": lambda: ops.linear(torch.ones(2, 40), weight, torch.ones(3).int()),
        "device": lambda: ops.linear(torch.ones(2, 40, device="meta"), weight),
        "values": lambda: ops.linear(torch.ones(1, 40).bfloat16(), mask),
        "interpreter": lambda: ops.linear(torch.ones(2, 40).bfloat16(), weight),
    }
    return {name: refusal(call) for name, call in calls.items()}


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "not refused"


def shapes(ops: Any) -> list[Any]:
    """What `linear` returns for x with several, one and no leading dimensions, strided or empty."""
    weight, _ = one_weight()
    strided = torch.arange(240.0).view(40, 6).T
    x = strided.contiguous()
    given = (x.view(2, 3, 40), strided, x[0], x[:0], x.view(2, 3, 40)[:, :0])
    results = [ops.linear(each, weight) for each in given]
    assert torch.equal(results[0].view(6, 3), results[1])
    return [list(result.shape) for result in results]


def compile_all() -> dict[str, Any]:
    """Name of each variant -> what came out; and what `linear` says without a GPU."""
    from autocompress_kernels.triton_kernels import aot, ops

    weight, _ = one_weight()
    refused = refusal(lambda: ops.linear(torch.ones(2, 40), weight))
    built = {}
    for i, (bits, m, dtype) in enumerate(VARIANTS):
        case = Case(bits, i % 2 == 0, (64, None, 32)[i % 3], (128, 256), m, dtype, 1, 0.5)
        made: Any = check.sparse if bits == 16 else check.quantized
        packed, _ = made(case, torch.Generator().manual_seed(i))
        bias = torch.zeros(128) if i % 2 else None
        work = ops.plan(torch.zeros(m, 256, dtype=TYPES[dtype]), packed, bias)
        for target in TARGETS:
            binary = aot.compile_launch(work, target)
            ptx = binary.asm["ptx"]
            built[f"{work.kernel.__name__} sm_{target} {case}"] = {
                "elf": binary.asm["cubin"][:4] == b"\x7fELF",
                "target": f".target sm_{target}" in ptx,
                "tensor cores": "mma.sync" in ptx or "wgmma" in ptx,
                "shared": binary.metadata.shared,  # bytes
            }
    return {"built": built, "refused": refused}


def run_apart(what: str, folder: Path, **environment: str) -> Any:
    """The JSON that this file prints when run with `what`, in a process with an empty cache."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(folder)
    run = subprocess.run(
        [sys.executable, __file__, what],
        env=inherited | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


# ---------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_apart("interpret", tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_apart("compile", tmp_path_factory.mktemp("triton"))


@needs_triton
@pytest.mark.parametrize("case", cases(), ids=str)
def test_equals_the_reference(case: Case, interpreted: Any) -> None:
    # NaN, from outputs that nothing wrote, is not below anything.
    assert interpreted["errors"][str(case)] <= TOLERANCES[case.dtype]


def test_the_grid_has_every_combination_that_matters() -> None:
    grid = cases()
    assert len({str(case) for case in grid}) == len(grid)
    fields = ("bits", "zeros", "group", "shape", "m", "dtype", "programs")
    full = [case for case in grid if case.bits < 16]
    some_group = {(c.bits, c.zeros, c.group is None, c.m == 1) for c in full}
    assert len(some_group) == len(BITS) * 8, "bits x zeros x group or none x one row or more"
    for one, two in combinations(fields, 2):
        pairs = {(getattr(c, one), getattr(c, two)) for c in full}
        every = [len({getattr(c, name) for c in full}) for name in (one, two)]
        assert len(pairs) == every[0] * every[1], (one, two)


@needs_triton
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("width", r"x must have shape \(\.\.\., 40\)\. Got \(2, 41\)"),
        ("scalar", r"x must have shape \(\.\.\., 40\)\. Got \(\)"),
        ("type", r"x must be float32, bfloat16 or float16\. Got torch\.float64"),
        ("bias", r"bias must be .* of shape \(3,\)\. Got torch\.float32 of shape \(4,\)"),
        ("bias type", r"bias must be float32, .* Got torch\.int32 of shape \(3,\)"),
        ("device", r"x, weight and bias must be on one device\. Got \['cpu', 'meta'\]"),
        ("values", r"x must be float32 or torch\.float16 as values\. Got torch\.bfloat16"),
        ("interpreter", r"x must be float32 or float16 where .* Got bfloat16"),
    ],
)
def test_linear_refuses(name: str, message: str, interpreted: Any) -> None:
    assert re.match(message, interpreted["refused"][name])


@needs_triton
def test_linear_keeps_leading_dimensions(interpreted: Any) -> None:
    assert interpreted["shapes"] == [[2, 3, 3], [6, 3], [3], [0, 3], [2, 0, 3]]


@needs_triton
def test_every_kernel_compiles_for_sm_80_and_sm_90(compiled: Any) -> None:
    built = compiled["built"]
    assert len(built) == len(TARGETS) * len(VARIANTS)
    for name, result in built.items():
        assert result["elf"], name
        assert result["target"], name
        if "gemm" in name and "float32" not in name:
            assert result["tensor cores"], name
        assert result["shared"] <= 48 * 1024, name  # what every block may have


@needs_triton
def test_without_a_gpu_linear_says_so(compiled: Any) -> None:
    assert compiled["refused"].startswith("x must be on a CUDA device. Got cpu.")


def test_importing_the_package_is_light() -> None:
    code = "import sys, autocompress_kernels.triton_kernels; "
    code += "print({'torch', 'triton'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stdout + run.stderr


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_those_of_the_codes(bits: int) -> None:
    codes, scales = torch.zeros(64, 256, dtype=torch.uint8), torch.ones(64, 4).half()
    weight = pack.pack_quantized(codes, scales, bits=bits, group=64)
    assert weight.bytes == 64 * 256 * bits // 8 + 64 * 4 * 2


def packed_as(bits: int = 4, group: int | None = None, **changed: Any) -> QuantizedWeight:
    """A weight of shape (3, 40) from canonical tensors, some of them changed."""
    canonical = {
        "codes": torch.ones(3, 40, dtype=torch.uint8),
        "scales": torch.ones(3, 1).half(),
        "zeros": torch.ones(3, 1, dtype=torch.uint8),
    }
    return pack.pack_quantized(**(canonical | changed), bits=bits, group=group)


def cut(name: str) -> object:
    """A stored weight with one tensor that lacks its end."""
    full, mask = packed_as(3), one_weight()[1]
    weight: Any = full if name in full.tensors else mask
    return replace(weight, **{name: weight.tensors[name][:-1]})


def moved_offsets() -> BitmaskWeight:
    mask = one_weight()[1]
    return replace(mask, offsets=mask.offsets + 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packed_as(7), r"bits must be one of \(2, 3, 4, 5, 6, 8\)\. Got 7"),
        (lambda: packed_as(group=48), r"group must be a multiple of 32, or None\. Got 48"),
        (lambda: packed_as(group=0), r"group must be a multiple of 32, or None\. Got 0"),
        (
            lambda: packed_as(codes=torch.ones(3, 40)),
            r"codes must be torch\.uint8 of shape \(3, 40",
        ),
        (
            lambda: packed_as(codes=torch.ones(40)),
            r"codes must have shape \(rows, width\)\. Got \(40",
        ),
        (lambda: packed_as(codes=torch.ones(0, 40).byte()), r"at least 1 .* Got 0 and 40"),
        (
            lambda: packed_as(codes=torch.ones(3, 40).byte() * 16),
            r"codes must be below 16 .* Got 16",
        ),
        (
            lambda: packed_as(zeros=torch.ones(3, 1).byte() * 99),
            r"zeros must be below 16 .* Got 99",
        ),
        (
            lambda: packed_as(zeros=torch.ones(3, 2).byte()),
            r"zeros must be .* \(3, 1\)\. Got .* \(3, 2",
        ),
        (lambda: packed_as(scales=torch.ones(3, 1)), r"scales must be torch\.float16 .*float32"),
        (lambda: packed_as(scales=torch.ones(3, 2).half()), r"scales must be .* Got .* \(3, 2\)"),
        (
            lambda: pack.pack_bitmask(torch.ones(3, 40)),
            r"weight must be bfloat16 .* Got torch.float32",
        ),
        (
            lambda: check_format(1 << 20, 1 << 12),
            r"product at most 2147483647\. Got 1048576 and 4096",
        ),
        (
            lambda: replace(packed_as(4), bits=3),
            r"low must be contiguous torch.int32 of shape \(4, 16",
        ),
        (lambda: replace(packed_as(3), high=None), r"high must be there .* Got none at 3"),
        (lambda: replace(packed_as(), scales=torch.ones(1, 32).half()[:, ::2]), r"Got strided"),
        (
            lambda: replace(packed_as(), zeros=torch.empty(1, 16, device="meta").byte()),
            r"one device",
        ),
        *((partial(cut, name), rf"{name} must") for name in ("low", "high", "scales", "zeros")),
        *((partial(cut, name), rf"{name} must") for name in ("masks", "offsets", "values")),
        (moved_offsets, r"offsets must count the bits of masks"),
    ],
)
def test_bad_weights_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_all}[sys.argv[1]]()))
