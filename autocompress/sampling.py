"""How the next token is drawn from a model's logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.errors import GenerationError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: 0 takes the likeliest; 1 is the model's own distribution.
        top_k: only the k likeliest, at least 1; None is all.
        top_p: only the fewest likeliest tokens that reach this probability, in (0, 1].
        seed: of the draws, 0 ... 2**32 - 1.

    Raises:
        GenerationError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise GenerationError(
                f"temperature must be finite and at least 0. Got {self.temperature}."
            )
        if self.top_k is not None and self.top_k < 1:
            raise GenerationError(f"top_k must be at least 1. Got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p must be above 0 and at most 1. Got {self.top_p}.")
        if not 0 <= self.seed < 2**32:
            raise GenerationError(f"seed must be between 0 and {2**32 - 1}. Got {self.seed}.")

    def picker(self) -> Callable[[Tensor], int]:
        """A function from logits (vocab,) to a token; its draws depend on the seed alone."""
        generator = torch.Generator().manual_seed(self.seed)
        return lambda logits: self._pick(logits, generator)

    def _pick(self, logits: Tensor, generator: torch.Generator) -> int:
        largest, likeliest = logits.max(dim=0)
        if not math.isfinite(largest):
            raise GenerationError(
                f"the model's largest logit must be finite. Got {float(largest)}. "
                "Its weights are damaged, or it overflows in this number format."
            )
        if self.temperature == 0:
            return int(likeliest)
        # Shifted before the division: a tiny temperature must not overflow.
        scaled = (logits.double() - largest.double()) / self.temperature
        tokens = None
        if self.top_k is not None:
            scaled, tokens = scaled.topk(min(self.top_k, len(scaled)))
        elif self.top_p < 1:
            scaled, tokens = scaled.sort(descending=True)
        shares = scaled.softmax(dim=0)
        if self.top_p < 1:
            shares[shares.cumsum(dim=0) - shares >= self.top_p] = 0  # never the first
        drawn = torch.multinomial(shares, 1, generator=generator)
        return int(drawn if tokens is None else tokens[drawn])
