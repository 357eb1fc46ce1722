"""Linearization: the loss around an allocation, interactions of layers included."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from autocompress.core import Allocation
from autocompress.gradients import Advance, estimate_of, gradient_passes, weight_gradient
from autocompress.levels import Level, is_unchanged
from autocompress.predictions import Linearization, Sensitivities
from autocompress.quality import Teacher, divergence_slope
from autocompress.stitch import StitchedModel

HALF = 0.5
FOLDS = 4  # parts of the windows, from whose differences the standard errors come


def linearize(
    stitched: StitchedModel,
    allocation: Allocation,
    reference: Teacher,
    progress: Advance = lambda done, total: None,
) -> Linearization:
    """First-order terms of KL(dense || allocation), halfway between the two.

    For a loss that is a quadratic form of all changes, the slope of a level is half the sum of its
    products with every change of the allocation; so the slopes of the allocation's own levels sum
    to its loss. They are its integrated gradients by the midpoint rule: the part of a layer and
    half of every term it shares with others.

    Args:
        stitched: its dense model is restored when this returns. The gradients of all weights in
            scope take as much memory as these weights in float32.
        reference: the dense model's distributions on the windows to use.
        progress: called with (windows done, windows in all).

    References:
        Sundararajan, Taly, Yan, Axiomatic Attribution for Deep Networks, arXiv:1703.01365, eq. 1.
    """
    space = stitched.space
    stored = {
        name: own
        for layer, levels in zip(space.layers, space.levels, strict=True)
        for name, own in zip(layer.modules, layer.stored_at(levels), strict=True)
    }
    changing = [
        name for name, own in stored.items() if any(not is_unchanged(level) for level in own)
    ]
    folds = np.array_split(np.arange(len(reference.windows)), min(FOLDS, len(reference.windows)))
    slopes = [np.zeros((len(folds), len(levels))) for levels in space.levels]
    stitched.blend(allocation, HALF)
    try:
        for number, rows in enumerate(folds):
            gradients = _gradients(stitched, changing, reference.rows(torch.from_numpy(rows)))
            for index, layer in enumerate(space.layers):
                for name in set(layer.modules) & gradients.keys():
                    found = [_product(stitched, name, lv, gradients[name]) for lv in stored[name]]
                    slopes[index][number] += np.array(found) / len(rows)
            progress(int(rows[-1]) + 1, len(reference.windows))
    finally:
        stitched.restore()
    return Linearization(estimate_of(space.levels, slopes), _overlaps(stitched, allocation))


def _gradients(
    stitched: StitchedModel, modules: list[str], reference: Teacher
) -> dict[str, Tensor]:
    """Gradients of the summed window losses with respect to the weights, (out, in) float32."""
    model = stitched.model
    found: dict[str, Tensor] = {}

    @torch.no_grad()
    def collect(window: int, name: str, inputs: Tensor, gradient: Tensor) -> None:
        part = weight_gradient(model.get_submodule(name), inputs, gradient).float()
        found[name] = found[name].add_(part) if name in found else part

    def slope(window: int, logits: Tensor) -> Tensor:
        """Of the window's mean divergence from the dense model."""
        return divergence_slope(logits, reference.rows(window)) / len(logits)

    gradient_passes(model, modules, reference.windows, slope, collect)
    return found


def _product(stitched: StitchedModel, name: str, level: Level, gradient: Tensor) -> float:
    """Derivative of the loss in the direction of what a level changes."""
    return float(torch.dot(gradient.flatten(), stitched.change(name, level).flatten()))


def _overlaps(stitched: StitchedModel, allocation: Allocation) -> Sensitivities:
    """Correlations of the changes of every level and of the allocation's own."""
    rows = []
    for layer, levels, own in zip(
        stitched.space.layers, stitched.space.levels, allocation.levels, strict=True
    ):
        products = stitched.products(layer, levels)
        size = np.sqrt(np.outer(products.diagonal(), products.diagonal()))
        overlap = np.divide(products, size, out=np.zeros_like(products), where=size > 0)
        rows.append(dict(zip(levels, map(float, overlap[levels.index(own)]), strict=True)))
    return tuple(rows)
