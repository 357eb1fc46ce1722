"""Modules that hold packed weights and compute with them: what a loaded result is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.levels import Dense, Level, Quantize, Shape
from autocompress.models import is_linear, weight_of
from autocompress.packed import dequantize, tensor_shapes, unpack
from autocompress.tracing import embedding_scale


class PackedWeight(nn.Module):
    """A quantized (out, in) weight as buffers `codes`, `scales` and, if asymmetric, `zeros`."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, level: Quantize, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.level, self.shape, self.dtype = level, shape, dtype
        for name, (kind, size) in tensor_shapes(level, shape).items():
            self.register_buffer(name, torch.zeros(size, dtype=kind))

    def dense_weight(self) -> Tensor:  # (out, in), in the dtype the model computes in
        """The weight the codes stand for, exactly as the search stitched it."""
        return dequantize(self.level, self.shape, self._buffers).to(self.dtype)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:  # (out, in)
        """The dense weight, for code that reads a module's weight."""
        weight = self.dense_weight()
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # GPT-2 would fill c_proj
        return weight

    def extra_repr(self) -> str:
        return f"{self.shape[1]} -> {self.shape[0]}, {self.level}"


class PackedLinear(PackedWeight):
    """`x @ W.T + bias` with a packed weight."""

    def __init__(
        self, level: Quantize, shape: Shape, dtype: torch.dtype, bias: nn.Parameter | None
    ) -> None:
        super().__init__(level, shape, dtype)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense_weight(), self.bias)


class PackedEmbedding(PackedWeight):
    """Rows of a packed (vocab, hidden) weight; `scale` is what some models multiply them with."""

    def __init__(
        self, level: Quantize, shape: Shape, dtype: torch.dtype, scale: float | None
    ) -> None:
        super().__init__(level, shape, dtype)
        self.embed_scale = scale

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self._rows(tokens.flatten()).view(*tokens.shape, self.shape[1])
        if self.embed_scale is None:
            return rows
        return rows * torch.tensor(self.embed_scale).to(rows.dtype)

    def _rows(self, tokens: Tensor) -> Tensor:  # (tokens, hidden)
        vocab, width = self.shape
        if width % 8:  # rows do not start at a byte
            return self.dense_weight()[tokens]
        bits, groups = self.level.bits, self.level.groups(width)
        chosen = {
            "codes": self.codes.view(vocab, width * bits // 8)[tokens].flatten(),
            "scales": self.scales[tokens],
        }
        if self.level.symmetric:
            return dequantize(self.level, (len(tokens), width), chosen).to(self.dtype)
        zeros = unpack(self.zeros, bits, vocab * groups).view(vocab, groups)[tokens]
        from autocompress.packed import pack

        chosen["zeros"] = pack(zeros, bits)
        return dequantize(self.level, (len(tokens), width), chosen).to(self.dtype)


class TiedHead(nn.Module):
    """The LM head of a model whose packed embedding it shares."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        self.shared = (embedding,)  # in a tuple: not a submodule, stored once

    @property
    def weight(self) -> Tensor:
        """The shared dense weight, (vocab, hidden)."""
        return self.shared[0].dense_weight()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def pack_modules(model: Any, levels: Mapping[str, Level], dtype: torch.dtype) -> None:
    """Replace modules by packed ones, empty until the file is read.

    Args:
        model: as built from its configuration; dense.
        levels: module name -> level; dense ones stay.
        dtype: what the model computes in.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    for name, level in levels.items():
        if isinstance(level, Dense):
            continue
        old = model.get_submodule(name)
        assert isinstance(level, Quantize)
        rows, width = weight_of(old).shape
        with torch.device(old.weight.device):
            if is_linear(old):
                new: nn.Module = PackedLinear(level, (rows, width), dtype, old.bias)
            else:
                new = PackedEmbedding(level, (rows, width), dtype, embedding_scale(old))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        if old is embedding and tied and head is not None:
            model.set_output_embeddings(TiedHead(new))  # type: ignore[arg-type]
            model.config.get_text_config().tie_word_embeddings = False  # nothing left to tie
            model.all_tied_weights_keys = {}
