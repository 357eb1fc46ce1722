"""From codes, scales and zeros, or bf16 weights, to the layout that the kernels read, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress_kernels.formats import PATTERNS, SUPER, TAIL, TILE, Format, Packed
from autocompress_kernels.library import load

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}  # bits -> widths, lowest bits first


def pack_codes(
    codes: Tensor,  # (rows, width), uint8, below 2**bits
    scales: Tensor,  # (rows, groups), fp16
    zeros: Tensor | None,  # (rows, groups), uint8, below 2**bits; None is symmetric: 2**(bits-1)
    bits: int,
    group: int | None = None,
) -> Packed:
    """Codes of 2 to 8 bits: weight = scale * (code - zero).

    Args:
        codes, scales, zeros: on the CPU.
        bits: 2, 3, 4, 5, 6 or 8.
        group: inputs per scale, a multiple of 32; None is one per row.

    Raises:
        ValueError: a tensor's type or shape, or a setting, is wrong.
        RuntimeError: the kernels are missing.
    """
    _expect("codes", codes, torch.uint8, (None, None))
    if bits == 16:
        raise ValueError("codes must have 2 to 8 bits. Got 16. Use pack_bf16.")
    rows, width = codes.shape
    format = Format(rows, width, bits, group)
    tensors = {"values": torch.empty(_full_bytes(format), dtype=torch.uint8)}
    tensors.update(_grids(format, scales, zeros))
    source = codes.contiguous()
    numbers = (format.rows, format.width, bits)
    values = tensors["values"]
    load().pack(str(format), "codes", source.data_ptr(), *numbers, values.data_ptr(), values.nbytes)
    return Packed(format, tensors)


def pack_bf16(weight: Tensor) -> Packed:  # weight: (rows, width), bf16
    """A dense bf16 weight.

    Raises:
        ValueError: it has another type or shape.
        RuntimeError: the kernels are missing.
    """
    _expect("weight", weight, torch.bfloat16, (None, None))
    rows, width = weight.shape
    format = Format(rows, width, 16)
    values = torch.empty(_full_bytes(format), dtype=torch.uint8)
    source = weight.contiguous()
    numbers = (format.rows, format.width)
    load().pack(str(format), "bf16", source.data_ptr(), *numbers, values.data_ptr(), values.nbytes)
    return Packed(format, {"values": values})


def pack_sparse(
    elements: Tensor,  # (rows, width), uint8 codes or bf16 weights
    keep: Tensor,  # (rows, width), bool
    pattern: str,
    scales: Tensor | None = None,  # (rows, groups), fp16; of codes
    group: int | None = None,
) -> Packed:
    """A sparse weight; dropped elements are exactly zero. Codes are symmetric around 128.

    Args:
        elements, keep, scales: on the CPU.
        pattern: 'bitmask' for any, '2:4' for at most two of each four neighbours.
        group: inputs per scale, a multiple of 32; None is one per row.

    Raises:
        ValueError: a tensor's type or shape is wrong, or `keep` is not of the pattern.
        RuntimeError: the kernels are missing.
    """
    bits = 16 if elements.dtype == torch.bfloat16 else 8
    _expect("elements", elements, torch.uint8 if bits == 8 else torch.bfloat16, (None, None))
    _expect("keep", keep, torch.bool, tuple(elements.shape))
    rows, width = elements.shape
    format = Format(rows, width, bits, group, pattern)
    if pattern == "full":
        raise ValueError("a sparse weight must have a sparse pattern. Got 'full'.")
    padded = format.tiles * TILE * format.padded_width
    count = padded // 2 if pattern == "2:4" else int(keep.sum())
    tensors = {
        "values": torch.zeros(count * bits // 8 + TAIL, dtype=torch.uint8),
        "masks": torch.zeros(padded // 8, dtype=torch.uint8),
    }
    if bits == 8:
        tensors.update(_grids(format, scales, None))
    if pattern == "bitmask":
        tensors["offsets"] = torch.zeros(format.tiles + 1, dtype=torch.int64)
    if pattern == "2:4":
        elements, keep = _two_of_four(elements, keep)
    source, kept = elements.contiguous(), keep.contiguous()
    buffers = [item for name in ("values", "masks") for item in _span(tensors[name])]
    offsets = tensors["offsets"].data_ptr() if pattern == "bitmask" else None
    numbers = (format.rows, format.width, bits, PATTERNS[pattern])
    addresses = source.data_ptr(), kept.data_ptr()
    load().pack(str(format), "sparse", *addresses, *numbers, *buffers, offsets)
    return Packed(format, tensors)


def _two_of_four(elements: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Exactly two kept of four: where fewer were, dropped ones are kept as zeros."""
    rows, width = keep.shape
    outside = -width % 4
    inside = torch.nn.functional.pad(torch.ones_like(keep), (0, outside)).view(rows, -1, 4)
    kept = torch.nn.functional.pad(keep, (0, outside)).view(rows, -1, 4)
    first = torch.tensor([True, True, False, False])  # of the padding, the library keeps these
    missing = 2 - (kept | (first & ~inside)).sum(2, keepdim=True)
    if (missing < 0).any():
        raise ValueError("pattern 2:4 must keep at most two of each four neighbours. Got more.")
    free = inside & ~kept
    added = (free & (free.cumsum(2) <= missing)).view(rows, -1)[:, :width]
    zero = 128 if elements.dtype == torch.uint8 else 0
    return elements.masked_fill(added, zero), keep | added


def unpack_codes(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
    """The codes (rows, width), scales and zeros (rows, groups) that `pack_codes` was given.

    Raises:
        ValueError: the weight is not one of full codes.
    """
    format = packed.format
    if format.bits == 16 or format.pattern != "full":
        raise ValueError(f"a weight must be of full codes. Got {format}.")
    super_blocks = packed.tensors["values"].view(format.tiles, -1, 64 * format.bits)
    codes = _from_planes(super_blocks, format.bits)  # (tiles, supers, 8, 64)
    zeros = packed.tensors.get("zeros")
    return (
        rows_of_blocks(codes, format),
        unpack_scales(packed),
        None if zeros is None else _rows_of_grid(zeros, format),
    )


def unpack_scales(packed: Packed) -> Tensor:  # (rows, groups), fp16
    """The scales that codes were packed with, full or sparse.

    Raises:
        ValueError: the weight has none.
    """
    if packed.format.bits == 16:
        raise ValueError(f"a weight must be of codes. Got {packed.format}.")
    return _rows_of_grid(packed.tensors["scales"], packed.format)


def rows_of_blocks(blocks: Tensor, format: Format) -> Tensor:  # (rows, width)
    """(tiles, superblocks, blocks, 16 * columns) elements in their places, padding cut off."""
    tiles, supers, count, size = blocks.shape
    tiled = blocks.view(tiles, supers, count, TILE, size // TILE).permute(0, 3, 1, 2, 4)
    dense = tiled.reshape(tiles * TILE, supers * SUPER)
    return dense[: format.rows, : format.width].contiguous()


def _from_planes(blocks: Tensor, bits: int) -> Tensor:
    """Codes (tiles, superblocks, 8, 64) of superblocks (tiles, superblocks, 64 * bits)."""
    shape = (*blocks.shape[:2], 8, 64)
    if bits == 8:
        return blocks.view(shape)
    codes = torch.zeros(shape, dtype=torch.uint8)
    start, low = 0, 0
    for plane in PLANES[bits]:
        vectors = blocks[:, :, start : start + 64 * plane].view(*shape[:2], plane, 64)
        for j in range(8):
            vector, place = divmod(j, 8 // plane)
            part = vectors[:, :, vector] >> (plane * place) & ((1 << plane) - 1)
            codes[:, :, j] |= part << low
        start, low = start + 64 * plane, low + plane
    return codes


def _rows_of_grid(grid: Tensor, format: Format) -> Tensor:  # (rows, groups)
    """Scales or zeros (tiles, groups, 16) by row."""
    return grid.transpose(1, 2).reshape(-1, format.groups)[: format.rows].contiguous()


def _grids(format: Format, scales: Tensor | None, zeros: Tensor | None) -> dict[str, Tensor]:
    """Scales and zeros in tiles of 16 rows."""
    shape = (format.rows, format.groups)
    if scales is None:
        raise ValueError(f"codes must have scales of shape {shape}. Got none.")
    _expect("scales", scales, torch.float16, shape)
    found = {"scales": _tiled(scales, format)}
    if zeros is not None:
        _expect("zeros", zeros, torch.uint8, shape)
        found["zeros"] = _tiled(zeros, format)
    return found


def _tiled(grid: Tensor, format: Format) -> Tensor:  # (tiles, groups, 16)
    padded = torch.nn.functional.pad(grid, (0, 0, 0, format.tiles * TILE - format.rows))
    return padded.view(format.tiles, TILE, format.groups).transpose(1, 2).contiguous()


def _full_bytes(format: Format) -> int:
    """Bytes of the values of a full weight."""
    return load().values_bytes(format.rows, format.width, format.bits)


def _span(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.nbytes


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Check an input's type, device and shape; None is any length from 1."""
    fits = tensor.dim() == len(shape) and all(
        got >= 1 if want is None else got == want
        for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits or tensor.dtype != dtype or tensor.device.type != "cpu":
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name} must be {dtype} of shape {wanted} on the CPU. "
            f"Got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}."
        )
