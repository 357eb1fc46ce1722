"""Outlier shares: how many of a block's weights matter far more than its mean, for OWL."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.core import SearchSpace
from autocompress.errors import ConfigError
from autocompress.models import weight_of
from autocompress.summary import block_of
from autocompress.tracing import hidden_states


def outlier_shares(
    model: Any,
    space: SearchSpace,
    windows: np.ndarray,  # (n, window) int64
    multiple: float = 5.0,
) -> tuple[float, ...]:
    """Per layer, the share of its block's weights whose score is above `multiple` times the mean.

    A weight's score is its magnitude times the norm of its input over all tokens of the dense
    model; the mean is that of all scores of a block.

    Args:
        model: dense causal LM.
        space: whose layers' weights are scored; layers that no token reached count nothing.
        windows: calibration tokens.
        multiple: above 0; the paper takes 3 to 10, 5 for LLaMA.

    Raises:
        ConfigError: a multiple of 0 or less.

    References:
        Yin et al., Outlier Weighed Layerwise Sparsity (OWL), arXiv:2310.05175, section 3.
    """
    if not multiple > 0:
        raise ConfigError(f"multiple must be above 0. Got {multiple}.")
    energies = _input_energies(model, space, windows)
    scores: defaultdict[object, list[Tensor]] = defaultdict(list)
    for layer in space.layers:
        for name in filter(energies.__contains__, layer.modules):
            weight = weight_of(model.get_submodule(name)).detach().float()
            scores[block_of(layer)].append((weight.abs() * energies[name].sqrt()).flatten())
    shares = {}
    for block, parts in scores.items():
        every = torch.cat(parts)
        shares[block] = float((every > multiple * every.mean()).float().mean())
    return tuple(shares.get(block_of(layer), 0.0) for layer in space.layers)


@torch.inference_mode()
def _input_energies(model: Any, space: SearchSpace, windows: np.ndarray) -> dict[str, Tensor]:
    """Module -> (in,), the sum of squares of every input over all tokens."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].is_floating_point():  # not the token numbers of an embedding
                found[name] = args[0].float().square().flatten(0, -2).sum(0)

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [watch(name) for layer in space.layers for name in layer.modules]
    try:
        hidden_states(model, torch.from_numpy(windows))
    finally:
        for handle in handles:
            handle.remove()
    return found
