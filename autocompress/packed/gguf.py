"""Weights in GGUF types: `blocks`, (out, bytes of a row), exactly as a GGUF file holds them.

The `gguf` package reads every type. Types whose codes are numbers on a grid (all but the lattices
of IQ1 to IQ3) can be given other codes beside the same scales: `LAYOUTS` says where both are.

References:
    ggml-common.h and ggml-quants.c of llama.cpp: structures and `dequantize_row_*`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autocompress.levels import GgufType, Shape
from autocompress.levels.gguf import BLOCKS
from autocompress.packed.stored import Packed, Sizes, Tensors

Array = np.ndarray[Any, Any]
Grid = tuple[Array, Array]  # scales and offsets, (blocks, sub-blocks), float32


def gguf_shapes(level: GgufType, shape: Shape) -> Sizes:
    """The one tensor of a weight."""
    return {"blocks": (torch.uint8, (shape[0], level.row_bytes(shape[1])))}


def gguf_dense(level: GgufType, tensors: Tensors) -> Tensor:  # (out, in), float32
    """The weight as the `gguf` package reads it."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks = tensors["blocks"].contiguous().numpy()
    return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[level.name]))


def pack_gguf(level: GgufType, blocks: Array, width: int) -> Packed:
    """A weight of (out, bytes of a row) blocks and `width` inputs."""
    return Packed(level, (len(blocks), width), {"blocks": torch.from_numpy(blocks)})


@dataclass(frozen=True)
class Plane:
    """Some bits of all codes of a block.

    Args:
        start: its first byte in the block.
        stretch: codes that lie in consecutive bytes; the next `stretch` are in higher bits.
        bits: of a code.
        shift: which bits of the code.
    """

    start: int
    stretch: int
    bits: int
    shift: int = 0

    def write(self, blocks: Array, codes: Array) -> None:
        """Put codes, (blocks, length), into blocks, (blocks, bytes)."""
        each = 8 // self.bits  # codes in a byte
        part = (codes >> self.shift) & ((1 << self.bits) - 1)
        part = part.reshape(len(codes), -1, each, self.stretch)
        shifts = np.arange(each, dtype=np.uint8).reshape(each, 1) * self.bits
        packed = (part << shifts).sum(2, dtype=np.uint8).reshape(len(codes), -1)
        blocks[:, self.start : self.start + packed.shape[1]] = packed

    def read(self, blocks: Array, length: int) -> Array:
        """These bits of the codes, (blocks, length), in their place."""
        each = 8 // self.bits
        part = blocks[:, self.start : self.start + length // each]
        part = part.reshape(len(blocks), -1, 1, self.stretch)
        shifts = np.arange(each, dtype=np.uint8).reshape(each, 1) * self.bits
        codes = (part >> shifts) & np.uint8((1 << self.bits) - 1)
        return (codes << np.uint8(self.shift)).reshape(len(blocks), length)


@dataclass(frozen=True)
class Layout:
    """Where a type keeps codes and scales: weight = scale * value(code) + offset.

    Args:
        grid: blocks, (blocks, bytes) -> scale and offset of every sub-block.
        planes: where the codes' bits are.
        low, high: the codes that may be written; those of a block's value are all between.
        flip: what is xor-ed to a code in the file.
        values: what the codes stand for; None for themselves.
    """

    grid: Callable[[Array], Grid]
    planes: tuple[Plane, ...]
    high: int
    low: int = 0
    flip: int = 0
    values: tuple[int, ...] | None = None

    def codes(self, blocks: Array, length: int) -> Array:  # (blocks, length), uint8
        """The codes of blocks, (blocks, bytes)."""
        found = np.zeros((len(blocks), length), dtype=np.uint8)
        for plane in self.planes:
            found |= plane.read(blocks, length)
        return found ^ np.uint8(self.flip)

    def with_codes(self, blocks: Array, codes: Array) -> Array:  # (blocks, bytes)
        """Blocks with the same scales and other codes, (blocks, length)."""
        blocks = blocks.copy()
        for plane in self.planes:
            plane.write(blocks, codes ^ np.uint8(self.flip))
        return blocks


def _half(blocks: Array, start: int) -> Array:  # (blocks, 1), float32
    return blocks[:, start : start + 2].copy().view(np.float16).astype(np.float32)


def _centred(zero: int) -> Callable[[Array], Grid]:
    """A scale for the whole block, and the code that stands for 0."""

    def grid(blocks: Array) -> Grid:
        scale = _half(blocks, 0)
        return scale, -zero * scale

    return grid


def _affine(blocks: Array) -> Grid:
    return _half(blocks, 0), _half(blocks, 2)


def _q2_k(blocks: Array) -> Grid:
    both = blocks[:, :16]
    return _half(blocks, 80) * (both & 15), -_half(blocks, 82) * (both >> 4)


def _q3_k(blocks: Array) -> Grid:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    low = np.concatenate([low & 15, low >> 4], 1)
    high = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    scale = _half(blocks, 108) * ((low | high << 4).astype(np.float32) - 32)
    return scale, -4 * scale


def _q4_k(blocks: Array) -> Grid:
    scale, least, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([scale & 63, (rest & 15) | ((scale >> 2) & 48)], 1)
    least = np.concatenate([least & 63, (rest >> 4) | ((least >> 2) & 48)], 1)
    return _half(blocks, 0) * scales, -_half(blocks, 2) * least


def _q6_k(blocks: Array) -> Grid:
    scale = _half(blocks, 208) * blocks[:, 192:208].copy().view(np.int8)
    return scale, -32 * scale


def _iq4_xs(blocks: Array) -> Grid:
    low, high = blocks[:, 4:8], blocks[:, 2:4].copy().view(np.uint16)
    low = np.stack([low & 15, low >> 4], 2).reshape(len(blocks), 8)
    top = ((high >> (2 * np.arange(8, dtype=np.uint16))) & 3).astype(np.uint8)
    scale = _half(blocks, 0) * ((low | top << 4).astype(np.float32) - 32)
    return scale, np.zeros_like(scale)


NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout(_centred(8), (Plane(2, 16, 4),), 15),
    "Q4_1": Layout(_affine, (Plane(4, 16, 4),), 15),
    "Q5_0": Layout(_centred(16), (Plane(6, 16, 4), Plane(2, 1, 1, 4)), 31),
    "Q5_1": Layout(_affine, (Plane(8, 16, 4), Plane(4, 1, 1, 4)), 31),
    # -128 has no counterpart: kernels that multiply magnitudes would overflow.
    "Q8_0": Layout(_centred(128), (Plane(2, 1, 8),), 255, low=1, flip=128),
    "IQ4_NL": Layout(_centred(0), (Plane(2, 16, 4),), 15, values=NONLINEAR),
    "Q2_K": Layout(_q2_k, (Plane(16, 32, 2),), 3),
    "Q3_K": Layout(_q3_k, (Plane(32, 32, 2), Plane(0, 32, 1, 2)), 7),
    "Q4_K": Layout(_q4_k, (Plane(16, 32, 4),), 15),
    "Q5_K": Layout(_q4_k, (Plane(48, 32, 4), Plane(16, 32, 1, 4)), 31),
    "Q6_K": Layout(_q6_k, (Plane(0, 64, 4), Plane(128, 32, 2, 4)), 63),
    "IQ4_XS": Layout(_iq4_xs, (Plane(8, 16, 4),), 15, values=NONLINEAR),
}


def as_blocks(level: GgufType, rows: Array) -> Array:  # (rows * blocks of a row, bytes)
    """Rows of blocks as single blocks."""
    return rows.reshape(-1, BLOCKS[level.name][1])
