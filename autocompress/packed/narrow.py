"""Narrower weights: what is stored of them, in place among the zeros of what is gone."""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.levels import Shape


def widened(
    inner: Tensor,  # (kept outputs, in) or (out, kept inputs)
    shape: Shape,
    kept: Tensor | None,  # (out,) or (in,), bool
) -> Tensor:  # (out, in), float32
    """The full weight; what is kept comes first where nobody knows its places."""
    found = torch.zeros(shape)
    if kept is None:
        found[: inner.shape[0], : inner.shape[1]] = inner
    elif inner.shape[1] < shape[1]:
        found[:, kept] = inner
    else:
        found[kept] = inner
    return found
