"""A surrogate of the loss: prices, corrected by what trials measured, with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from autocompress.strategies.grid import Indices, Numbers
from autocompress.strategies.surrogate_basis import Basis

SCALES = (1 / 16, 1 / 4, 1.0, 4.0)  # of the variances of a basis; the evidence decides


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A Gaussian posterior over the unknowns of a basis: ridge regression, in closed form.

    Args:
        rows: (trials, features), differences of features, times the root of the scale.
        factor: (trials, trials), Cholesky factor of the covariance of the measured gaps.
        residual: (trials,), gaps that the prior did not predict.
        scale: of the prior's variances.
        noise: (trials,), variances.

    References:
        Rasmussen, Williams, "Gaussian Processes for Machine Learning", 2006, sections 2.1, 5.4.
    """

    basis: Basis
    rows: Numbers
    factor: Numbers
    residual: Numbers
    scale: float
    noise: Numbers

    @classmethod
    def fit(
        cls, basis: Basis, ones: Indices, others: Indices, gaps: Numbers, noise: Numbers
    ) -> Self:
        """The posterior after trials; of the scales, the one that makes them likeliest.

        Args:
            ones: (trials, layers), levels.
            others: (trials, layers), levels of what each was compared with.
            gaps: (trials,), measured differences of losses, nats/token.
            noise: (trials,), variances of `gaps`.
        """
        rows = basis.features(ones) - basis.features(others)
        residual = gaps - (basis.prior(ones) - basis.prior(others))
        gram = rows @ rows.T
        floor = 1e-9 * (1e-12 + float(gram.diagonal().mean()) if len(gaps) else 1.0)
        noise = np.maximum(noise, floor)
        factors: dict[float, Numbers] = {}
        for it in SCALES:
            factors[it] = np.asarray(
                np.linalg.cholesky(it * gram + np.diag(noise)), dtype=np.float64
            )
        scale = max(SCALES, key=lambda it: _evidence(factors[it], residual))
        return cls(basis, math.sqrt(scale) * rows, factors[scale], residual, scale, noise)

    def predict(self, picks: Indices, beside: Indices) -> tuple[Numbers, Numbers]:
        """How much more (allocations, layers) levels lose than the levels `beside` (layers,).

        Returns:
            mean (allocations,) in nats/token, and covariance (allocations, allocations).
        """
        rows = self._rows(picks) - self._rows(beside[None])
        shared = np.linalg.solve(self.factor, self.rows @ rows.T)
        known = np.linalg.solve(self.factor, self.residual)
        prior = self.basis.prior(picks) - self.basis.prior(beside[None])
        return prior + shared.T @ known, rows @ rows.T - shared.T @ shared

    def draw_prices(
        self, beside: Indices, count: int, rng: np.random.Generator
    ) -> Numbers:  # (count, layers, levels)
        """Prices of single changes beside (layers,) levels, each by unknowns that may be true.

        They are up to a constant of each layer.

        References:
            Wilson et al., "Efficiently Sampling Functions from Gaussian Process Posteriors",
            arXiv 2002.09309 (Matheron's rule).
        """
        unknowns = rng.normal(size=(self.rows.shape[1], count))
        noise = rng.normal(size=(len(self.residual), count)) * np.sqrt(self.noise)[:, None]
        missed = self.residual[:, None] - self.rows @ unknowns - noise
        answered = np.linalg.solve(self.factor.T, np.linalg.solve(self.factor, missed))
        unknowns = unknowns + self.rows.T @ answered
        off = math.sqrt(self.scale) * self.basis.singles(unknowns, beside)
        drawn: Numbers = off + self.basis.prices
        return drawn

    def _rows(self, picks: Indices) -> Numbers:
        return math.sqrt(self.scale) * self.basis.features(picks)


def _evidence(factor: Numbers, residual: Numbers) -> float:
    """Log likelihood of the residual, up to a constant."""
    whitened = np.linalg.solve(factor, residual)
    return float(-0.5 * whitened @ whitened - np.log(factor.diagonal()).sum())


def expected_improvement(mean: Numbers, deviation: Numbers) -> Numbers:
    """How far below 0 a normal variable is expected to be, counting 0 where it is above."""
    from scipy.special import ndtr

    z = np.clip(-mean / np.maximum(deviation, 1e-30), -30.0, 30.0)  # of which all is known
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    improvement: Numbers = deviation * density - mean * ndtr(z)
    return improvement


def most_promising(mean: Numbers, covariance: Numbers, noise: float, count: int) -> list[int]:
    """Candidates of most expected improvement, one after the other.

    Each is believed to be what its mean says: the next must improve on that, and knows what the
    measurement would tell, so that equals are not all taken.

    Args:
        mean: (candidates,), loss above the incumbent's.
        covariance: (candidates, candidates).
        noise: variance of a measurement.

    References:
        Ginsbourger et al., "Kriging is well-suited to parallelize optimization", 2010 (the
        Kriging believer).
    """
    left, best = covariance.copy(), 0.0
    chosen: list[int] = []
    for _ in range(min(count, len(mean))):
        deviation = np.sqrt(np.maximum(left.diagonal(), 0.0))
        promise = expected_improvement(mean - best, deviation)
        promise[chosen] = -math.inf
        pick = int(promise.argmax())
        chosen.append(pick)
        best = min(best, float(mean[pick]))
        left -= np.outer(left[pick], left[pick]) / (left[pick, pick] + noise)
    return chosen
