"""A few outliers beside the codes of all weights.

`outliers` are bf16 values, row by row, `places` the input of each in its stretch of 255 inputs,
`counts` how many each stretch of each row has. bf16 is what dense weights ship in and what the
sparse kernels read; it is within 0.4 % of any weight. An outlier's code is its group's zero, so a
product may simply add both parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.errors import DatabaseError
from autocompress.levels import Joint, Outliers, Shape
from autocompress.levels.prune import STRETCH
from autocompress.packed.quantized import dequantize, quantized_tensors, spread
from autocompress.packed.stored import Packed, Sizes, Tensors


def outlier_shapes(level: Outliers, shape: Shape) -> Sizes:
    """The tensors beside the codes."""
    count = level.count(shape)
    return {
        "outliers": (torch.bfloat16, (count,)),
        "places": (torch.uint8, (count,)),
        "counts": (torch.uint8, (shape[0], level.stretches(shape[1]))),
    }


def pack_outliers(
    level: Joint,
    codes: Tensor,  # (out, in), integers
    scales: Tensor,  # (out, groups)
    zeros: Tensor,  # (out, groups); ignored if symmetric
    weight: Tensor,  # (out, in): the values of outliers
    chosen: Tensor,  # (out, in), bool, as many as the level has
) -> Packed:
    """Outliers and codes of one weight."""
    shape, quantize = (codes.shape[0], codes.shape[1]), level.quantize
    assert quantize is not None and level.outliers is not None
    stretches = level.outliers.stretches(shape[1])
    padded = torch.nn.functional.pad(chosen, (0, stretches * STRETCH - shape[1]))
    middle = torch.full_like(zeros, 1 << (quantize.bits - 1)) if quantize.symmetric else zeros
    codes = torch.where(chosen, spread(middle, quantize, shape[1]).to(codes.dtype), codes)
    tensors = {
        "outliers": weight[chosen].to(torch.bfloat16),
        "places": (chosen.nonzero()[:, 1] % STRETCH).to(torch.uint8),
        "counts": padded.view(shape[0], stretches, STRETCH).sum(2).to(torch.uint8),
        **quantized_tensors(quantize, codes, scales, zeros),
    }
    return Packed(level, shape, tensors)


def placed_outliers(
    shape: Shape, tensors: Tensors
) -> tuple[Tensor, Tensor, Tensor]:  # each (outliers,)
    """Rows and columns, int64, and values, bf16; none where nothing was read yet.

    Raises:
        DatabaseError: they are damaged: there are more places than values, or one is outside.
    """
    counts, places = (tensors[name].to(torch.int64) for name in ("counts", "places"))
    stretches = torch.arange(counts.numel(), device=counts.device)
    within = stretches.repeat_interleave(counts.flatten())
    found, most, each = len(within), len(places), counts.shape[1]
    columns = within[:most] % each * STRETCH + places[:found]
    highest = int(columns.max()) if found else 0
    if found > most or highest >= shape[1]:
        raise DatabaseError(
            f"{most} outliers must lie in {shape[0]} x {shape[1]} weights. Got {found} up to "
            f"column {highest}. The file is damaged: write it again."
        )
    return within // each, columns, tensors["outliers"][:found]


def outlier_dense(level: Joint, shape: Shape, tensors: Tensors) -> Tensor:  # (out, in), float32
    """The outliers in their places, codes elsewhere."""
    assert level.quantize is not None
    dense = dequantize(level.quantize, shape, tensors)
    rows, columns, values = placed_outliers(shape, tensors)
    dense[rows, columns] = values.float()
    return dense
