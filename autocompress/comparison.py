"""Compares two models on the same windows from full logits: exact, and so for final figures only.

A search keeps the dense model's most likely tokens (`quality.py`), which makes its loss a lower
bound. Here both models run side by side, and nothing is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autocompress.quality import ROWS, TOP, divergence, vocabulary_of, window_logits


class Window(NamedTuple):
    """Figures of one window, means over its positions.

    Args:
        kl: KL(dense || candidate), nats/token.
        kl_reverse: KL(candidate || dense), nats/token.
        kl_top: KL(dense || candidate) as a search measures it, from the dense model's 512 most
            likely tokens, nats/token; at most `kl`.
        agreement: share of positions at which both find the same token likeliest.
        nll: of the candidate: negative log-likelihood of the next token, nats.
        nll_dense: of the dense model.
    """

    kl: float
    kl_reverse: float
    kl_top: float
    agreement: float
    nll: float
    nll_dense: float


@dataclass(frozen=True)
class Comparison:
    """What two models do differently, window by window.

    Args:
        windows: in the order of the tokens given.
        length: tokens per window; a next token is predicted at all but the last.
    """

    windows: tuple[Window, ...]
    length: int

    def mean(self, figure: str) -> float:
        """Mean over windows of a figure, by its name in `Window`."""
        return fmean(self._values(figure))

    def stderr(self, figure: str) -> float:
        """Standard error of that mean; 0 where there is only one window."""
        values = self._values(figure)
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return 0.0
        return stdev(values) / math.sqrt(len(values))

    def perplexity(self, figure: str = "nll") -> float:
        """Exp of the mean of `nll` or `nll_dense`."""
        mean = self.mean(figure)
        return math.exp(mean) if mean < 700 else math.inf

    def bits_per_byte(
        self,
        text_bytes: int,  # that the predicted tokens stand for
        figure: str = "nll",
    ) -> float:
        """All information in the predicted tokens over their bytes of UTF-8 text.

        Models of different tokenizers compare by it. Separators between documents are predicted
        like any token and stand for no bytes.
        """
        nats = sum(self._values(figure)) * (self.length - 1)
        return nats / math.log(2) / text_bytes

    def _values(self, figure: str) -> list[float]:
        return [float(getattr(window, figure)) for window in self.windows]


@torch.inference_mode()
def compare(
    dense: Any,
    candidate: Any,
    windows: np.ndarray,  # (n, window) int64
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Both models on every window, from their full logits in float32."""
    tokens = torch.from_numpy(windows)
    pairs = zip(window_logits(dense, tokens), window_logits(candidate, tokens), strict=True)
    found = []
    for row, (ours, theirs) in zip(tokens, pairs, strict=True):
        found.append(_window(ours, theirs, row, min(TOP, vocabulary_of(dense))))
        progress(len(found), len(tokens))
    return Comparison(tuple(found), tokens.shape[1])


def _window(
    dense: Tensor,  # (window, vocab), logits
    candidate: Tensor,  # (window, vocab)
    tokens: Tensor,  # (window,), int64
    top: int,
) -> Window:
    """A few rows at a time: a whole window at 49 k tokens would leave the caches."""
    following = tokens.roll(-1)
    sums = torch.zeros(len(Window._fields), dtype=torch.float64)
    for start in range(0, len(tokens), ROWS):
        rows = torch.arange(start, min(start + ROWS, len(tokens)))
        logp, logq = dense[rows].float().log_softmax(1), candidate[rows].float().log_softmax(1)
        p, q, difference = logp.exp(), logq.exp(), logp - logq
        likely = logp.topk(top, 1, sorted=False)
        tail = (1 - likely.values.double().exp().sum(1)).clamp_min(0).float()
        followed = (rows < len(tokens) - 1).double()
        wanted = following[rows].unsqueeze(1)
        sums += torch.stack(
            [
                (p * difference).sum().double(),
                -(q * difference).sum().double(),
                divergence(likely.values, tail, logq.gather(1, likely.indices)).sum().double(),
                (dense[rows].argmax(1) == candidate[rows].argmax(1)).sum().double(),
                -(logq.gather(1, wanted)[:, 0].double() * followed).sum(),
                -(logp.gather(1, wanted)[:, 0].double() * followed).sum(),
            ]
        )
    counts = [len(tokens)] * 4 + [len(tokens) - 1] * 2
    return Window(*(float(total) / count for total, count in zip(sums, counts, strict=True)))
