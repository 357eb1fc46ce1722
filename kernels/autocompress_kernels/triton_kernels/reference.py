"""What the kernels must compute, in float64 and from canonical tensors: it knows no layout."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize(
    codes: Tensor,  # (rows, width), uint8
    scales: Tensor,  # (rows, groups), fp16
    zeros: Tensor | None = None,  # (rows, groups), uint8; None: 2**(bits - 1)
    *,
    bits: int,
    group: int | None = None,  # inputs per scale; None: one scale per row
) -> Tensor:  # (rows, width), float64
    """`scale * (code - zero)`; the last group may be shorter."""
    width = codes.shape[1]
    index = torch.arange(width, device=codes.device) // (group or width)
    centre = torch.full_like(scales, 1 << (bits - 1)) if zeros is None else zeros
    return (codes.double() - centre.double()[:, index]) * scales.double()[:, index]


def linear(
    x: Tensor,  # (..., width), as the kernel gets it
    weight: Tensor,  # (rows, width), any float type
    bias: Tensor | None = None,  # (rows,)
) -> Tensor:  # (..., rows), float64
    """`x @ weight.T + bias` without any rounding to a narrower type."""
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()
