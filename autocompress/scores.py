"""Scores: what was measured of one model, window by window. Standard library only."""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import NamedTuple


class Score(NamedTuple):
    """Quality of one model on some windows, window by window.

    Attributes:
        losses: mean KL(dense || candidate) of each window, nats/token; lower is better.
        nlls: mean negative log-likelihood of the next token in each window, nats.
    """

    losses: tuple[float, ...]
    nlls: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean KL(dense || candidate), nats/token."""
        return fmean(self.losses)

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood."""
        mean = fmean(self.nlls)
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def stderr(self) -> float:
        """Standard error of `loss` over windows, nats/token."""
        if len(self.losses) < 2 or not math.isfinite(self.loss):
            return 0.0
        return stdev(self.losses) / math.sqrt(len(self.losses))

    def first(self, windows: int) -> Score:
        """The score on the first windows alone."""
        return Score(self.losses[:windows], self.nlls[:windows])

    def then(self, other: Score) -> Score:
        """The score on these windows and, behind them, those of `other`."""
        return Score(self.losses + other.losses, self.nlls + other.nlls)
