"""Your own operator: how a weight is rounded to a level, in place of GPTQ.

    python examples/own_operator.py

This one rounds to nearest on the grid between each group's extremes. Its level database names it,
so that it is never mixed with another operator's.
"""

import torch

import autocompress
from autocompress.levels import Quantize
from autocompress.operators.measure import Measure
from autocompress.packed import pack_quantized


def rounded(weight, level):  # (out, in) float32
    """Scale, zero and codes of every group of every row."""
    size = level.group_size or weight.shape[1]
    groups = weight.split(size, 1)
    low = torch.stack([it.amin(1).clamp_max(0) for it in groups], 1)
    high = torch.stack([it.amax(1).clamp_min(0) for it in groups], 1)
    scales = ((high - low) / (2**level.bits - 1)).clamp_min(1e-6).half()
    zeros = (-low / scales).round().clamp(0, 2**level.bits - 1)
    wide = [it.repeat_interleave(size, 1)[:, : weight.shape[1]] for it in (scales.float(), zeros)]
    codes = (weight / wide[0] + wide[1]).round().clamp(0, 2**level.bits - 1)
    return pack_quantized(level, codes.byte(), scales, zeros.byte())


@autocompress.operator(Quantize)
def nearest(weights, statistics, levels, solver):
    """Every weight at every level, for asymmetric levels."""
    measure = Measure.of(statistics, solver)
    return [[measure(w, rounded(w, lv)) for lv in levels] for w in weights]


if __name__ == "__main__":
    print(autocompress.search("4.5bits", run="results/nearest.run", out="results/nearest").results)
