"""Sensitivities: the loss increase of every (layer, level), from a few forward-backward passes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autocompress.gradients import (
    Advance,
    Series,
    estimate_of,
    gradient_passes,
    output_change,
)
from autocompress.levels import Level, is_unchanged
from autocompress.predictions import Estimate
from autocompress.stitch import StitchedModel

METHODS = ("scaled", "kronecker", "exact", "diagonal")


def fisher_sensitivities(
    stitched: StitchedModel,
    windows: np.ndarray,  # (n, window) int64
    seed: int = 0,
    method: str = "scaled",
    progress: Advance = lambda done, total: None,
) -> Estimate:
    """Second-order estimate of KL(dense || one layer at one level, the others dense).

    Half the token mean of (gT dW x)^2: x is the layer's input, dW its change, g a random vector
    whose mean of g gT is the Fisher information, the curvature of the KL divergence at zero. It is
    the gradient with respect to the layer's output that begins at the logits as a random root of
    their own curvature. The negative log-likelihood of labels sampled from the model would have
    the same mean, but more of it rests on the few labels that the model thought unlikely.

    Args:
        stitched: made dense first.
        windows: tokens to average over.
        seed: of the random roots.
        method: 'exact' multiplies every token by every dW. 'kronecker' takes g and x for
            independent and the rows of g for uncorrelated: the mean g^2 of every output times its
            squared error, which the database knows. 'scaled' is that, times the factor that makes
            it exact at one level of the layer. 'diagonal' also takes the inputs for uncorrelated:
            mean g^2 times mean x^2 times dW^2, summed over all weights. Tied weights and
            embeddings are always exact.
        progress: called with (windows done, windows in all).

    Returns:
        nats/token, with standard errors over windows.

    References:
        Martens, New Insights and Perspectives on the Natural Gradient Method, arXiv:1412.1193,
        section 9 (the Fisher is the Gauss-Newton matrix).
        Kunstner et al., Limitations of the empirical Fisher approximation, arXiv:1905.12558, eq. 3.
        Martens, Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature,
        arXiv:1503.05671, section 3.
    """
    model, space = stitched.restore(), stitched.space
    curves = {
        name: _Curve(stitched, name, stored, method, len(windows))
        for layer, levels in zip(space.layers, space.levels, strict=True)
        for name, stored in zip(layer.modules, layer.stored_at(levels), strict=True)
    }
    generator = torch.Generator().manual_seed(seed)

    def slope(window: int, logits: Tensor) -> Tensor:
        return _random_root(logits.float().softmax(1), generator)

    def collect(window: int, name: str, inputs: Tensor, gradient: Tensor) -> None:
        curves[name].add(window, inputs, gradient)

    changing = [name for name, curve in curves.items() if curve.changes]
    gradient_passes(model, changing, torch.from_numpy(windows), slope, collect, progress)
    scale = 1 / (2 * windows.shape[1])
    layers = [sum(curves[name].series() for name in layer.modules) for layer in space.layers]
    return estimate_of(space.levels, [np.asarray(layer) * scale for layer in layers])


class _Curve:
    """Sums over tokens of (gT dW x)^2 of one module at its levels, window by window."""

    def __init__(
        self,
        stitched: StitchedModel,
        name: str,
        levels: Sequence[Level],
        method: str,
        windows: int,
    ) -> None:
        self._stitched, self._name, self._levels = stitched, name, levels
        self._module = stitched.model.get_submodule(name)
        changing = [i for i, level in enumerate(levels) if not is_unchanged(level)]
        if name in stitched.tied or self._module is stitched.model.get_input_embeddings():
            method = "exact"
        self._exact = {"exact": changing, "kronecker": [], "diagonal": []}.get(
            method, changing[len(changing) // 2 :][:1]
        )
        self._method, self._changing = method, changing
        self._sums, self._products = np.zeros((2, windows, len(levels)))
        if method in ("scaled", "kronecker"):
            rows = [stitched.database.row_errors(name, levels[i]) for i in changing]
            self._rows = dict(zip(changing, rows, strict=True))

    @property
    def changes(self) -> bool:
        """Whether any level changes the module."""
        return bool(self._changing)

    @torch.no_grad()
    def add(self, window: int, inputs: Tensor, gradient: Tensor) -> None:
        """Take one window in: (tokens, in) or token numbers (tokens,), and (tokens, out)."""
        gradient = gradient.float()
        for i in self._exact:
            change = self._stitched.change(self._name, self._levels[i])
            moved = output_change(self._module, change.to(self._module.weight.dtype), inputs)
            self._sums[window, i] += float((moved.float() * gradient).sum(1).square().sum())
        if self._method == "exact":
            return
        energy = gradient.square().sum(0)
        if self._method == "diagonal":
            second = inputs.float().square().mean(0)
            for i in self._changing:
                change = self._stitched.change(self._name, self._levels[i])
                self._products[window, i] = float(energy @ (change.square() @ second))
        else:
            for i, rows in self._rows.items():
                self._products[window, i] = float(energy @ rows)

    def series(self) -> Series:
        """The estimate of every window and level."""
        if self._method == "exact":
            return self._sums
        if not self._exact:
            return self._products
        (at,) = self._exact
        shape = self._products.sum(0)
        return np.outer(self._sums[:, at], shape / shape[at] if shape[at] > 0 else 0 * shape)


def _random_root(
    chance: Tensor,  # (tokens, vocab), float32
    generator: torch.Generator,
) -> Tensor:  # (tokens, vocab)
    """Vectors v with the mean of v vT over draws diag(p) - p pT: (diag(sqrt p) - p sqrt(p)T) e.

    Signs e are fair, which has the least variance of all independent draws (Hutchinson).
    """
    signs = torch.randint(0, 2, chance.shape, generator=generator, dtype=torch.int8)
    drawn = chance.sqrt().mul_(signs.mul_(2).sub_(1))
    return drawn.sub_(chance * drawn.sum(1, keepdim=True))
