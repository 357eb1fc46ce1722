"""What the kernels compute, in plain torch: slow, exact, and shared with nothing but the layout."""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress_kernels.formats import SUPER, TILE, Packed
from autocompress_kernels.pack import rows_of_blocks, unpack_codes


def weight(packed: Packed, dtype: torch.dtype = torch.float64) -> Tensor:  # (rows, width)
    """The dense weight: `scale * (code - zero)`, or the bf16 values; dropped elements are zero."""
    format = packed.format
    if format.pattern != "full":
        return _sparse(packed, dtype)
    if format.bits == 16:
        blocks = packed.tensors["values"].view(torch.bfloat16).view(format.tiles, -1, 16, 2 * TILE)
        return rows_of_blocks(blocks, format).to(dtype)
    codes, scales, zeros = unpack_codes(packed)
    middle = 1 << (format.bits - 1)
    centred = codes.to(dtype) - (middle if zeros is None else _spread(zeros.to(dtype), packed))
    return centred * _spread(scales.to(dtype), packed)


def _spread(grid: Tensor, packed: Packed) -> Tensor:  # (rows, width)
    """One number per group as one per input."""
    format = packed.format
    return grid.repeat_interleave(format.inputs, 1)[:, : format.width]


def _sparse(packed: Packed, dtype: torch.dtype) -> Tensor:  # (rows, width)
    format, tensors = packed.format, packed.tensors
    size = 64 if format.bits == 8 else 32  # elements of a block, one mask bit each
    places = torch.arange(8, dtype=torch.uint8)
    masks = (tensors["masks"].unsqueeze(1) >> places & 1).bool()  # little-endian bits
    elements = tensors["values"] if format.bits == 8 else tensors["values"].view(torch.bfloat16)
    kept = masks.view(format.tiles, -1)
    if "offsets" in tensors:
        starts = tensors["offsets"][:-1]
    else:
        starts = torch.arange(format.tiles) * (TILE * format.padded_width // 2)
    index = (kept.cumsum(1) - 1).clamp_min(0) + starts.unsqueeze(1)
    found = elements[index].to(dtype)
    blocks = torch.where(kept, found - 128 if format.bits == 8 else found, 0)
    dense = rows_of_blocks(blocks.view(format.tiles, -1, TILE * SUPER // size, size), format)
    if format.bits == 16:
        return dense
    scales = tensors["scales"].transpose(1, 2).reshape(-1, format.groups)[: format.rows]
    return dense * _spread(scales.to(dtype), packed)


def activations(x: Tensor, packed: Packed, mode: str) -> Tensor:  # (..., width), float64
    """Activations as a mode rounds them.

    Args:
        x: (..., width), float32 or bf16.
        packed: the weight they meet; bf16 weights take bf16 activations in mode 'a8'.
        mode: 'a8', 'a16' or 'a32'.
    """
    format = packed.format
    if mode == "a32":
        return x.double()
    if mode == "a16" or format.bits == 16:
        return x.to(torch.bfloat16).double()
    padded = torch.nn.functional.pad(x.float(), (0, -format.width % format.segment))
    parts = padded.unflatten(-1, (-1, format.segment))
    largest = parts.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0)
    rounded = (parts * inverse).round() * (largest.double() / 127)
    return rounded.flatten(-2)[..., : format.width]


def linear(
    x: Tensor,  # (..., width), float32 or bf16
    packed: Packed,
    bias: Tensor | None = None,  # (rows,)
    mode: str = "a32",
) -> Tensor:  # (..., rows), float64
    """`x W^T + bias` in float64 from activations as `mode` rounds them."""
    product = activations(x, packed, mode) @ weight(packed).T
    return product if bias is None else product + bias.double()


def relative_error(
    found: Tensor,  # (..., rows)
    exact: Tensor,  # (..., rows), float64
    x: Tensor,  # (..., width)
    dense: Tensor,  # (rows, width), float64
) -> float:
    """Frobenius norm of the error, relative to that of the product.

    Few products may cancel to nothing, which says nothing about a kernel: the norm is then taken
    to be what terms of those sizes with random signs give.
    """
    if not exact.numel():
        return 0.0
    usual = float((x.double().square() @ dense.square().T).sum().sqrt())
    size = max(float(exact.norm()), usual)
    error = float((found.double() - exact).norm())
    return error / size if size > 0 else error
