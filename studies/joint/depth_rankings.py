"""Rankings of blocks and sublayers, as published: what depth.py compares the search with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autocompress.core import Allocation
from autocompress.evaluator import Evaluator
from autocompress.gradients import gradient_passes, weight_gradient
from autocompress.influence import block_influence, distance, watched
from autocompress.levels import Dense, Drop
from autocompress.models import find_blocks, weight_of
from autocompress.quality import score, teacher
from autocompress.session import Session

Unit = tuple[int, ...]  # layers of the space that are left out together
Ranking = Callable[[Session, Evaluator, np.ndarray], list[Unit]]  # windows: (n, window) int64


def blocks_of(session: Session) -> list[Unit]:
    """The sublayers of every block."""
    prefix, blocks = find_blocks(session.loaded.model)
    return [
        tuple(
            i
            for i, layer in enumerate(session.space.layers)
            if layer.name.startswith(f"{prefix}.{number}.")
        )
        for number in range(len(blocks))
    ]


def influence(session: Session, evaluator: Evaluator, windows: np.ndarray) -> list[Unit]:
    """Block influence: the cosine of what a block gets and returns.

    References:
        Men et al., ShortGPT, arXiv:2403.03853, eq. 1; all layers at once, as published.
    """
    moved = block_influence(evaluator.stitched, windows)
    units = blocks_of(session)
    return sorted(units, key=lambda unit: moved[unit[0]])


@torch.inference_mode()
def influence_sublayers(session: Session, evaluator: Evaluator, windows: np.ndarray) -> list[Unit]:
    """The same of every attention and every FFN: of the residual stream before and behind it.

    References:
        He et al., What Matters in Transformers? Not All Attention is Needed, arXiv:2406.15786,
        eq. 3 and 4: with the residual connection.
    """
    model = evaluator.stitched.restore()
    _, blocks = find_blocks(model)
    moved = np.zeros((len(blocks), 2))
    stream: dict[int, Tensor] = {}

    def before(number: int, given: Tensor, made: Tensor) -> None:
        stream[number] = given

    def attention(number: int, given: Tensor, made: Tensor) -> None:
        begun = stream.pop(number)
        stream[number] = begun + made
        moved[number, 0] += distance(begun, stream[number])

    def feed(number: int, given: Tensor, made: Tensor) -> None:
        begun = stream.pop(number)
        moved[number, 1] += distance(begun, begun + made)

    pre = [
        block.register_forward_pre_hook(
            lambda m, args, i=i: before(i, args[0], args[0])  # type: ignore[misc]
        )
        for i, block in enumerate(blocks)
    ]
    attentions: list[Any] = [block.self_attn for block in blocks]
    feeds: list[Any] = [block.mlp for block in blocks]
    try:
        with watched(attentions, attention), watched(feeds, feed):
            for window in torch.from_numpy(windows):
                model.model(input_ids=window[None], use_cache=False)
    finally:
        for handle in pre:
            handle.remove()
    each = [(layer,) for unit in blocks_of(session) for layer in unit]
    return [each[i] for i in np.argsort(moved.flatten())]


def perplexity(session: Session, evaluator: Evaluator, windows: np.ndarray) -> list[Unit]:
    """Perplexity without each block alone.

    References:
        Kim et al., Shortened LLaMA, arXiv:2402.02834, section 3.1, PPL.
    """
    units, count = blocks_of(session), len(session.space.layers)
    reference = teacher(evaluator.stitched.restore(), windows)
    found = [0.0] * len(units)
    for number in reversed(range(len(units))):  # the last blocks share all that comes before
        levels = [Drop() if i in units[number] else Dense() for i in range(count)]
        evaluator.stitched.stitch(Allocation(tuple(levels)))
        found[number] = score(evaluator.forward, reference).perplexity
    evaluator.stitched.restore()
    return [units[i] for i in np.argsort(found)]


def taylor(session: Session, evaluator: Evaluator, windows: np.ndarray) -> list[Unit]:
    """First-order importance of all weights of a block; the first four and last two stay.

    References:
        Kim et al., Shortened LLaMA, arXiv:2402.02834, section 3.1, Taylor+.
    """
    model = evaluator.stitched.restore()
    layers, units = session.space.layers, blocks_of(session)
    gradients: dict[str, Tensor] = {}

    def collect(window: int, name: str, inputs: Tensor, gradient: Tensor) -> None:
        part = weight_gradient(model.get_submodule(name), inputs, gradient).float()
        gradients[name] = gradients[name].add_(part) if name in gradients else part

    def slope(window: int, logits: Tensor) -> Tensor:
        """Of the text's mean negative log-likelihood."""
        chance = logits.float().softmax(1)
        text = torch.from_numpy(windows)[window]
        chance[torch.arange(len(text) - 1), text[1:]] -= 1
        chance[-1] = 0
        return chance / (len(text) - 1)

    names = [name for layer in layers for name in layer.modules]
    gradient_passes(model, names, torch.from_numpy(windows), slope, collect)
    importance = [
        sum(
            float((weight_of(model.get_submodule(name)) * gradients[name]).abs().sum())
            for layer in unit
            for name in layers[layer].modules
        )
        for unit in units
    ]
    order = np.argsort(importance)
    kept = {*range(4), len(units) - 2, len(units) - 1}
    return [units[i] for i in order if i not in kept] + [units[i] for i in order if i in kept]


RANKINGS: dict[str, Ranking] = {
    "influence": influence,
    "influence-sublayers": influence_sublayers,
    "perplexity": perplexity,
    "taylor": taylor,
}
