"""Give a model packed modules in place of dense ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autocompress.levels import Dense, Level, Rows, Shape, Width
from autocompress.models import is_linear, weight_of
from autocompress.removal import GONE, Removed, ZeroLinear, is_removed, remove_modules
from autocompress.runtime import (
    ACTIVATIONS,
    PackedEmbedding,
    PackedLinear,
    TiedHead,
    configure,
    prepare_first,
)
from autocompress.tracing import embedding_scale


def pack_modules(
    model: Any,
    levels: Mapping[str, Level],
    dtype: torch.dtype,
    activations: str = ACTIVATIONS,
    removed: Removed | None = None,
) -> None:
    """Replace modules by packed ones, empty until the file is read.

    The first forward of the model prepares all of them.

    Args:
        model: as built from its configuration; dense.
        levels: module name -> level; dense ones stay.
        dtype: what the model computes in.
        activations: 'int8', 'bfloat16' or 'float32'.
        removed: what `find_removed` found for these levels.
    """
    if removed:
        remove_modules(model, removed, levels)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    for name, level in levels.items():
        if isinstance(level, Dense) or is_removed(name, removed):
            continue
        old = model.get_submodule(name)
        new = _empty(old, level, dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        if old is embedding and tied and head is not None:
            model.set_output_embeddings(TiedHead(new))  # type: ignore[arg-type]
            model.config.get_text_config().tie_word_embeddings = False  # nothing left to tie
            model.all_tied_weights_keys = {}
    configure(model, activations)
    model.register_forward_pre_hook(prepare_first)


def _empty(old: Any, level: Level, dtype: torch.dtype) -> nn.Module:
    """A module that takes the place of a dense one."""
    rows, width = weight_of(old).shape
    with torch.device(old.weight.device):
        if isinstance(level, GONE):
            return ZeroLinear((rows, width), old.bias)
        if isinstance(level, Width | Rows):
            return _narrow(old, level, level.inner_shape((rows, width)), dtype)
        if is_linear(old):
            return PackedLinear(level, (rows, width), dtype, old.bias)
        return PackedEmbedding(level, (rows, width), dtype, embedding_scale(old))


def _narrow(old: Any, level: Width | Rows, shape: Shape, dtype: torch.dtype) -> nn.Module:
    """A smaller linear map; its bias has as many numbers as it has outputs."""
    bias = None
    if old.bias is not None:
        bias = nn.Parameter(torch.empty(shape[0], dtype=dtype), requires_grad=False)
    if level.codes is not None:
        return PackedLinear(level.codes, shape, dtype, bias)
    made = nn.Linear(shape[1], shape[0], bias=bias is not None, dtype=dtype)
    return made.requires_grad_(False)
