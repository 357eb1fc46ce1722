"""Sensitivities: the loss increase of every (layer, level), from a few forward-backward passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.core import SearchSpace
from autocompress.database import LevelDatabase
from autocompress.errors import StudyError
from autocompress.files import write_json
from autocompress.levels import Dense, Level, parse_level
from autocompress.models import weight_of
from autocompress.stitch import StitchedModel, tied_modules
from autocompress.tracing import embedding_scale

BATCH = 2  # windows per pass: activations of all blocks are kept for the backward pass


def fisher_sensitivities(
    model: Any,
    space: SearchSpace,
    database: LevelDatabase,
    windows: np.ndarray,  # (n, window) int64
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[Level, float], ...]:  # per layer, level -> nats/token
    """Second-order estimate of KL(dense || one layer at one level, the others dense).

    Half the token mean of (gT dW x)^2: x is the layer's input, dW its change, g the gradient of the
    negative log-likelihood with respect to its output, labels sampled from the model itself (so the
    mean of g gT is the Fisher information, the curvature of the KL divergence at zero).

    Args:
        model: the dense model.
        space: layers and levels.
        database: holds every level but dense.
        windows: tokens to average over.
        seed: of the sampled labels.
        progress: called with (windows done, windows in all).

    References:
        Kunstner et al., Limitations of the empirical Fisher approximation, arXiv:1905.12558, eq. 3.
    """
    names = {name: i for i, layer in enumerate(space.layers) for name in layer.modules}
    sums = [dict.fromkeys(levels, 0.0) for levels in space.levels]
    generator = torch.Generator().manual_seed(seed)

    def collect(name: str, inputs: Tensor, gradient: Tensor) -> None:
        for level in space.levels[names[name]]:
            if not isinstance(level, Dense):
                delta = _change(model, database, name, level, lookup=not inputs.is_floating_point())
                sums[names[name]][level] += _square(inputs, delta, gradient)

    tied = tied_modules(model)  # a head reads its embedding's weight: its change counts too
    handles = [
        _watch(model, user, partial(collect, name))
        for name in names
        for user in (name, *tied.get(name, ()))
    ]
    try:
        for start in range(0, len(windows), BATCH):
            tokens = torch.from_numpy(windows[start : start + BATCH])
            _backward(model, tokens, generator)
            progress(min(start + BATCH, len(windows)), len(windows))
    finally:
        for handle in handles:
            handle.remove()
    return tuple({lv: s / (2 * windows.size) for lv, s in row.items()} for row in sums)


def _watch(
    model: Any, name: str, collect: Callable[[Tensor, Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    """Call `collect(input, gradient of the output)` whenever the module is passed backwards."""

    def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = args[0].detach()
        output.register_hook(lambda gradient: collect(inputs, gradient))

    return model.get_submodule(name).register_forward_hook(forward)


def _backward(model: Any, tokens: Tensor, generator: torch.Generator) -> None:
    """Gradients of the summed negative log-likelihood of labels sampled from the model."""
    embedded = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_(), prepend=True
    )
    try:
        with torch.enable_grad():
            logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
            with torch.no_grad():
                chance = logits.float().softmax(1)
                labels = _sample(chance, generator)
                chance[torch.arange(len(labels)), labels] -= 1  # d nll / d logits
            logits.backward(chance.to(logits.dtype))
    finally:
        embedded.remove()


def _sample(
    chance: Tensor,  # (tokens, vocab), float32
    generator: torch.Generator,
) -> Tensor:  # (tokens,), int64
    """One draw per row by inverting its distribution; `multinomial` draws one per entry."""
    steps = chance.cumsum(1)
    level = torch.rand(len(chance), 1, generator=generator) * steps[:, -1:]
    return torch.searchsorted(steps, level).squeeze(1).clamp_max(chance.shape[1] - 1)


def _change(
    model: Any, database: LevelDatabase, name: str, level: Level, lookup: bool
) -> Tensor:  # (out, in)
    """What the level adds to the weight as the module applies it."""
    module = model.get_submodule(name)
    dense = weight_of(module)
    change = database.weight(name, level, dense.dtype) - dense
    return change * (embedding_scale(module) or 1.0) if lookup else change


@torch.no_grad()
def _square(
    inputs: Tensor,  # (..., in), or token numbers (...) of an embedding
    delta: Tensor,  # (out, in); an embedding's (vocab, hidden)
    gradient: Tensor,  # (..., out)
) -> float:
    """Sum over tokens of (gT dW x)^2."""
    if not inputs.is_floating_point():
        change = delta[inputs.flatten()]
    else:
        change = inputs.flatten(0, -2) @ delta.T
    gradient = gradient.reshape(-1, gradient.shape[-1])
    return float((change.float() * gradient.float()).sum(1).square().sum())


def stored_sensitivities(
    path: Path,
    stitched: StitchedModel,
    windows: np.ndarray,
    seed: int,
    progress: Callable[[int, int], None],
    spend: Callable[[int], None],
) -> tuple[dict[Level, float], ...]:
    """The sensitivities kept at `path`, computed and written there the first time.

    Args:
        stitched: made dense first.
        spend: told how many tokens were used, when any were.

    Raises:
        StudyError: the file is damaged.
    """
    if path.exists():
        try:
            rows = json.loads(path.read_text())
            return tuple({parse_level(k): float(v) for k, v in row.items()} for row in rows)
        except (ValueError, TypeError, AttributeError) as error:
            raise StudyError(f"'{path}' must be whole. Got: {error}. Delete it.") from error
    found = fisher_sensitivities(
        stitched.restore(), stitched.space, stitched.database, windows, seed, progress
    )
    write_json(path, [{str(level): value for level, value in row.items()} for row in found])
    spend(int(windows.size))
    return found
