"""Random weights for the benchmark, packed, with what the reference needs to multiply them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from autocompress_kernels import reference
from autocompress_kernels.bench_cases import BANK, Shape, bank_rows, generator
from autocompress_kernels.formats import Packed
from autocompress_kernels.pack import pack_bf16, pack_codes, pack_sparse

GROUP = 64  # inputs per scale


@dataclass(frozen=True)
class Made:
    """A weight, and its bank of different rows.

    Args:
        packed: (rows, width).
        bank: its first rows, as many as there are different ones.
    """

    packed: Packed
    bank: Packed

    @cached_property
    def dense(self) -> Tensor:  # (rows of the bank, width), float64
        """The bank as numbers."""
        return reference.weight(self.bank)

    def product(self, x: Tensor, mode: str) -> Tensor:  # (m, rows), float64
        """x W^T from activations as `mode` rounds them."""
        inner = reference.activations(x, self.bank, mode) @ self.dense.T
        return inner[:, bank_rows(self.packed.format.rows)]

    def rows(self, indices: Tensor) -> Tensor:  # (count, width), float64
        """Rows of the weight."""
        return self.dense[indices % BANK]


def codes_weight(shape: Shape, bits: int, symmetric: bool) -> Made:
    """Random codes, scales in [0.1, 1), and zeros."""
    index = bank_rows(shape[0])
    seed = generator(*shape, bits, symmetric)
    size = int(index.max()) + 1, -(-shape[1] // GROUP)
    codes = torch.randint(1 << bits, (size[0], shape[1]), dtype=torch.uint8, generator=seed)
    scales = _scales(size, seed)
    zeros = torch.randint(1 << bits, size, dtype=torch.uint8, generator=seed)
    packed, bank = (
        pack_codes(codes[i], scales[i], None if symmetric else zeros[i], bits, GROUP)
        for i in (index, slice(None))
    )
    return Made(packed, bank)


def bf16_weight(shape: Shape) -> Made:
    """Normal numbers in bf16."""
    index = bank_rows(shape[0])
    weight = torch.randn((int(index.max()) + 1, shape[1]), generator=generator(*shape, 16))
    bank = weight.to(torch.bfloat16)
    return Made(pack_bf16(bank[index]), pack_bf16(bank))


def sparse_weight(shape: Shape, bits: int, pattern: str, sparsity: int = 50) -> Made:
    """Random elements of which `sparsity` % are dropped; codes of 8 bits, or bf16."""
    index = bank_rows(shape[0])
    seed = generator(*shape, bits, sparsity)
    rows, width = int(index.max()) + 1, shape[1]
    if pattern == "2:4":
        order = torch.rand((rows, -(-width // 4), 4), generator=seed).argsort(2)
        keep = (order < 2).view(rows, -1)[:, :width]
    else:
        keep = torch.rand((rows, width), generator=seed) * 100 >= sparsity
    scales, group = None, None
    if bits == 16:
        elements = torch.randn((rows, width), generator=seed).to(torch.bfloat16)
    else:
        elements = torch.randint(256, (rows, width), dtype=torch.uint8, generator=seed)
        scales, group = _scales((rows, -(-width // GROUP)), seed), GROUP
    packed, bank = (
        pack_sparse(elements[i], keep[i], pattern, None if scales is None else scales[i], group)
        for i in (index, slice(None))
    )
    return Made(packed, bank)


def _scales(size: tuple[int, int], seed: torch.Generator) -> Tensor:  # size, fp16
    return (torch.rand(size, generator=seed) * 0.9 + 0.1).half()
