"""Packed weights: what files hold, and the dense weight it stands for.

Files hold exactly `level.storage_bits(shape)` bits per weight. Each kind of level has a file here;
`tensor_shapes` and `dense_weight` find it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.errors import DatabaseError
from autocompress.levels import (
    Dense,
    Drop,
    GgufType,
    Joint,
    Level,
    LowRank,
    Prune,
    Quantize,
    Rows,
    Shape,
    Unread,
    Width,
)
from autocompress.packed.bits import pack, unpack
from autocompress.packed.gguf import gguf_dense, gguf_shapes
from autocompress.packed.low_rank import low_rank_dense, low_rank_shapes
from autocompress.packed.narrow import widened
from autocompress.packed.outliers import outlier_dense, outlier_shapes
from autocompress.packed.quantized import dequantize, pack_quantized, quantized_shapes
from autocompress.packed.sparse import (
    sparse_code_dense,
    sparse_code_shapes,
    sparse_dense,
    sparse_shapes,
)
from autocompress.packed.stored import Packed, Sizes, Tensors

__all__ = [
    "Packed",
    "Sizes",
    "Tensors",
    "dense_weight",
    "dequantize",
    "pack",
    "pack_quantized",
    "tensor_shapes",
    "unpack",
]


def tensor_shapes(level: Level, shape: Shape) -> Sizes:
    """Name -> (dtype, shape) of the tensors that store a `shape` weight at `level`.

    Raises:
        LevelError: no weight of this shape can be at this level.
        DatabaseError: the level has no stored form.
    """
    match level:
        case Dense():
            return {"weight": (torch.bfloat16, shape)}
        case Drop() | Unread():
            return {}
        case Width() | Rows():
            return tensor_shapes(level.inner, level.inner_shape(shape))
        case Quantize():
            return quantized_shapes(level, shape)
        case Prune():
            return sparse_shapes(level, shape)
        case LowRank():
            return low_rank_shapes(level, shape)
        case GgufType():
            return gguf_shapes(level, shape)
        case Joint(low_rank=LowRank() as added, base=base):
            return low_rank_shapes(added, shape) | tensor_shapes(base, shape)
        case Joint(prune=Prune() as prune, quantize=Quantize() as codes):
            return sparse_code_shapes(prune, codes, shape)
        case Joint(outliers=outliers, quantize=Quantize() as codes) if outliers is not None:
            return outlier_shapes(outliers, shape) | quantized_shapes(codes, shape)
    raise _no_form(level)


def dense_weight(
    level: Level, shape: Shape, tensors: Tensors, kept: Tensor | None = None
) -> Tensor:  # (out, in), float32
    """The weight that the tensors of a level stand for.

    Args:
        kept: as `Packed` has it.

    Raises:
        DatabaseError: the level has no stored form.
    """
    match level:
        case Dense():
            return tensors["weight"].float()
        case Drop() | Unread():
            return torch.zeros(shape)
        case Width() | Rows():
            inner = dense_weight(level.inner, level.inner_shape(shape), tensors)
            return widened(inner, shape, kept)
        case Quantize():
            return dequantize(level, shape, tensors)
        case Prune():
            return sparse_dense(level, shape, tensors)
        case LowRank():
            return low_rank_dense(level, shape, tensors)
        case GgufType():
            return gguf_dense(level, tensors)
        case Joint(low_rank=LowRank() as added, base=base):
            return dense_weight(base, shape, tensors) + low_rank_dense(added, shape, tensors)
        case Joint(prune=Prune()):
            return sparse_code_dense(level, shape, tensors)
        case Joint():
            return outlier_dense(level, shape, tensors)
    raise _no_form(level)


def _no_form(level: Level) -> DatabaseError:
    return DatabaseError(f"a level must have a stored form. Got {level}, which has none.")
