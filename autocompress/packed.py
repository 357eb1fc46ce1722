"""Packed weights: integer codes as dense bits, and the dense weight they stand for.

Eight consecutive codes of `bits` bits become `bits` bytes, little-endian: code `i` occupies bits
`i*bits ... i*bits+bits-1` of the stream. Zeros are packed the same way. Files hold exactly
`level.storage_bits(shape)` bits per weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.errors import DatabaseError
from autocompress.levels import Dense, Level, Quantize, Shape, packed_bytes


def pack(
    codes: Tensor,  # any shape, integers in [0, 2**bits)
    bits: int,
) -> Tensor:  # (packed_bytes(codes.numel(), bits),), uint8
    """Codes as a dense little-endian bit stream, padded with zeros to whole groups of eight."""
    flat = codes.reshape(-1).to(torch.uint8)
    if bits == 8:
        return torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8).to(torch.int64)
    word = (flat << (torch.arange(8) * bits)).sum(1)  # 8 * bits <= 48 bits
    return (word.unsqueeze(1) >> (torch.arange(bits) * 8) & 255).to(torch.uint8).reshape(-1)


def unpack(
    stream: Tensor,  # (packed_bytes(count, bits),), uint8
    bits: int,
    count: int,
) -> Tensor:  # (count,), uint8
    """The first `count` codes of a stream made by `pack`."""
    if bits == 8:
        return stream[:count]
    # int32 words over the fewest bytes that hold whole codes: 4 codes of 2, 4, 6 bits or 8 of 3, 5.
    data = stream.view(-1, bits)
    codes = torch.empty(data.shape[0], 8, dtype=torch.uint8, device=stream.device)
    mask = (1 << bits) - 1
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        low = data[:, byte] >> shift
        if shift + bits > 8:
            low = low | (data[:, byte + 1] << (8 - shift))
        codes[:, i] = low & mask
    return codes.reshape(-1)[:count]


@dataclass(frozen=True)
class Packed:
    """A weight at a level, as it is stored.

    Args:
        level: how to read `tensors`.
        shape: (out, in) of the dense weight.
        tensors: for `Quantize`: codes uint8 stream, scales fp16 (out, groups), and, if asymmetric,
            zeros uint8 stream; for `Dense`: weight (out, in).
    """

    level: Level
    shape: Shape
    tensors: Mapping[str, Tensor]

    @property
    def bits(self) -> int:
        """Bits of all tensors: equals `level.storage_bits(shape)`."""
        return sum(t.numel() * t.element_size() * 8 for t in self.tensors.values())

    def dense(self) -> Tensor:  # (out, in), float32
        """The dense weight: `scale * (code - zero)`."""
        if isinstance(self.level, Dense):
            return self.tensors["weight"].float()
        if isinstance(self.level, Quantize):
            return dequantize(self.level, self.shape, self.tensors)
        raise DatabaseError(f"a packed weight must be dense or quantized. Got {self.level}.")


def tensor_shapes(level: Quantize, shape: Shape) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> (dtype, shape) of the tensors that store a `shape` weight at `level`."""
    rows, width = shape
    groups = level.groups(width)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "codes": (torch.uint8, (packed_bytes(rows * width, level.bits),)),
        "scales": (torch.float16, (rows, groups)),
    }
    if not level.symmetric:
        shapes["zeros"] = (torch.uint8, (packed_bytes(rows * groups, level.bits),))
    return shapes


def pack_quantized(
    level: Quantize,
    codes: Tensor,  # (out, in), integers in [0, 2**bits)
    scales: Tensor,  # (out, groups), fp16
    zeros: Tensor,  # (out, groups), integers in [0, 2**bits); ignored if symmetric
) -> Packed:
    """Codes, scales and zeros in their stored form."""
    tensors = {"codes": pack(codes, level.bits), "scales": scales.to(torch.float16).contiguous()}
    if not level.symmetric:
        tensors["zeros"] = pack(zeros, level.bits)
    return Packed(level, (codes.shape[0], codes.shape[1]), tensors)


def dequantize(
    level: Quantize, shape: Shape, tensors: Mapping[str, Tensor]
) -> Tensor:  # (out, in), float32
    """`scale * (code - zero)` in float32; groups run along the inputs, the last may be shorter."""
    rows, width = shape
    groups = level.groups(width)
    codes = unpack(tensors["codes"], level.bits, rows * width).view(rows, width)
    scales = tensors["scales"].float()
    if level.symmetric:
        zeros = torch.full_like(scales, 1 << (level.bits - 1))
    else:
        zeros = unpack(tensors["zeros"], level.bits, rows * groups).view(rows, groups).float()
    size = level.group_size or width
    if width % size == 0:
        centred = codes.view(rows, groups, size) - zeros.unsqueeze(2)
        return (centred * scales.unsqueeze(2)).view(rows, width)
    index = torch.arange(width, device=codes.device) // size
    return (codes - zeros[:, index]) * scales[:, index]
