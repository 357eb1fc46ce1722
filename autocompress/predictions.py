"""Predictions of losses, from gradients. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from autocompress.levels import Level

Sensitivities = tuple[Mapping[Level, float], ...]  # per layer, level -> predicted nats/token


class Estimate(NamedTuple):
    """Sensitivities, or shares of a loss, with their standard errors.

    Args:
        mean: per layer, level -> nats/token.
        stderr: likewise.
    """

    mean: Sensitivities
    stderr: Sensitivities

    def bound(self, errors: float) -> Sensitivities:
        """Pessimistic sensitivities: the mean plus `errors` standard errors."""
        return tuple(
            {level: value + errors * row[level] for level, value in mean.items()}
            for mean, row in zip(self.mean, self.stderr, strict=True)
        )


class Linearization(NamedTuple):
    """The loss around an allocation.

    Args:
        slope: per layer, level -> how fast the loss changes when the layer's weight moves by what
            the level changes of the dense one, taken halfway between the dense model and the
            allocation; nats/token.
        overlap: per layer, level -> correlation between what this level and the allocation's
            change of the weight, -1 to 1; 1 at the allocation's own.
    """

    slope: Estimate
    overlap: Sensitivities
