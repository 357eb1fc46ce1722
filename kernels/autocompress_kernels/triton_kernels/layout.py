"""How the Triton kernels store a weight: plain tensors, inputs in superblocks of 32.

Quantized. Codes are split into a low and a high plane of 1, 2, 4 or 8 bits each: 3 = 2 + 1,
5 = 4 + 1, 6 = 4 + 2. A plane of b bits is int32 (b * superblocks, stride): word `j` of a superblock
holds its inputs `j * 32/b ...`, the first in the lowest bits. `stride` is the outputs rounded up to
16, and outputs are innermost, so that neighbouring lanes read neighbouring words.

Bitmask. Blocks of 32 outputs x 32 inputs: one int32 per input and block, bit `r` for output `r`;
the kept values of a block follow each other, input by input and in each by output.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

SUPER = 32  # inputs per superblock; a group is whole superblocks
LANES = 32  # outputs per block of a bitmask
ALIGN = 16  # outputs are padded to this, so that every row of words begins on 64 bytes
PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0)}  # bits -> low, high
LARGEST = 2**31 - 1  # elements per tensor: the kernels index with 32 bits
FLOATS = (torch.bfloat16, torch.float16)


def superblocks(width: int) -> int:
    """Superblocks that hold `width` inputs."""
    return -(-width // SUPER)


def padded(rows: int, multiple: int) -> int:
    """`rows` rounded up to a multiple."""
    return -(-rows // multiple) * multiple


class Stored:
    """What both layouts share: their tensors, in the order of the fields."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, to be stored; the constructor takes the same names."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, padding included."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def to(self, device: torch.device | str) -> Self:
        """The same weight on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class QuantizedWeight(Stored):
    """`scale * (code - zero)` of shape (rows, width), packed.

    Args:
        rows: outputs.
        width: inputs.
        bits: 2, 3, 4, 5, 6 or 8.
        group: inputs per scale, a multiple of 32; at least `width` is one group.
        low: int32 (low bits * superblocks, stride), see the module.
        scales: float16 (groups, stride).
        high: int32 (high bits * superblocks, stride) for 3, 5 and 6 bits, else None.
        zeros: uint8 (groups, stride); None is 2**(bits - 1) everywhere.

    Raises:
        ValueError: a number is out of range, or a tensor has another shape, type or device.
    """

    rows: int
    width: int
    bits: int
    group: int
    low: Tensor
    scales: Tensor
    high: Tensor | None = None
    zeros: Tensor | None = None

    def __post_init__(self) -> None:
        check_format(self.rows, self.width, self.bits, self.group)
        low, high = PLANES[self.bits]
        blocks, groups = superblocks(self.width), -(-self.width // self.group)
        check_tensor("low", self.low, torch.int32, (blocks * low, self.stride))
        check_tensor("scales", self.scales, torch.float16, (groups, self.stride))
        if (self.high is None) != (high == 0):
            got = "none" if self.high is None else "one"
            raise ValueError(
                f"high must be there for 3, 5 and 6 bits only. Got {got} at {self.bits}."
            )
        if self.high is not None:
            check_tensor("high", self.high, torch.int32, (blocks * high, self.stride))
        if self.zeros is not None:
            check_tensor("zeros", self.zeros, torch.uint8, (groups, self.stride))
        check_one_device(self.tensors)

    @property
    def stride(self) -> int:
        """Elements from one row of words, scales or zeros to the next."""
        return padded(self.rows, ALIGN)


@dataclass(frozen=True)
class BitmaskWeight(Stored):
    """A (rows, width) weight whose zeros are not stored.

    Args:
        rows: outputs.
        width: inputs.
        masks: int32 (32 * superblocks, blocks of 32 outputs), see the module.
        offsets: int32 (superblocks, blocks of 32 outputs): where a block's values begin.
        values: bfloat16 or float16 (kept elements,).

    Raises:
        ValueError: a number is out of range, a tensor has another shape, type or device, or the
            offsets or the number of values are not what the masks say.
    """

    rows: int
    width: int
    masks: Tensor
    offsets: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        check_format(self.rows, self.width)
        blocks, columns = superblocks(self.width), padded(self.rows, LANES) // LANES
        check_tensor("masks", self.masks, torch.int32, (blocks * SUPER, columns))
        check_tensor("offsets", self.offsets, torch.int32, (blocks, columns))
        if self.values.dtype not in FLOATS:
            raise ValueError(f"values must be bfloat16 or float16. Got {self.values.dtype}.")
        check_tensor("values", self.values, self.values.dtype, (self.values.numel(),))
        check_one_device(self.tensors)
        offsets, total = block_offsets(bit_counts(self.masks))
        if total != self.values.numel():
            raise ValueError(
                f"values must hold the {total} elements that masks keep. "
                f"Got {self.values.numel()}. Pack the weight again."
            )
        if not torch.equal(offsets, self.offsets):
            raise ValueError("offsets must count the bits of masks. Got others. Pack it again.")


def bit_counts(
    masks: Tensor,  # (32 * superblocks, columns), int32
) -> Tensor:  # (superblocks, columns), int64
    """Bits set in each block of a bitmask."""
    counts = torch.zeros_like(masks)
    for lane in range(LANES):
        counts += (masks >> lane) & 1
    return counts.view(-1, SUPER, masks.shape[1]).sum(1, dtype=torch.int64)


def block_offsets(
    counts: Tensor,  # (superblocks, columns), int64
) -> tuple[Tensor, int]:  # (superblocks, columns) int32, elements in all
    """Where each block's values begin."""
    ends = counts.reshape(-1).cumsum(0)
    total = int(ends[-1])
    if total > LARGEST:
        raise ValueError(f"a weight must keep at most {LARGEST} elements. Got {total}.")
    return (ends.view_as(counts) - counts).to(torch.int32), total


def check_format(rows: int, width: int, bits: int = 8, group: int = SUPER) -> None:
    """Raise ValueError unless the kernels know this format."""
    if rows < 1 or width < 1 or padded(rows, LANES) * padded(width, SUPER) > LARGEST:
        raise ValueError(
            f"rows and width must be at least 1 and their padded product at most {LARGEST}. "
            f"Got {rows} and {width}."
        )
    if bits not in PLANES:
        raise ValueError(f"bits must be one of {tuple(PLANES)}. Got {bits}.")
    if group < 1 or group % SUPER:
        raise ValueError(f"group must be a multiple of {SUPER}, or None. Got {group}.")


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor is as the kernels read it."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {dtype} of shape {shape}. Got "
            f"{'' if tensor.is_contiguous() else 'strided '}{tensor.dtype} of shape "
            f"{tuple(tensor.shape)}. Pack the weight again."
        )


def check_one_device(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless all tensors are on one device."""
    devices = {str(tensor.device) for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device. Got {sorted(devices)}.")
