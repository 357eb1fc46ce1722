"""Weights in the layout of our kernels: one matrix, the product of two, or a sum."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from autocompress.levels import Dense, Joint, Level, LowRank, Prune, Quantize, Shape
from autocompress.packed import Packed, dense_weight, pack_quantized
from autocompress.packed.low_rank import factor_tensors
from autocompress.packed.quantized import spread
from autocompress.packed.sparse import pack_sparse, pack_sparse_codes, unpack_mask


@dataclass
class NativeOp:
    """A weight that is one matrix.

    Args:
        level, shape: what it stands for.
        packed: `autocompress_kernels.Packed`.
        placed: whether it lies on huge pages beside the others of its model.
        mask: of a sparse level, as files hold it: kernels may hold dropped weights as zeros.
    """

    level: Level
    shape: Shape
    packed: Any
    dtype: torch.dtype
    mode: str
    placed: bool = False
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        from autocompress_kernels.ops import linear

        self._linear = linear

    @property
    def matrices(self) -> tuple[NativeOp, ...]:
        """All matrices that a product reads."""
        return (self,)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self.packed.tensors)

    @property
    def bytes(self) -> int:
        return int(self.packed.bytes)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype is torch.float16:  # the kernels read and write float32 and bf16
            return self._linear(x.float(), self.packed, bias, self.mode).half()
        return self._linear(x, self.packed, bias, self.mode)

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """`y += x W^T`; both of one type the kernels have."""
        from autocompress_kernels.ops import add_linear

        add_linear(y, x, self.packed, self.mode)

    def rows(self, indices: Tensor) -> Tensor:
        kind = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        return self.rows_as(indices, kind).to(self.dtype)

    def rows_as(self, indices: Tensor, kind: torch.dtype) -> Tensor:
        """Rows of the weight, in float32 or bf16."""
        from autocompress_kernels.ops import gather

        return gather(self.packed, indices, kind)

    def dense(self) -> Tensor:
        from autocompress_kernels.ops import dequantize

        return dequantize(self.packed, torch.float32)

    def stored(self) -> Packed:
        level = self.level
        match level:
            case Dense():
                return Packed(level, self.shape, {"weight": self.dense().bfloat16()})
            case Prune():
                return pack_sparse(level, self.dense(), self._keep(level))
            case Joint(prune=Prune() as prune):
                return pack_sparse_codes(level, *self._codes(), self._keep(prune))
        assert isinstance(level, Quantize)
        return pack_quantized(level, *self._codes())

    def _keep(self, prune: Prune) -> Tensor:  # (out, in), bool
        assert self.mask is not None
        return unpack_mask(prune, self.shape, self.mask)

    def _codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, in), scales and zeros (out, groups); symmetric levels ignore the zeros."""
        from autocompress_kernels.pack import unpack_codes, unpack_scales

        if self.packed.format.pattern == "full":
            codes, scales, zeros = unpack_codes(self.packed)
            return codes, scales, scales if zeros is None else zeros
        assert isinstance(self.level, Joint) and self.level.quantize is not None
        scales = unpack_scales(self.packed)
        grid = spread(scales.float(), self.level.quantize, self.shape[1])
        return (self.dense() / grid).round_().add_(128), scales, scales


@dataclass
class NativeProduct:
    """A low-rank weight: two matrices, one after the other."""

    level: LowRank
    shape: Shape
    left: NativeOp
    right: NativeOp

    @property
    def matrices(self) -> tuple[NativeOp, ...]:
        """All matrices that a product reads."""
        return self.right, self.left

    @property
    def tensors(self) -> dict[str, Tensor]:
        return _numbered(self.matrices)

    @property
    def bytes(self) -> int:
        return self.left.bytes + self.right.bytes

    def __copy__(self) -> NativeProduct:
        return replace(self, left=copy.copy(self.left), right=copy.copy(self.right))

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.left(self.right(x), bias)

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """`y += x W^T`; both of one type the kernels have."""
        self.left.add_to(y, self.right(x))

    def rows(self, indices: Tensor) -> Tensor:
        return self.rows_as(indices, torch.float32).to(self.left.dtype)

    def rows_as(self, indices: Tensor, kind: torch.dtype) -> Tensor:
        """Rows of the weight, in float32 or bf16."""
        return (self.left.rows_as(indices, torch.float32) @ self.right.dense()).to(kind)

    def dense(self) -> Tensor:
        return self.stored().dense()

    def stored(self) -> Packed:
        tensors = factor_tensors(self.level, self.left.stored(), self.right.stored())
        return Packed(self.level, self.shape, tensors)


@dataclass
class NativeSum:
    """A joint weight whose parts are multiplied one by one and added up.

    Args:
        base, added: the parts.
        beside: tensors of files that `added` stands for, where it cannot give them back.
    """

    level: Joint
    shape: Shape
    base: NativeOp | NativeSum
    added: NativeOp | NativeProduct
    beside: dict[str, Tensor] = field(default_factory=dict)

    @property
    def matrices(self) -> tuple[NativeOp, ...]:
        """All matrices that a product reads."""
        return self.base.matrices + self.added.matrices

    @property
    def tensors(self) -> dict[str, Tensor]:
        return _numbered(self.matrices)

    @property
    def bytes(self) -> int:
        return self.base.bytes + self.added.bytes

    def __copy__(self) -> NativeSum:
        return replace(self, base=copy.copy(self.base), added=copy.copy(self.added))

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype is torch.float16:
            return self(x.float(), bias).half()
        y = self.base(x, bias)
        self.added.add_to(y, x)
        return y

    def rows(self, indices: Tensor) -> Tensor:
        return self.rows_as(indices, torch.float32).to(self.matrices[0].dtype)

    def rows_as(self, indices: Tensor, kind: torch.dtype) -> Tensor:
        """Rows of the weight, in float32 or bf16."""
        base, added = (it.rows_as(indices, torch.float32) for it in (self.base, self.added))
        return (base + added).to(kind)

    def dense(self) -> Tensor:
        return dense_weight(self.level, self.shape, self.stored().tensors)

    def stored(self) -> Packed:
        added = self.beside or dict(self.added.stored().tensors)
        return Packed(self.level, self.shape, {**added, **self.base.stored().tensors})


def _numbered(matrices: Iterable[NativeOp]) -> dict[str, Tensor]:
    """The tensors of several matrices under names of their own."""
    return {
        f"{number}.{name}": tensor
        for number, matrix in enumerate(matrices)
        for name, tensor in matrix.tensors.items()
    }
