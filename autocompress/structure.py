"""Which linear maps feed which: found by running the model and following gradients, not by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.core import Layer
from autocompress.levels import Role
from autocompress.models import find_blocks, find_layers
from autocompress.narrowing import with_narrow
from autocompress.plans import BuildPlan
from autocompress.spaces import SpaceConfig
from autocompress.tracing import hidden_states

TOKENS = 8  # of the probe


def layers_for(model: Any, config: SpaceConfig | BuildPlan) -> tuple[Layer, ...]:
    """The model's layers in a scope, with their roles where sublayers may be removed."""
    layers = find_layers(model, config.scope)
    return with_roles(model, layers) if config.removes else layers


def with_roles(model: Any, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Layers of one module each, with the roles of those inside blocks."""
    prefix, _ = find_blocks(model)
    inside = [layer.name for layer in layers if layer.name.startswith(f"{prefix}.")]
    roles = find_roles(model, inside)
    return tuple(
        replace(layer, roles=(roles[layer.name],)) if layer.name in roles else layer
        for layer in layers
    )


def find_roles(
    model: Any,
    modules: Sequence[str],  # linear maps inside blocks
) -> dict[str, Role]:
    """The role of each module that a short forward pass reaches.

    Every output is cut off the graph, so that gradients show what comes next with no other linear
    map in between: a module whose output moves the hidden states behind the last block writes;
    of the others, those whose input it moves are its readers.
    """
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    vocabulary = model.config.get_text_config().vocab_size
    with torch.inference_mode(False), torch.enable_grad():
        with _cut(model, modules, inputs, outputs):
            final = hidden_states(model, torch.arange(TOKENS).view(1, -1) % vocabulary)
        roles = _roles(final, inputs, outputs)
    with torch.inference_mode(False):
        return with_narrow(model, roles)


def _roles(final: Tensor, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Role]:
    """Roles from what the modules read and made, and from the hidden states behind all blocks."""
    reached = list(outputs)
    writers = _sources(final, outputs)
    readers: dict[str, set[str]] = {name: set() for name in reached}
    for name in reached:
        for source in _sources(inputs[name], outputs) - writers:
            readers[source].add(name)
    feeders: dict[str, set[str]] = {name: set() for name in reached}
    for source, those in readers.items():
        for name in those & writers:
            feeders[name].add(source)
    return {
        name: Role(
            name in writers,
            frozenset() if name in writers else frozenset(readers[name]),
            frozenset(feeders[name]),
            _channels(inputs[name], [outputs[it] for it in sorted(feeders[name])]),
        )
        for name in reached
        if name in writers or readers[name]
    }


@contextmanager
def _cut(
    model: Any, modules: Sequence[str], inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> Any:
    """Note what the modules read, and let gradients begin at what they make."""

    def read(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.setdefault(name, args[0])

    def write(name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        cut = output.detach().requires_grad_()
        outputs.setdefault(name, cut)
        return cut

    with ExitStack() as stack:
        for name in modules:
            module = model.get_submodule(name)
            for handle in (
                module.register_forward_pre_hook(partial(read, name)),
                module.register_forward_hook(partial(write, name)),
            ):
                stack.callback(handle.remove)
        yield


def _sources(tensor: Tensor, outputs: dict[str, Tensor]) -> set[str]:
    """Modules whose outputs a tensor depends on, nothing linear in between."""
    if not tensor.requires_grad:
        return set()
    found = torch.autograd.grad(
        tensor.sum(), list(outputs.values()), retain_graph=True, allow_unused=True
    )
    return {name for name, grad in zip(outputs, found, strict=True) if grad is not None}


def _channels(reads: Tensor, sources: Sequence[Tensor]) -> int:
    """The most equal stretches of an input that depend on the same stretch of every source alone.

    Single channels of an FFN, whose activation works number by number; in attention the heads of
    keys and values, each with the queries that read it.
    """
    if not sources:
        return 1
    common = math.gcd(reads.shape[-1], *(source.shape[-1] for source in sources))
    for count in (it for it in range(common, 1, -1) if common % it == 0):
        if all(_apart(reads, sources, count, it) for it in {0, count // 2, count - 1}):
            return count
    return 1


def _apart(reads: Tensor, sources: Sequence[Tensor], count: int, which: int) -> bool:
    """Whether one of `count` stretches depends on no other stretch of the sources."""
    stretch = reads.chunk(count, -1)[which]
    weights = torch.linspace(1, 2, stretch.numel()).view(stretch.shape)  # nothing cancels out
    found = torch.autograd.grad(
        (stretch * weights).sum(), list(sources), retain_graph=True, allow_unused=True
    )
    for gradient in (it for it in found if it is not None):
        others = [it for i, it in enumerate(gradient.chunk(count, -1)) if i != which]
        if any(bool(it.any()) for it in others):
            return False
    return True
