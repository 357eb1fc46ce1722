"""One block of memory on huge pages for the weights of a whole model.

Weights are read once per token, in order. On 4 KiB pages that costs a third to a half of the
memory bandwidth in address translation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autocompress_kernels.formats import TAIL
from autocompress_kernels.library import load

PAGE = 2 << 20  # bytes of a huge page
ALIGNMENT = 64  # bytes, a cache line


def arena(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of CPU tensors side by side in one 2 MiB-aligned block, advised before it is written.

    Args:
        tensors: any shapes and types.

    Returns:
        Contiguous views of the block, 64-byte aligned, with 64 readable bytes behind each.

    Raises:
        RuntimeError: the kernels are missing.
    """
    starts = []
    end = 0
    for tensor in tensors:
        starts.append(end)
        end += -(-(tensor.nbytes + TAIL) // ALIGNMENT) * ALIGNMENT
    whole = -(-end // PAGE) * PAGE
    buffer = torch.empty(whole + PAGE, dtype=torch.uint8)
    block = buffer[-buffer.data_ptr() % PAGE :][:whole]
    load().huge_pages(block)
    return [_copy(tensor, block, start) for tensor, start in zip(tensors, starts, strict=True)]


def _copy(tensor: Tensor, block: Tensor, start: int) -> Tensor:
    """A contiguous copy of `tensor` at `start` bytes of `block`."""
    view = block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return view.copy_(tensor)
