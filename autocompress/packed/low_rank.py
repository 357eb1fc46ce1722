"""Low-rank weights: `left` (out, rank) and `right` (rank, in) in bf16, or the tensors of both
factors quantized, named `left_codes` and so on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.levels import LowRank, Shape
from autocompress.packed.quantized import dequantize, quantized_shapes
from autocompress.packed.stored import Packed, Sizes, Tensors

SIDES = ("left", "right")


def low_rank_shapes(level: LowRank, shape: Shape) -> Sizes:
    """Tensors of both factors."""
    factors = level.factor_shapes(shape)
    if level.factors is None:
        return {side: (torch.bfloat16, size) for side, size in zip(SIDES, factors, strict=True)}
    return {
        f"{side}_{name}": entry
        for side, size in zip(SIDES, factors, strict=True)
        for name, entry in quantized_shapes(level.factors, size).items()
    }


def factor_tensors(level: LowRank, left: Packed, right: Packed) -> dict[str, Tensor]:
    """Both factors in their stored form, dense or quantized."""
    sides = dict(zip(SIDES, (left, right), strict=True))
    if level.factors is None:
        return {side: packed.tensors["weight"] for side, packed in sides.items()}
    return {
        f"{side}_{name}": tensor
        for side, packed in sides.items()
        for name, tensor in packed.tensors.items()
    }


def factors(level: LowRank, shape: Shape, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """left (out, rank) and right (rank, in), float32."""
    if level.factors is None:
        return tensors["left"].float(), tensors["right"].float()
    left, right = (
        dequantize(level.factors, size, side_tensors(side, tensors))
        for side, size in zip(SIDES, level.factor_shapes(shape), strict=True)
    )
    return left, right


def side_tensors(side: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of one quantized factor, by their own names."""
    start = f"{side}_"
    return {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}


def low_rank_dense(level: LowRank, shape: Shape, tensors: Tensors) -> Tensor:  # (out, in), float32
    """The product of the factors."""
    left, right = factors(level, shape, tensors)
    return left @ right
