"""Small integers as dense bits.

Eight consecutive codes of `bits` bits become `bits` bytes, little-endian: code `i` occupies bits
`i*bits ... i*bits+bits-1` of the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(
    codes: Tensor,  # any shape, integers in [0, 2**bits)
    bits: int,
) -> Tensor:  # (packed_bytes(codes.numel(), bits),), uint8
    """Codes as a dense little-endian bit stream, padded with zeros to whole groups of eight."""
    flat = codes.reshape(-1).to(torch.uint8)
    if bits == 8:
        return torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8).to(torch.int64)
    word = (flat << (torch.arange(8) * bits)).sum(1)  # 8 * bits <= 56 bits
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
