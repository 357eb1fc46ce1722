"""`linear`: checks what it is given, picks kernel and tiles, launches. Never measured on a GPU.

The tiles and the number of programs are reasoned, not tuned: every multiprocessor of an A100 or
H100 (108, 132) should find work, and a program should read whole cache lines of weights.
"""

from __future__ import annotations

# mypy: disable-error-code="import-untyped"
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from autocompress_kernels.triton_kernels.bitmask import gemm_bitmask, gemv_bitmask
from autocompress_kernels.triton_kernels.gemm import gemm_quantized, gemv_quantized
from autocompress_kernels.triton_kernels.layout import PLANES, SUPER, BitmaskWeight, QuantizedWeight

PROGRAMS = 256  # with fewer, the inputs are divided into parts
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Weight = QuantizedWeight | BitmaskWeight


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is launched with; `y` is (parts, m, rows)."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Tensor | int | None, ...]
    tiles: dict[str, int]
    y: Tensor


def linear(
    x: Tensor,  # (..., width), float32, bfloat16 or float16
    weight: Weight,
    bias: Tensor | None = None,  # (rows,), a type that x may have
) -> Tensor:  # (..., rows), type of x
    """`x @ weight.T + bias`, summed in float32; float32 x is multiplied in full float32.

    Raises:
        ValueError: shape, type or device of x or bias does not fit the weight, or no GPU.
    """
    check_inputs(x, weight, bias)
    flat = x.reshape(-1, weight.width).contiguous()
    if flat.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], weight.rows)
    work = plan(flat, weight, None if bias is None else bias.contiguous())
    return run(work).to(x.dtype).view(*x.shape[:-1], weight.rows)


def plan(
    x: Tensor,  # (m, width), contiguous, m at least 1
    weight: Weight,
    bias: Tensor | None = None,  # (rows,), contiguous
    programs: int = PROGRAMS,  # at least so many, if the inputs can be divided among them
) -> Launch:
    """The launch that computes `linear` of tensors that were checked."""
    m, n = x.shape[0], weight.rows
    tiles = tiles_of(weight, m)
    grid = grid_of(weight, m, tiles, programs)
    y = x.new_empty(grid[2], m, n, dtype=x.dtype if grid[2] == 1 else torch.float32)
    stored: tuple[Tensor | None, ...]
    if isinstance(weight, QuantizedWeight):
        kernel: Any = gemv_quantized if m == 1 else gemm_quantized
        stored = (weight.low, weight.high, weight.scales, weight.zeros)
        numbers: tuple[int, ...] = (weight.stride, weight.group)
    else:
        kernel = gemv_bitmask if m == 1 else gemm_bitmask
        stored = (weight.masks, weight.offsets, weight.values)
        numbers = (weight.masks.shape[1],)
    sizes = (n, weight.width) if m == 1 else (m, n, weight.width)
    return Launch(kernel, grid, (x, *stored, bias, y, *sizes, *numbers, grid[2]), tiles, y)


def run(work: Launch) -> Tensor:  # (m, rows), float32 where there were several parts
    """Launch, and add up the parts."""
    y = work.y
    with torch.cuda.device(y.device) if y.is_cuda else nullcontext():  # Triton takes the current
        work.kernel[work.grid](*work.arguments, **work.tiles)
    return y[0] if len(y) == 1 else y.sum(0)


def tiles_of(
    weight: Weight,
    m: int,  # rows of x, at least 1
) -> dict[str, int]:
    """Compile-time parameters of the kernel that `linear` launches."""
    tiles = {"BLOCK_N": 64, "BLOCK_S": 4 if m == 1 else 2}
    if m > 1:
        tiles["BLOCK_M"] = min(64, max(16, triton.next_power_of_2(m)))
    if isinstance(weight, QuantizedWeight):
        tiles["LOW"], tiles["HIGH"] = PLANES[weight.bits]
        if m > 1 and weight.group % 64 and weight.group < weight.width:
            tiles["BLOCK_S"] = 1  # two superblocks could be of two groups
    return tiles


def grid_of(
    weight: Weight,
    m: int,  # rows of x, at least 1
    tiles: dict[str, int],
    programs: int,
) -> tuple[int, int, int]:  # blocks of rows of x, blocks of outputs, parts of the inputs
    """Programs along every axis."""
    rows = triton.cdiv(m, tiles.get("BLOCK_M", 1))
    outputs = triton.cdiv(weight.rows, tiles["BLOCK_N"])
    steps = triton.cdiv(weight.width, SUPER * tiles["BLOCK_S"])
    return rows, outputs, min(steps, triton.cdiv(programs, rows * outputs))


def check_inputs(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    """Raise ValueError unless the kernels may read these tensors."""
    if x.ndim < 1 or x.shape[-1] != weight.width:
        raise ValueError(f"x must have shape (..., {weight.width}). Got {tuple(x.shape)}.")
    if x.dtype not in FLOATS:
        raise ValueError(f"x must be float32, bfloat16 or float16. Got {x.dtype}.")
    if isinstance(weight, BitmaskWeight) and x.dtype not in (torch.float32, weight.values.dtype):
        raise ValueError(f"x must be float32 or {weight.values.dtype} as values. Got {x.dtype}.")
    if bias is not None and (tuple(bias.shape) != (weight.rows,) or bias.dtype not in FLOATS):
        raise ValueError(
            f"bias must be float32, bfloat16 or float16 of shape {(weight.rows,)}. "
            f"Got {bias.dtype} of shape {tuple(bias.shape)}."
        )
    devices = {str(t.device) for t in (x, bias, *weight.tensors.values()) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"x, weight and bias must be on one device. Got {sorted(devices)}.")
    if interpreted():
        if x.dtype == torch.bfloat16 and x.numel() > weight.width:
            raise ValueError(
                "x must be float32 or float16 where it has several rows and Triton's interpreter "
                "runs, which cannot multiply bfloat16. Got bfloat16."
            )
    elif x.device.type != "cuda":
        raise ValueError(
            f"x must be on a CUDA device. Got {x.device}. Move x and weight there, or set "
            "TRITON_INTERPRET=1 before Triton is imported to run slowly on the CPU."
        )


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when the kernels were imported."""
    return not isinstance(gemv_quantized, triton.JITFunction)
