"""Sparse weights: `mask` says which weights are kept, `values` or `codes` hold those, row by row.

The mask is a bit stream: one bit per weight, or for n:m one number per group of m inputs, the
place of its kept inputs among all combinations in lexicographic order: of 2:4, 0 is inputs 0 and
1, 5 is inputs 2 and 3.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations

import torch
from torch import Tensor

from autocompress.errors import DatabaseError
from autocompress.levels import Joint, Prune, Quantize, Shape, packed_bytes
from autocompress.packed.bits import pack, unpack
from autocompress.packed.quantized import (
    dequantize,
    quantized_shapes,
    quantized_tensors,
    spread,
    stored_zeros,
)
from autocompress.packed.stored import Packed, Sizes, Tensors


def sparse_shapes(level: Prune, shape: Shape) -> Sizes:
    """Tensors of bf16 values behind a mask."""
    kept = level.kept(shape)
    return mask_shape(level, shape) | {"values": (torch.bfloat16, (kept,))}


def mask_shape(level: Prune, shape: Shape) -> Sizes:
    """The mask alone."""
    size = packed_bytes(shape[0] * shape[1] // (level.of or 1), level.index_bits)
    return {"mask": (torch.uint8, (size,))}


def sparse_code_shapes(level: Prune, codes: Quantize, shape: Shape) -> Sizes:
    """Tensors of codes behind a mask."""
    return mask_shape(level, shape) | quantized_shapes(codes, shape, level.kept(shape))


@cache
def _combinations(kept: int, of: int) -> Tensor:  # (combinations, of), bool
    """Every way to keep `kept` of `of`, in lexicographic order of the kept places."""
    ways = list(combinations(range(of), kept))
    table = torch.zeros(len(ways), of, dtype=torch.bool)
    for number, places in enumerate(ways):
        table[number, list(places)] = True
    return table


def pack_mask(level: Prune, keep: Tensor) -> Tensor:  # keep: (out, in), bool
    """The mask as a bit stream."""
    if level.of is None:
        return pack(keep, 1)
    weights = 1 << torch.arange(level.of)
    ways = _combinations(level.kept_of, level.of)
    number = torch.zeros(1 << level.of, dtype=torch.int64)
    number[(ways * weights).sum(1)] = torch.arange(len(ways))
    return pack(number[(keep.view(-1, level.of) * weights).sum(1)], level.index_bits)


def unpack_mask(level: Prune, shape: Shape, stream: Tensor) -> Tensor:  # (out, in), bool
    """Which weights are kept; fewer than the level keeps only where nothing was read yet.

    Raises:
        DatabaseError: the mask is damaged: it keeps more, or names no combination.
    """
    count, most = shape[0] * shape[1], level.kept(shape)
    if level.of is None:
        keep = unpack(stream, 1, count).view(torch.bool).view(shape)
        if (found := int(keep.sum())) > most:
            raise _damaged(level, f"at most {most} weights", f"{found}")
        return keep
    numbers = unpack(stream, level.index_bits, count // level.of)
    ways = _combinations(level.kept_of, level.of).to(stream.device)
    if (highest := int(numbers.max())) >= len(ways):
        raise _damaged(level, f"one of {len(ways)} combinations", f"number {highest}")
    return ways[numbers.int()].view(shape)


def _damaged(level: Prune, must: str, got: str) -> DatabaseError:
    return DatabaseError(
        f"a mask of {level} must keep {must}. Got {got}. The file is damaged: write it again."
    )


def pack_sparse(
    level: Prune,
    weight: Tensor,  # (out, in)
    keep: Tensor,  # (out, in), bool, as many as the level keeps
) -> Packed:
    """bf16 values of the kept weights."""
    tensors = {"mask": pack_mask(level, keep), "values": weight[keep].to(torch.bfloat16)}
    return Packed(level, (weight.shape[0], weight.shape[1]), tensors)


def sparse_dense(level: Prune, shape: Shape, tensors: Tensors) -> Tensor:  # (out, in), float32
    """The kept values in their places, zeros elsewhere."""
    keep = unpack_mask(level, shape, tensors["mask"])
    dense = torch.zeros(shape, device=keep.device)
    return dense.masked_scatter_(keep, tensors["values"].float())


def pack_sparse_codes(
    level: Joint,
    codes: Tensor,  # (out, in), integers
    scales: Tensor,  # (out, groups)
    zeros: Tensor,  # (out, groups); ignored if symmetric
    keep: Tensor,  # (out, in), bool
) -> Packed:
    """Codes of the kept weights of a sparse and quantized level."""
    prune, quantize = level.prune, level.quantize
    assert prune is not None and quantize is not None
    tensors = quantized_tensors(quantize, codes[keep], scales, zeros)
    shape = (codes.shape[0], codes.shape[1])
    return Packed(level, shape, {"mask": pack_mask(prune, keep), **tensors})


def full_codes(level: Joint, shape: Shape, tensors: Tensors) -> Tensor:  # (out, in), uint8
    """Codes of all weights: a dropped one has its group's zero, which stands for exactly 0."""
    prune, quantize = level.prune, level.quantize
    assert prune is not None and quantize is not None
    keep = unpack_mask(prune, shape, tensors["mask"])
    codes = spread(stored_zeros(quantize, shape, tensors), quantize, shape[1]).clone()
    kept = unpack(tensors["codes"], quantize.bits, prune.kept(shape))
    return codes.masked_scatter_(keep, kept)


def sparse_code_dense(level: Joint, shape: Shape, tensors: Tensors) -> Tensor:
    """`scale * (code - zero)` of the kept weights, zeros elsewhere; (out, in), float32."""
    assert level.quantize is not None
    return dequantize(level.quantize, shape, tensors, full_codes(level, shape, tensors))
