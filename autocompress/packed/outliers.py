"""A few outliers beside the codes of all weights.

`outliers` are bf16 values, row by row, `columns` the input of each, `counts` how many each row
has. bf16 is what dense weights ship in and what the sparse kernels read; it is within 0.4 % of
any weight. An outlier's code is its group's zero, so a product may simply add both parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.levels import Joint, Outliers, Shape
from autocompress.packed.quantized import dequantize, quantized_tensors, spread
from autocompress.packed.stored import Packed, Sizes, Tensors


def outlier_shapes(level: Outliers, shape: Shape) -> Sizes:
    """The tensors beside the codes."""
    count = level.count(shape)
    return {
        "outliers": (torch.bfloat16, (count,)),
        "columns": (torch.uint16, (count,)),
        "counts": (torch.uint16, (shape[0],)),
    }


def pack_outliers(
    level: Joint,
    codes: Tensor,  # (out, in), integers
    scales: Tensor,  # (out, groups)
    zeros: Tensor,  # (out, groups)
    weight: Tensor,  # (out, in): the values of outliers
    chosen: Tensor,  # (out, in), bool, as many as the level has
) -> Packed:
    """Outliers and codes of one weight."""
    shape, quantize = (codes.shape[0], codes.shape[1]), level.quantize
    assert quantize is not None
    codes = torch.where(chosen, spread(zeros, quantize, shape[1]).to(codes.dtype), codes)
    tensors = {
        "outliers": weight[chosen].to(torch.bfloat16),
        "columns": chosen.nonzero()[:, 1].to(torch.uint16),
        "counts": chosen.sum(1).to(torch.uint16),
        **quantized_tensors(quantize, codes, scales, zeros),
    }
    return Packed(level, shape, tensors)


def outlier_places(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Row and column of every outlier, int64."""
    counts = tensors["counts"].to(torch.int64)
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return rows, tensors["columns"].to(torch.int64)


def outlier_dense(level: Joint, shape: Shape, tensors: Tensors) -> Tensor:  # (out, in), float32
    """The outliers in their places, codes elsewhere."""
    assert level.quantize is not None
    dense = dequantize(level.quantize, shape, tensors)
    dense[outlier_places(tensors)] = tensors["outliers"].float()
    return dense
