"""Prices: what moving one layer to another level costs beside an allocation."""

from __future__ import annotations

import math
import operator

from autocompress.core import Allocation
from autocompress.levels import Level
from autocompress.predictions import Estimate, Linearization, Sensitivities


def prices_around(
    sensitivities: Estimate, allocation: Allocation, around: Linearization
) -> Estimate:
    """Prices of a level beside the allocation's other layers, up to a constant of each layer.

    For a quadratic loss, moving one layer from its change a to the change v costs
    S(v) - S(a) + (v - a) . H . others, where S is the sensitivity. The slope, taken halfway, is
    half of v . H . everything, so the product with the others is twice the slope less the product
    with the layer's own change, which is 2 overlap sqrt(S(v) S(a)).
    """
    rows = zip(*sensitivities, allocation.levels, *around.slope, around.overlap, strict=True)
    mean: list[dict[Level, float]] = []
    stderr: list[dict[Level, float]] = []
    for value, error, own, slope, slope_error, overlap in rows:
        mean.append(
            {
                level: price
                + 2 * (slope[level] - overlap[level] * math.sqrt(max(0.0, price * value[own])))
                for level, price in value.items()
            }
        )
        stderr.append({level: math.hypot(error[level], 2 * slope_error[level]) for level in value})
    return Estimate(tuple(mean), tuple(stderr))


def mix(prices: Estimate, others: Estimate, share: float) -> Estimate:
    """`prices` but for a `share` of 0 to 1, which is that of `others`; errors are independent."""
    mean, stderr = (
        tuple(
            {
                level: join((1 - share) * value, share * there[level])
                for level, value in here.items()
            }
            for here, there in zip(one, other, strict=True)
        )
        for join, one, other in (
            (operator.add, prices.mean, others.mean),
            (math.hypot, prices.stderr, others.stderr),
        )
    )
    return Estimate(mean, stderr)


def predicted_change(prices: Sensitivities, before: Allocation, after: Allocation) -> float:
    """How much the loss rises from one allocation to another if `prices` are right, nats/token."""
    return sum(
        row[new] - row[old]
        for row, old, new in zip(prices, before.levels, after.levels, strict=True)
        if old != new
    )
