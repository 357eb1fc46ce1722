"""A surrogate of the loss: prices, corrected by what trials measured, with their uncertainty."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from autocompress.core import SearchSpace
from autocompress.strategies.grid import Indices, Numbers

# Standard deviations of what features are off by, as shares of the sensitivities they stand for.
TOTAL, KIND, BLOCK, LAYER, LEVEL = 0.15, 0.25, 0.15, 0.25, 0.15
PAIRS, PAIR_KIND, PAIR = 0.1, 0.15, 0.1
SCALES = (1 / 16, 1 / 4, 1.0, 4.0)  # of all these variances; the evidence decides
REACH = 8  # layers of a block that are this far apart, or more, are no neighbours
_NAME = re.compile(r"(?:.*?\.)??(\d+)\.(.+)")  # the first number of a layer's name is its block


@dataclass(frozen=True, eq=False)
class Basis:
    """Features of an allocation, each scaled by how far the prices may be off there.

    A layer's error is its sensitivity times one plus unknowns shared by all layers, by its kind
    (all `mlp.down_proj`), by its block, and its own, per level too. Pairs of neighbours add
    unknown multiples of the geometric mean of their sensitivities, which is how far two errors
    can add up or cancel out: of all pairs, of a pair of kinds, and of the pair itself.
    Neighbours are layers of one block, layers that follow each other, and layers of one kind in
    blocks that follow each other.

    Args:
        prices: (layers, levels), nats/token; the prior's mean.
        parts: (layers, levels), sensitivities, nats/token, not negative.
        groups: (layers, unknowns), standard deviation of each unknown that a layer shares.
        pairs: (2, pairs), layers.
        pair_groups: (pairs, unknowns), likewise.
    """

    prices: Numbers
    parts: Numbers
    groups: Numbers
    pairs: Indices
    pair_groups: Numbers

    @classmethod
    def of(cls, space: SearchSpace, prices: Numbers, parts: Numbers) -> Self:
        """The features of a space."""
        blocks, kinds = _places(space)
        count = len(kinds)
        groups = np.hstack([
            np.full((count, 1), TOTAL),
            KIND * _one_hot(kinds),
            BLOCK * _one_hot(blocks),
            LAYER * np.eye(count),
        ])  # fmt: skip
        pairs = np.array(_neighbours(blocks, kinds), dtype=np.intp).reshape(-1, 2)
        pair_kinds = [(kinds[i], kinds[j], blocks[i] == blocks[j]) for i, j in pairs]
        pair_groups = np.hstack([
            np.full((len(pairs), 1), PAIRS),
            PAIR_KIND * _one_hot(pair_kinds),
            PAIR * np.eye(len(pairs)),
        ])  # fmt: skip
        return cls(prices, np.maximum(parts, 0.0), groups, pairs.T, pair_groups)

    def prior(self, picks: Indices) -> Numbers:  # (allocations,)
        """The sum of the prices of (allocations, layers) levels."""
        total: Numbers = self.prices[np.arange(picks.shape[1]), picks].sum(axis=1)
        return total

    def features(self, picks: Indices) -> Numbers:  # (allocations, features)
        """Features of (allocations, layers) levels."""
        layers = np.arange(picks.shape[1])
        parts = self.parts[layers, picks]
        one_hot = np.zeros((len(picks), *self.parts.shape))
        one_hot[np.arange(len(picks))[:, None], layers, picks] = LEVEL * parts
        roots = np.sqrt(parts)
        products = roots[:, self.pairs[0]] * roots[:, self.pairs[1]]
        flat = one_hot.reshape(len(picks), self.parts.size)
        return np.hstack([parts @ self.groups, flat, products @ self.pair_groups])


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

        References:
            Wilson et al., "Efficiently Sampling Functions from Gaussian Process Posteriors",
            arXiv 2002.09309 (Matheron's rule).
        """
        layers, levels = self.basis.parts.shape
        singles = np.repeat(beside[None], layers * levels, axis=0)
        singles[np.arange(len(singles)), np.repeat(np.arange(layers), levels)] = np.tile(
            np.arange(levels), layers
        )
        unknowns = rng.normal(size=(self.rows.shape[1], count))
        noise = rng.normal(size=(len(self.residual), count)) * np.sqrt(self.noise)[:, None]
        missed = self.residual[:, None] - self.rows @ unknowns - noise
        answered = np.linalg.solve(self.factor.T, np.linalg.solve(self.factor, missed))
        unknowns = unknowns + self.rows.T @ answered
        off = self._rows(singles) @ unknowns
        drawn: Numbers = np.moveaxis(off.reshape(layers, levels, count), 2, 0) + self.basis.prices
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


def _places(space: SearchSpace) -> tuple[list[int], list[str]]:
    """Block and kind of every layer; one without a number in its name has a block of its own."""
    blocks, kinds = [], []
    for number, layer in enumerate(space.layers):
        match = _NAME.match(layer.name)
        blocks.append(int(match[1]) if match else -1 - number)
        kinds.append(match[2] if match else layer.name)
    return blocks, kinds


def _neighbours(blocks: Sequence[int], kinds: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of layers, the earlier first."""
    return [
        (i, j)
        for i, j in itertools.combinations(range(len(kinds)), 2)
        if j == i + 1
        or (blocks[i] == blocks[j] and j - i < REACH)
        or (kinds[i] == kinds[j] and abs(blocks[j] - blocks[i]) == 1)
    ]


def _one_hot(labels: Sequence[object]) -> Numbers:  # (labels, different labels)
    """A row per label with a one in the label's column."""
    columns = {label: column for column, label in enumerate(dict.fromkeys(labels))}
    found = np.zeros((len(labels), len(columns)))
    found[np.arange(len(labels)), [columns[label] for label in labels]] = 1.0
    return found
