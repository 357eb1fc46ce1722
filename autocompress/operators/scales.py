"""Group scales and zeros: from minimum and maximum, or searched for the least weighted error."""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.levels import Quantize

# Both ends of a group's range shrink together by these factors. 23 steps of 0.025 down to 0.45:
# at 2 bits the best factor is often near 0.6, at 6 bits it is above 0.9.
SHRINK = tuple(1.0 - 0.025 * step for step in range(23))
CHUNK = 1 << 16  # elements per chunk: the working set stays in the L2 cache
SMALLEST = 2.0**-24  # the smallest positive fp16
LARGEST = {11: 65504.0, 8: 65280.0}  # by significant bits: wider groups are clipped, not infinite


def group_scales(
    weight: Tensor,  # (rows, in), float32
    importance: Tensor,  # (in,), float32, the Hessian's diagonal
    level: Quantize,
    search: bool,
    bits: int = 11,  # significant bits of scales: 8 are exact in bf16, too
) -> tuple[Tensor, Tensor]:  # scales, zeros: (rows, groups), float32 holding fp16 and integers
    """Scale and zero of every group, exactly as they will be stored."""
    rows, width = weight.shape
    size = level.group_size or width
    groups = level.groups(width)
    padding = groups * size - width
    # Padding repeats nothing: weight 0 lies in every range, and importance 0 adds no error.
    tiles = torch.nn.functional.pad(weight, (0, padding)).view(rows, groups, size)
    weights = torch.nn.functional.pad(importance, (0, padding)).view(groups, size)
    scales = torch.empty(rows, groups)
    zeros = torch.empty(rows, groups)
    step = max(1, CHUNK // (groups * size))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        scales[part], zeros[part] = _search(tiles[part], weights, level, search, bits)
    return scales, zeros


def _grid(low: Tensor, high: Tensor, level: Quantize, bits: int) -> tuple[Tensor, Tensor]:
    """Stored scale and zero of the range [low, high], both ends included."""
    top = (1 << level.bits) - 1
    if level.symmetric:
        half = 1 << (level.bits - 1)
        # The code range is -half ... half-1. The end with the larger magnitude gets `half` if it
        # is negative, `half - 1` if positive.
        scale = torch.maximum(-low / half, high / (half - 1 if half > 1 else 1))
        zero = torch.full_like(scale, half)
    else:
        scale = (high - low) / top
        zero = torch.zeros_like(scale)
    scale = scale.clamp(SMALLEST, LARGEST[bits]).half().float()
    if bits == 8:  # of an fp16's: what bf16 rounds it to is an fp16 again
        scale = scale.bfloat16().float()
    if not level.symmetric:
        zero = (-low / scale).round_().clamp_(0, top)
    return scale, zero


def _search(
    tile: Tensor,  # (rows, groups, size)
    importance: Tensor,  # (groups, size)
    level: Quantize,
    search: bool,
    bits: int,
) -> tuple[Tensor, Tensor]:  # (rows, groups) each
    low = tile.amin(2).clamp_max(0)
    high = tile.amax(2).clamp_min(0)
    best_scale, best_zero = _grid(low, high, level, bits)
    if not search:
        return best_scale, best_zero
    top = (1 << level.bits) - 1
    best = torch.full_like(low, torch.inf)
    for factor in SHRINK:
        scale, zero = _grid(low * factor, high * factor, level, bits)
        shift = zero.unsqueeze(2)
        code = torch.addcmul(shift, tile, (1 / scale).unsqueeze(2)).round_().clamp_(0, top)
        gap = code.sub_(shift).mul_(scale.unsqueeze(2)).sub_(tile)
        error = gap.square_().mul_(importance).sum(2)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero
