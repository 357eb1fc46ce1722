"""Random packed weights for the tests of kernels. Imports need `autocompress_kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

import autocompress_kernels as kernels
from autocompress_kernels import Packed


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Uniform in [-1, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def weight(
    rows: int,
    width: int,
    bits: int = 4,
    group: int | None = 64,
    symmetric: bool = False,
    seed: int = 0,
) -> Packed:
    """Random codes at every value, or bf16."""
    generator = torch.Generator().manual_seed(seed)
    if bits == 16:
        return kernels.pack_bf16(draw(rows, width, seed=seed).bfloat16())
    shape = (rows, kernels.Format(rows, width, bits, group).groups)
    codes = torch.randint(1 << bits, (rows, width), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(1 << bits, shape, dtype=torch.uint8, generator=generator)
    scales = (torch.rand(shape, generator=generator) * 0.9 + 0.1).half()
    return kernels.pack_codes(codes, scales, None if symmetric else zeros, bits, group)


def sparse(
    rows: int,
    width: int,
    bits: int,
    pattern: str,
    kept: float = 0.5,
    group: int | None = 64,
    seed: int = 0,
) -> tuple[Packed, Tensor]:
    """A sparse weight and its dense form, made without the kernels' layout."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand((rows, width), generator=generator) < kept
    if pattern == "2:4":
        order = torch.rand((rows, -(-width // 4), 4), generator=generator).argsort(2)
        keep = (order < min(2, round(4 * kept))).view(rows, -1)[:, :width]
    if bits == 16:
        values = draw(rows, width, seed=seed).bfloat16()
        packed = kernels.pack_sparse(values, keep, pattern)
        return packed, torch.where(keep, values.double(), 0)
    shape = (rows, kernels.Format(rows, width, 8, group).groups)
    scales = (torch.rand(shape, generator=generator) * 0.9 + 0.1).half()
    codes = torch.randint(256, (rows, width), dtype=torch.uint8, generator=generator)
    packed = kernels.pack_sparse(codes, keep, pattern, scales, group)
    spread = scales.double().repeat_interleave(packed.format.inputs, 1)[:, :width]
    return packed, torch.where(keep, (codes.double() - 128) * spread, 0)
