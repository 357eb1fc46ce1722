"""A whole decoder of the Llama family in one native call per token: no Python between matrices."""

from __future__ import annotations

import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress_kernels.calls import MATRIX, matrix
from autocompress_kernels.formats import MODES, Packed
from autocompress_kernels.library import failure, load

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
VECTORS = (
    *("q_bias", "k_bias", "v_bias", "o_bias"),
    *("input_norm", "post_norm", "q_norm", "k_norm"),
)
POINTER = struct.Struct("@P")


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Args:
        matrices: `MATRICES` by name: all, or those of attention or of the MLP alone.
        vectors: those of `VECTORS` that the block has, float32; what is there needs its norm of
            rows.
    """

    matrices: dict[str, Packed]
    vectors: dict[str, Tensor]


@dataclass(frozen=True)
class Llama:
    """What a decoder is made of.

    Args:
        embedding, head: (vocab, hidden); the same object where they are tied.
        final_norm: (hidden,), float32.
        cosine, sine: (capacity, head_dim / 2), float32: rotations of each position.
        epsilon: of the norms.
        mode: 'a8', 'a16' or 'a32'.
    """

    blocks: Sequence[Block]
    embedding: Packed
    head: Packed
    final_norm: Tensor
    cosine: Tensor
    sine: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    mode: str

    @property
    def capacity(self) -> int:
        """Positions."""
        return len(self.cosine)


class Steps:
    """The decoder, opened: tokens in, logits out. One sequence, one caller at a time.

    Keys and values of all positions seen are kept inside, as bf16.

    Raises:
        ValueError: shapes do not fit together.
        RuntimeError: the kernels are missing.
    """

    def __init__(self, llama: Llama) -> None:
        self.vocab, self.capacity = llama.embedding.format.rows, llama.capacity
        blocks = torch.frombuffer(
            bytearray(b"".join(_block(block) for block in llama.blocks)), dtype=torch.uint8
        )
        description = b"".join(
            (
                struct.pack("@qq", len(llama.blocks), llama.heads),
                struct.pack("@qqq", llama.kv_heads, llama.head_dim, llama.capacity),
                _matrix(llama.embedding),
                _matrix(llama.head),
                *(_pointer(t) for t in (llama.final_norm, llama.cosine, llama.sine)),
                _pointer(blocks, torch.uint8),
                struct.pack("@fi", llama.epsilon, MODES[llama.mode]),
            )
        )
        self._library = load()
        self._keep = (llama, blocks)  # the handle points into them
        self._handle = self._library.open_llama(description)
        weakref.finalize(self, self._library.close_llama, self._handle)

    def step(
        self,
        tokens: Tensor,  # (count,), int64, contiguous
        position: int,
    ) -> Tensor:  # (vocab,), float32
        """Read tokens at `position` and after; logits behind the last one.

        Raises:
            ValueError: a token is not in the vocabulary, or a position not in the capacity.
        """
        if tokens.dtype != torch.int64 or tokens.dim() != 1 or not tokens.is_contiguous():
            raise ValueError(
                f"tokens must be a contiguous row of int64. Got {tokens.dtype}, "
                f"shape {tuple(tokens.shape)}."
            )
        logits = torch.empty(self.vocab)
        code = self._library.llama_step(
            self._handle,
            tokens.data_ptr(),
            len(tokens),
            position,
            logits.data_ptr(),
            self._library.parallel,
            torch.get_num_threads(),
        )
        if code:
            raise failure(code, f"{len(tokens)} tokens at position {position} of {self.capacity}")
        return logits


def _block(block: Block) -> bytes:
    matrices = b"".join(_matrix(block.matrices.get(name)) for name in MATRICES)
    return matrices + b"".join(_pointer(block.vectors.get(name)) for name in VECTORS)


def _matrix(packed: Packed | None) -> bytes:
    if packed is None:
        return bytes(MATRIX.size)
    values, scales, zeros, masks, offsets = packed.parts
    assert values is not None
    return matrix(values, scales, zeros, masks, offsets, *packed.numbers)


def _pointer(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> bytes:
    if tensor is None:
        return POINTER.pack(0)
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"vectors must be contiguous and {dtype}. Got {tensor.dtype}.")
    return POINTER.pack(tensor.data_ptr())
