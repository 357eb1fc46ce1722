"""Quantized weights: `codes` and `zeros` as bit streams, `scales` in fp16.

Codes run row by row; scales and zeros are (out, groups). Symmetric levels store no zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.levels import Quantize, Shape, packed_bytes
from autocompress.packed.bits import pack, unpack
from autocompress.packed.stored import Packed, Sizes, Tensors


def quantized_shapes(level: Quantize, shape: Shape, count: int | None = None) -> Sizes:
    """Tensors of a weight with `count` codes; None is one for each weight."""
    rows, width = shape
    groups = level.groups(width)
    codes = rows * width if count is None else count
    shapes: Sizes = {
        "codes": (torch.uint8, (packed_bytes(codes, level.bits),)),
        "scales": (torch.float16, (rows, groups)),
    }
    if not level.symmetric:
        shapes["zeros"] = (torch.uint8, (packed_bytes(rows * groups, level.bits),))
    return shapes


def quantized_tensors(
    level: Quantize,
    codes: Tensor,  # any shape, integers in [0, 2**bits)
    scales: Tensor,  # (out, groups), fp16
    zeros: Tensor,  # (out, groups), integers in [0, 2**bits); ignored if symmetric
) -> dict[str, Tensor]:
    """Codes, scales and zeros in their stored form."""
    tensors = {"codes": pack(codes, level.bits), "scales": scales.to(torch.float16).contiguous()}
    if not level.symmetric:
        tensors["zeros"] = pack(zeros, level.bits)
    return tensors


def pack_quantized(level: Quantize, codes: Tensor, scales: Tensor, zeros: Tensor) -> Packed:
    """A weight with (out, in) codes; scales and zeros as `quantized_tensors` takes them."""
    shape = (codes.shape[0], codes.shape[1])
    return Packed(level, shape, quantized_tensors(level, codes, scales, zeros))


def stored_codes(level: Quantize, shape: Shape, tensors: Tensors) -> Tensor:  # (out, in), uint8
    """The codes of all weights."""
    rows, width = shape
    return unpack(tensors["codes"], level.bits, rows * width).view(rows, width)


def stored_zeros(level: Quantize, shape: Shape, tensors: Tensors) -> Tensor:
    """The zero of every group, (out, groups), uint8; symmetric levels' are all the same."""
    rows, groups = shape[0], level.groups(shape[1])
    if level.symmetric:
        return torch.full((rows, groups), 1 << (level.bits - 1), dtype=torch.uint8)
    return unpack(tensors["zeros"], level.bits, rows * groups).view(rows, groups)


def spread(grid: Tensor, level: Quantize, width: int) -> Tensor:  # (out, in)
    """A number per group, (out, groups), as one per weight."""
    size = level.group_size or width
    if width % size == 0:
        return grid.unsqueeze(2).expand(-1, -1, size).reshape(grid.shape[0], width)
    return grid[:, torch.arange(width, device=grid.device) // size]


def dequantize(
    level: Quantize, shape: Shape, tensors: Tensors, codes: Tensor | None = None
) -> Tensor:  # (out, in), float32
    """`scale * (code - zero)` in float32; groups run along the inputs, the last may be shorter.

    Args:
        codes: (out, in) in place of the stored ones.
    """
    rows, width = shape
    groups = level.groups(width)
    if codes is None:
        codes = stored_codes(level, shape, tensors)
    scales = tensors["scales"].float()
    zeros = stored_zeros(level, shape, tensors).to(scales.device).float()
    size = level.group_size or width
    if width % size == 0:
        centred = codes.view(rows, groups, size) - zeros.unsqueeze(2)
        return (centred * scales.unsqueeze(2)).view(rows, width)
    return (codes - spread(zeros, level, width)) * spread(scales, level, width)
