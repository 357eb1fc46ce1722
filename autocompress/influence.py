"""Block influence: how far each block moves the hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.models import find_blocks
from autocompress.stitch import StitchedModel
from autocompress.tracing import hidden_states

Note = Callable[[int, Tensor, Tensor], None]  # (module, what it got, what it returned)


@torch.inference_mode()
def block_influence(
    stitched: StitchedModel,
    windows: np.ndarray,  # (n, window) int64
) -> list[float]:
    """Of every layer's block: 1 less the cosine of what it gets and returns, mean over tokens.

    Layers outside of blocks have 2, the most there is.

    Args:
        stitched: made dense first.

    References:
        Men et al., ShortGPT, arXiv:2403.03853, eq. 1.
    """
    model = stitched.restore()
    prefix, blocks = find_blocks(model)
    moved = np.zeros(len(blocks))

    def note(number: int, given: Tensor, made: Tensor) -> None:
        moved[number] += distance(given, made) / len(windows)

    with watched(list(blocks), note):
        for window in torch.from_numpy(windows):
            hidden_states(model, window[None])
    found = []
    for layer in stitched.space.layers:
        inside = layer.modules[0].removeprefix(f"{prefix}.")
        number = inside.partition(".")[0]
        within = inside != layer.modules[0] and number.isdecimal()
        found.append(float(moved[int(number)]) if within else 2.0)
    return found


@contextmanager
def watched(modules: Sequence[nn.Module], note: Note) -> Iterator[None]:
    """Call `note` with what every module gets and returns."""

    def hook(number: int) -> Callable[..., None]:
        def call(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            note(number, given, output[0] if isinstance(output, tuple) else output)

        return call

    handles = [m.register_forward_hook(hook(i), with_kwargs=True) for i, m in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def distance(one: Tensor, other: Tensor) -> float:  # of (..., hidden) each
    """1 less the cosine, mean over tokens."""
    return 1 - float(nn.functional.cosine_similarity(one.float(), other.float(), dim=-1).mean())
