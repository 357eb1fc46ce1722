"""Features of an allocation: what prices may be wrong about, and by how much."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from autocompress.core import SearchSpace
from autocompress.strategies.grid import Indices, Numbers

# Standard deviations of what features are off by, as shares of the sensitivities they stand for.
TOTAL, KIND, BLOCK, LAYER, LEVEL = 0.15, 0.25, 0.15, 0.25, 0.15
PAIRS, PAIR_KIND, PAIR = 0.1, 0.15, 0.1
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
        groups: (layers, unknowns), standard deviation of each unknown that layers share.
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
        groups = np.hstack([
            np.full((len(kinds), 1), TOTAL),
            KIND * _one_hot(kinds),
            BLOCK * _one_hot(blocks),
        ])  # fmt: skip
        pairs = np.array(sorted(_neighbours(blocks, kinds)), dtype=np.intp).reshape(-1, 2)
        pair_kinds = [(kinds[i], kinds[j], blocks[i] == blocks[j]) for i, j in pairs]
        pair_groups = np.hstack([
            np.full((len(pairs), 1), PAIRS),
            PAIR_KIND * _one_hot(pair_kinds),
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
        return np.hstack([
            parts @ self.groups,
            LAYER * parts,
            one_hot.reshape(len(picks), self.parts.size),
            products @ self.pair_groups,
            PAIR * products,
        ])  # fmt: skip

    def singles(self, unknowns: Numbers, beside: Indices) -> Numbers:  # (draws, layers, levels)
        """`features @ unknowns` of every single change, up to a constant of each layer.

        Args:
            unknowns: (features, draws).
            beside: (layers,), levels of all other layers.
        """
        layers, levels = self.parts.shape
        sizes = (self.groups.shape[1], layers, layers * levels, self.pair_groups.shape[1])
        shared, own, level, pair_shared, pair = np.split(unknowns, np.cumsum(sizes))
        factors = LEVEL * level.reshape(layers, levels, -1)
        factors += (self.groups @ shared + LAYER * own)[:, None]
        multiples = self.pair_groups @ pair_shared + PAIR * pair
        roots = np.sqrt(self.parts[np.arange(layers), beside])
        pull = np.zeros((layers, unknowns.shape[1]))  # of a layer's neighbours on its root
        for one, other in (self.pairs, self.pairs[::-1]):
            np.add.at(pull, one, roots[other, None] * multiples)
        found: Numbers = self.parts[..., None] * factors
        found += np.sqrt(self.parts)[..., None] * pull[:, None]
        return np.moveaxis(found, 2, 0)


def _places(space: SearchSpace) -> tuple[list[int], list[str]]:
    """Block and kind of every layer; one without a number in its name has a block of its own."""
    blocks, kinds = [], []
    for number, layer in enumerate(space.layers):
        match = _NAME.match(layer.name)
        blocks.append(int(match[1]) if match else -1 - number)
        kinds.append(match[2] if match else layer.name)
    return blocks, kinds


def _neighbours(blocks: Sequence[int], kinds: Sequence[str]) -> set[tuple[int, int]]:
    """Pairs of layers, the earlier first."""
    near, alike = defaultdict(list), defaultdict(list)
    for layer, (block, kind) in enumerate(zip(blocks, kinds, strict=True)):
        near[block].append(layer)
        alike[kind, block].append(layer)
    found = set(itertools.pairwise(range(len(kinds))))
    for row in near.values():
        found.update((i, j) for i, j in itertools.combinations(row, 2) if j - i < REACH)
    for (kind, block), row in alike.items():
        for pair in itertools.product(row, alike.get((kind, block + 1), ())):
            found.add((min(pair), max(pair)))
    return found


def _one_hot(labels: Sequence[object]) -> Numbers:  # (labels, different labels)
    """A row per label with a one in the label's column."""
    columns = {label: column for column, label in enumerate(dict.fromkeys(labels))}
    found = np.zeros((len(labels), len(columns)))
    found[np.arange(len(labels)), [columns[label] for label in labels]] = 1.0
    return found
