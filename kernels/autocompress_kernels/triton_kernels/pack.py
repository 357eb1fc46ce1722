"""From canonical tensors to the layout of the Triton kernels; `layout.py` describes it."""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress_kernels.triton_kernels.layout import (
    ALIGN,
    FLOATS,
    LANES,
    PLANES,
    SUPER,
    BitmaskWeight,
    QuantizedWeight,
    bit_counts,
    block_offsets,
    check_format,
    padded,
    superblocks,
)


def pack_quantized(
    codes: Tensor,  # (rows, width), uint8 in [0, 2**bits)
    scales: Tensor,  # (rows, groups), fp16
    zeros: Tensor | None = None,  # (rows, groups), uint8 in [0, 2**bits); None: 2**(bits - 1)
    *,
    bits: int,
    group: int | None = None,  # inputs per scale, a multiple of 32; None: one scale per row
) -> QuantizedWeight:
    """Canonical codes in the layout of the kernels, on the device of `codes`.

    Raises:
        ValueError: a shape, a type, a code or a zero is not as stated.
    """
    if codes.ndim != 2:
        raise ValueError(f"codes must have shape (rows, width). Got {tuple(codes.shape)}.")
    rows, width = codes.shape
    group = padded(max(width, 1), SUPER) if group is None else group
    check_format(rows, width, bits, group)
    groups = -(-width // group)
    check_codes("codes", codes, (rows, width), bits)
    if scales.dtype != torch.float16 or tuple(scales.shape) != (rows, groups):
        raise ValueError(
            f"scales must be torch.float16 of shape {(rows, groups)}. "
            f"Got {scales.dtype} of shape {tuple(scales.shape)}."
        )
    if zeros is not None:
        check_codes("zeros", zeros, (rows, groups), bits)
    low, high = PLANES[bits]
    return QuantizedWeight(
        rows,
        width,
        bits,
        group,
        low=pack_plane(codes & ((1 << low) - 1), low),
        scales=outputs_inside(scales, groups),
        high=pack_plane(codes >> low, high) if high else None,
        zeros=None if zeros is None else outputs_inside(zeros, groups),
    )


def pack_bitmask(
    weight: Tensor,  # (rows, width), bfloat16 or float16; exact zeros are left out
) -> BitmaskWeight:
    """The nonzero elements and a bit for each element, on the device of `weight`.

    Raises:
        ValueError: the weight is not 2-D, empty, or of another type.
    """
    if weight.ndim != 2 or weight.dtype not in FLOATS:
        raise ValueError(
            "weight must be bfloat16 or float16 of shape (rows, width). "
            f"Got {weight.dtype} of shape {tuple(weight.shape)}."
        )
    rows, width = weight.shape
    check_format(rows, width)
    blocks, columns = superblocks(width), padded(rows, LANES) // LANES
    whole = outputs_inside(weight, blocks * SUPER, LANES)  # (inputs, outputs)
    grid = whole.view(blocks, SUPER, columns, LANES)
    kept = grid != 0
    masks = torch.zeros(blocks, SUPER, columns, dtype=torch.int32, device=weight.device)
    for lane in range(LANES):
        masks |= kept[..., lane].to(torch.int32) << lane
    masks = masks.view(blocks * SUPER, columns)
    by_block = kept.transpose(1, 2)  # (superblocks, columns, inputs, outputs): the values' order
    values = grid.transpose(1, 2)[by_block].contiguous()
    offsets, _ = block_offsets(bit_counts(masks))
    return BitmaskWeight(rows, width, masks, offsets, values)


def pack_plane(
    codes: Tensor,  # (rows, width), uint8 in [0, 2**bits)
    bits: int,
) -> Tensor:  # (bits * superblocks, stride), int32
    """One plane of codes as words."""
    blocks, each = superblocks(codes.shape[1]), 32 // bits
    whole = outputs_inside(codes, blocks * SUPER).view(blocks * bits, each, -1)
    words = torch.zeros_like(whole[:, 0], dtype=torch.int32)
    for i in range(each):
        words |= whole[:, i].to(torch.int32) << (i * bits)
    return words


def outputs_inside(
    matrix: Tensor,  # (rows, columns)
    columns: int,  # at least those of `matrix`
    multiple: int = ALIGN,
) -> Tensor:  # (columns, rows rounded up to `multiple`), contiguous, padded with zeros
    """The transposed matrix, padded."""
    rows, width = matrix.shape
    whole = matrix.new_zeros(columns, padded(rows, multiple))
    whole[:width, :rows] = matrix.T
    return whole


def check_codes(name: str, codes: Tensor, shape: tuple[int, int], bits: int) -> None:
    """Raise ValueError unless `codes` is uint8 of this shape and below 2**bits."""
    if codes.dtype != torch.uint8 or tuple(codes.shape) != shape:
        raise ValueError(
            f"{name} must be torch.uint8 of shape {shape}. "
            f"Got {codes.dtype} of shape {tuple(codes.shape)}."
        )
    largest = int(codes.max())
    if largest >= 1 << bits:
        raise ValueError(f"{name} must be below {1 << bits} at {bits} bits. Got {largest}.")
