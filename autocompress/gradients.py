"""Gradient passes: what modules read and how their outputs move a loss, window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from autocompress.levels import Level
from autocompress.predictions import Estimate
from autocompress.stitch import tied_modules
from autocompress.tracing import embedding_scale

# (window, module, inputs (tokens, in) or token numbers (tokens,), gradient (tokens, out))
Collect = Callable[[int, str, Tensor, Tensor], None]
Slope = Callable[[int, Tensor], Tensor]  # (window, logits) -> gradient of its loss, (tokens, vocab)
Advance = Callable[[int, int], None]  # windows done, windows in all
Series = npt.NDArray[np.float64]  # (windows or parts of them, levels)


def gradient_passes(
    model: Any,
    modules: Iterable[str],
    windows: Tensor,  # (n, window) int64
    slope: Slope,
    collect: Collect,
    progress: Advance = lambda done, total: None,
) -> None:
    """Run every window forwards and backwards, and collect at the modules.

    A weight that several modules share is collected at each of them, under the name it has in
    `modules`.

    Args:
        model: causal LM; its weights need no gradients and get none.
        modules: linear maps and embeddings.
        slope: how a window's loss depends on its logits.
        collect: called once per window and user of a weight.
    """
    tied, current = tied_modules(model), [0]

    def watch(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = args[0].detach()
        flat = inputs.flatten(0, -2) if inputs.is_floating_point() else inputs.flatten()
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: collect(current[0], name, flat, gradient.flatten(0, -2))
        )

    handles = [
        model.get_submodule(user).register_forward_hook(partial(watch, name))
        for name in modules
        for user in (name, *tied.get(name, ()))
    ]
    embedding = model.get_input_embeddings()  # its output is where gradients begin
    handles.append(
        embedding.register_forward_hook(lambda *call: call[-1].requires_grad_(), prepend=True)
    )
    try:
        for window, tokens in enumerate(windows):
            current[0] = window
            with torch.enable_grad():
                logits = model(input_ids=tokens[None], use_cache=False).logits[0]
                logits.backward(slope(window, logits.detach()).to(logits.dtype))
            progress(window + 1, len(windows))
    finally:
        for handle in handles:
            handle.remove()


def output_change(
    module: nn.Module,
    change: Tensor,  # (out, in); an embedding's (vocab, hidden)
    inputs: Tensor,  # (tokens, in), or token numbers (tokens,) of an embedding
) -> Tensor:  # (tokens, out)
    """How the output of a module moves when its weight does."""
    if inputs.is_floating_point():
        return inputs @ change.T
    return change[inputs] * (embedding_scale(module) or 1.0)


def weight_gradient(
    module: nn.Module,
    inputs: Tensor,  # (tokens, in), or token numbers (tokens,) of an embedding
    gradient: Tensor,  # (tokens, out)
) -> Tensor:  # (out, in); an embedding's (vocab, hidden)
    """How the loss of these tokens depends on the weight."""
    if inputs.is_floating_point():
        return gradient.T @ inputs
    found = torch.zeros(module.weight.shape, dtype=gradient.dtype)  # type: ignore[arg-type]
    return found.index_add_(0, inputs, gradient * (embedding_scale(module) or 1.0))


def estimate_of(levels: Sequence[Sequence[Level]], layers: Sequence[Series]) -> Estimate:
    """Means and their standard errors; one window says nothing of its error, which is the mean."""

    def rows(values: Callable[[Series], Any]) -> tuple[dict[Level, float], ...]:
        return tuple(
            dict(zip(row, map(float, values(series)), strict=True))
            for row, series in zip(levels, layers, strict=True)
        )

    def error(series: Series) -> Any:
        if len(series) < 2:
            return series.mean(0)
        return series.std(0, ddof=1) / np.sqrt(len(series))

    return Estimate(rows(lambda series: series.mean(0)), rows(error))
