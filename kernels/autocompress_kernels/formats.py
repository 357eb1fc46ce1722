"""What a packed weight is: its format, and the plain tensors that hold it.

The layout of the tensors is described in `csrc/autocompress_kernels.h`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd

import torch
from torch import Tensor

TILE = 16  # outputs per tile
SUPER = 32  # inputs per superblock
SEGMENT = 64  # most inputs per activation scale
TAIL = 64  # readable bytes that sparse values need behind the last one
BITS = (2, 3, 4, 5, 6, 8, 16)
PATTERNS = {"full": 0, "bitmask": 1, "2:4": 2}  # name -> number in the C interface
MODES = {"a8": 0, "a16": 1, "a32": 2}  # activations in int8, in bf16, exact
PARTS = {  # name -> what its elements are
    "values": torch.uint8,
    "scales": torch.float16,
    "zeros": torch.uint8,
    "masks": torch.uint8,
    "offsets": torch.int64,
}
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Format:
    """How a (rows, width) weight is packed.

    Args:
        rows: outputs, at least 1.
        width: inputs, at least 1.
        bits: 2, 3, 4, 5, 6 or 8 for codes with scales, 16 for bf16 values without.
        group: inputs per scale, a multiple of 32; None is one scale per row; unused at 16 bits.
        pattern: 'full', or which elements are kept: 'bitmask' any, '2:4' two of four neighbours;
            those need 8 or 16 bits.

    Raises:
        ValueError: out of range, or a combination that no kernel reads.
    """

    rows: int
    width: int
    bits: int
    group: int | None = None
    pattern: str = "full"

    def __post_init__(self) -> None:
        if not (1 <= self.rows <= LARGEST and 1 <= self.width <= LARGEST):
            raise ValueError(
                f"rows and width must be from 1 to {LARGEST}. Got {self.rows}, {self.width}."
            )
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}. Got {self.bits}.")
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {tuple(PATTERNS)}. Got '{self.pattern}'.")
        if self.pattern != "full" and self.bits < 8:
            raise ValueError(f"a sparse pattern must have 8 or 16 bits. Got {self.bits}.")
        if self.bits < 16 and self.group is not None and (self.group < 1 or self.group % SUPER):
            raise ValueError(f"group must be a multiple of {SUPER}. Got {self.group}.")
        whole = -(-self.width // SUPER) * SUPER
        wanted = whole if self.group is None or self.bits == 16 else min(self.group, whole)
        object.__setattr__(self, "group", wanted)  # one number per format: what the kernels read

    @property
    def inputs(self) -> int:
        """Inputs per scale; the padded width where there is one scale per row."""
        assert self.group is not None
        return self.group

    @property
    def tiles(self) -> int:
        """Tiles of 16 outputs, the last one padded."""
        return -(-self.rows // TILE)

    @property
    def padded_width(self) -> int:
        """Inputs with padding to whole superblocks."""
        return -(-self.width // SUPER) * SUPER

    @property
    def groups(self) -> int:
        """Scales per row; none at 16 bits."""
        return 0 if self.bits == 16 else -(-self.width // self.inputs)

    @property
    def segment(self) -> int:
        """Inputs that share one scale of int8 activations: all of a group of 32 or 64."""
        return gcd(self.inputs, SEGMENT)


@dataclass(frozen=True)
class Packed:
    """A packed weight.

    Args:
        format: how to read `tensors`.
        tensors: contiguous CPU tensors, any of `PARTS` by name: `values` uint8 (bytes,), `scales`
            fp16 and `zeros` uint8 (tiles, groups, 16), `masks` uint8 (bytes,), `offsets` int64
            (tiles + 1,).
        parts, numbers: the tensors and the format as the operators take them.

    Raises:
        ValueError: an unknown name, a tensor of another type or shape, or on another device.
    """

    format: Format
    tensors: Mapping[str, Tensor]
    parts: tuple[Tensor | None, ...] = field(init=False, repr=False, compare=False)
    numbers: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        wanted = tensor_shapes(self.format)
        for name in self.tensors:
            if name not in wanted:
                raise ValueError(f"a packed weight must have {tuple(wanted)}. Got '{name}' too.")
        for name, shape in wanted.items():
            if name in self.tensors:
                _check(name, self.tensors[name], shape)
            elif name != "zeros":
                raise ValueError(f"a packed weight must have '{name}'. Got {tuple(self.tensors)}.")
        if self.format.pattern != "full":
            _check_sparse(self.format, self.tensors)
        format, parts = self.format, tuple(self.tensors.get(name) for name in PARTS)
        shape = (format.rows, format.width, format.bits, format.inputs, PATTERNS[format.pattern])
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "numbers", shape)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, padding included."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def tensor_shapes(format: Format) -> dict[str, tuple[int | None, ...]]:
    """Name -> shape of the tensors of a format; None is any length. `zeros` may be left out."""
    elements = format.tiles * TILE * format.padded_width
    shapes: dict[str, tuple[int | None, ...]]
    if format.pattern == "full":
        shapes = {"values": (elements * format.bits // 8,)}
    else:
        shapes = {"values": (None,), "masks": (elements // 8,)}
    if format.pattern == "bitmask":
        shapes["offsets"] = (format.tiles + 1,)
    if format.bits < 16:
        shapes["scales"] = (format.tiles, format.groups, TILE)
        if format.pattern == "full":
            shapes["zeros"] = shapes["scales"]
    return shapes


def _check_sparse(format: Format, tensors: Mapping[str, Tensor]) -> None:
    """Check that masks, offsets and values agree: kernels walk them as far as the masks say."""
    kept = _ones(tensors["masks"]).view(format.tiles, -1).sum(1)
    if "offsets" in tensors:
        starts = tensors["offsets"]
        agree = not int(starts[0]) and torch.equal(starts.diff(), kept)
    else:
        agree = bool((kept == TILE * format.padded_width // 2).all())
    needed = int(kept.sum()) * format.bits // 8 + TAIL
    if not agree or tensors["values"].numel() < needed:
        raise ValueError(
            f"masks must keep as many elements as there are values, {needed} bytes with the tail, "
            f"tile by tile. Got {tensors['values'].numel()} bytes and other counts."
        )


def _ones(masks: Tensor) -> Tensor:
    """Bits set in each byte, int64."""
    places = torch.arange(8, dtype=torch.uint8)
    counts = (torch.arange(256, dtype=torch.uint8).unsqueeze(1) >> places & 1).sum(1)
    return counts[masks.int()]


def _check(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Check one tensor of a packed weight."""
    fits = tensor.dim() == len(shape) and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != PARTS[name] or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {PARTS[name]} of shape {shape}. "
            f"Got {tensor.dtype} of shape {tuple(tensor.shape)}."
        )
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU. Got {tensor.device}.")
