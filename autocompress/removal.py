"""Dropped sublayers at run time: not computed, without a cache, positions as they were.

The smallest modules that hold nothing but dropped linear maps (attention, FFN, a whole block) are
replaced. What they return is tried on the dense model when a result is written, not derived from
their class. A dropped linear map that no such module holds returns zeros without multiplying.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.levels import Drop, Level, Shape, Unread
from autocompress.models import find_blocks, is_linear, set_weight, weight_of
from autocompress.tracing import hidden_states

Removed = Mapping[str, int]  # module -> how many values it returns, 0 for a tensor alone
GONE = (Drop, Unread)
TOKENS = 4  # of the probe


class Nothing(nn.Module):
    """In place of a sublayer: adds zero, or its bias, to the residual stream.

    Args:
        values: that it returns, all but the first None; 0 is a tensor alone.
        bias: (hidden,), of what wrote the output; None without.
    """

    def __init__(self, values: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.values, self.bias = values, bias

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        added = hidden_states.new_zeros(()) if self.bias is None else self.bias
        found = added.to(hidden_states.dtype).expand(hidden_states.shape)
        return (found, *[None] * (self.values - 1)) if self.values else found


class Skipped(nn.Module):
    """In place of a block of which nothing is left: returns what it gets.

    Args:
        values: as `Nothing` has them.
    """

    def __init__(self, values: int) -> None:
        super().__init__()
        self.values = values

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, *[None] * (self.values - 1)) if self.values else hidden_states


class ZeroLinear(nn.Module):
    """A linear map with a weight of zeros that it does not hold."""

    def __init__(self, shape: Shape, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.shape, self.bias = shape, bias

    @property
    def weight(self) -> Tensor:  # (out, in)
        """For code that reads a module's weight."""
        return torch.zeros(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        found = x.new_zeros(*x.shape[:-1], self.shape[0])
        return found if self.bias is None else found + self.bias.to(x.dtype)


def find_removed(model: Any, levels: Mapping[str, Level]) -> dict[str, int]:
    """What can be taken out of a dense model: sublayers of dropped linear maps, or whole blocks.

    Each is run with its dropped weights at zero: a sublayer must return what `Nothing` does, a
    block what `Skipped` does.

    Args:
        levels: module -> level.
    """
    gone = {name for name, level in levels.items() if isinstance(level, GONE)}
    candidates = _candidates(model, gone)
    if not candidates:
        return {}
    seen: dict[str, int] = {}
    prefix, blocks = find_blocks(model)
    whole = {f"{prefix}.{number}" for number in range(len(blocks))}

    def watch(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        values = len(output) if isinstance(output, tuple) else 0
        bias = None if name in whole else _bias(model, name, levels)
        made = Skipped(values) if name in whole else Nothing(values, bias)
        first = output[0] if values else output
        if isinstance(given, Tensor) and isinstance(first, Tensor) and given.shape == first.shape:
            expected = made(given)
            if torch.equal(first, expected[0] if values else expected):
                seen[name] = values

    with _dropped(model, levels), _watched(model, candidates, watch), torch.inference_mode():
        vocabulary = model.config.get_text_config().vocab_size
        hidden_states(model, torch.arange(TOKENS).view(1, -1) % vocabulary)
    kept = _seated(model, seen)
    return {name: values for name, values in kept.items() if not is_removed(name, kept)}


def is_removed(name: str, removed: Removed | None) -> bool:
    """Whether a module lies in one that is taken out."""
    return any(name.startswith(f"{other}.") for other in removed or ())


def kept_tensors(
    model: Any, tensors: Mapping[str, Tensor], removed: Removed, levels: Mapping[str, Level]
) -> dict[str, Tensor]:
    """The tensors of a dense model that are left when modules are taken out of it."""
    left = {name: tensor for name, tensor in tensors.items() if not is_removed(name, removed)}
    biases = {f"{name}.bias": _bias(model, name, levels) for name in removed}
    return left | {name: bias for name, bias in biases.items() if bias is not None}


def remove_modules(model: Any, removed: Removed, levels: Mapping[str, Level]) -> None:
    """Take sublayers and blocks out of a model, and give the others' caches their places."""
    prefix, blocks = find_blocks(model)
    for name, values in removed.items():
        parent, _, child = name.rpartition(".")
        made: nn.Module
        if parent == prefix and child.isdecimal():
            made = Skipped(values)
            made.__dict__.update(_plain_attributes(blocks[int(child)]))
        else:
            made = Nothing(values, _bias(model, name, levels))
        setattr(model.get_submodule(parent), child, made)
    _seat(blocks, _types(model, len(blocks)))


def _plain_attributes(block: nn.Module) -> dict[str, Any]:
    """What a model may ask a block for before it calls it, such as the type of its attention."""
    return {k: v for k, v in vars(block).items() if isinstance(v, str | int) and k != "training"}


def _candidates(model: Any, gone: set[str]) -> list[str]:
    """Modules inside blocks, and blocks, of which all linear maps are gone; one at least."""
    prefix, blocks = find_blocks(model)
    found = []
    for name, module in blocks.named_modules(prefix=prefix):
        inside = [
            f"{name}.{child}" for child, part in module.named_modules() if child and is_linear(part)
        ]
        if name != prefix and inside and gone.issuperset(inside):
            found.append(name)
    return found


def _bias(model: Any, name: str, levels: Mapping[str, Level]) -> nn.Parameter | None:
    """The bias of the one module in `name` that writes; None where none or several do."""
    writers = [
        model.get_submodule(module)
        for module, level in levels.items()
        if module.startswith(f"{name}.") and isinstance(level, Drop)
    ]
    return getattr(writers[0], "bias", None) if len(writers) == 1 else None


@contextmanager
def _dropped(model: Any, levels: Mapping[str, Level]) -> Iterator[None]:
    """The dense model with its dropped weights at zero."""
    modules = [model.get_submodule(it) for it, level in levels.items() if isinstance(level, Drop)]
    before = [module.weight for module in modules]
    try:
        for module in modules:
            set_weight(module, torch.zeros_like(weight_of(module)))
        yield
    finally:
        for module, weight in zip(modules, before, strict=True):
            module.weight = weight


@contextmanager
def _watched(model: Any, names: list[str], watch: Any) -> Iterator[None]:
    """Call `watch` with what the modules get and return."""

    def hook_of(name: str) -> Any:
        return lambda module, args, kwargs, output: watch(name, args, kwargs, output)

    handles = [
        model.get_submodule(name).register_forward_hook(hook_of(name), with_kwargs=True)
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attentions(blocks: nn.ModuleList) -> list[tuple[str, int]]:
    """Modules inside blocks that number their part of the cache, and their blocks."""
    return [
        (f"{number}.{name}", number)
        for number, block in enumerate(blocks)
        for name, module in block.named_modules()
        if name and isinstance(getattr(module, "layer_idx", None), int)
    ]


def _types(model: Any, count: int) -> list[str]:
    """The type of every block's attention; all are one where the configuration names none."""
    named = getattr(model.config.get_text_config(), "layer_types", None)
    return list(named) if named else ["attention"] * count


def _seated(model: Any, removed: Removed) -> dict[str, int]:
    """What can be removed so that the first part of the cache still is some attention's.

    Models ask it how many tokens they have read. Where all attention of its type would go and
    other attention stays, the first one stays too: it computes with zeros.
    """
    prefix, blocks = find_blocks(model)
    attentions = [(f"{prefix}.{name}", number) for name, number in _attentions(blocks)]
    types = _types(model, len(blocks))
    gone = {name for name, _ in attentions if name in removed or is_removed(name, removed)}
    kept = {types[number] for name, number in attentions if name not in gone}
    if not kept or types[0] in kept:
        return dict(removed)
    first = attentions[0][0]
    return {k: v for k, v in removed.items() if k != first and not first.startswith(f"{k}.")}


def _seat(blocks: nn.ModuleList, types: Sequence[str]) -> None:
    """Number the attention that is left by its place among that of its type.

    Caches hold a part for every block, of the type of its attention; models ask the first part of
    a type how many tokens they have read, so that one must be in use.
    """
    places = {kind: [i for i, it in enumerate(types) if it == kind] for kind in types}
    for name, number in _attentions(blocks):
        attention: Any = blocks.get_submodule(name)
        attention.layer_idx = places[types[number]].pop(0)
