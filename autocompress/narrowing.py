"""Whether what surrounds a sublayer computes with fewer channels: tried, not derived from classes.

Some attention counts its heads in numbers of its own and would mix up what is left of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from posixpath import commonpath
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.levels import Role
from autocompress.models import set_weight, weight_of
from autocompress.tracing import hidden_states

TOKENS = 4  # of the probe
GAP = 1e-3  # of the largest output: fewer terms are summed in another order


def with_narrow(model: Any, roles: Mapping[str, Role]) -> dict[str, Role]:
    """Roles; sublayers whose surroundings do not compute with half of the channels have one.

    Sublayers of one class and size are tried once.
    """
    found, tried = dict(roles), dict[object, bool]()
    for name, role in roles.items():
        if role.channels < 2:
            continue
        members = [name, *sorted(role.feeders)]
        outer = commonpath([it.replace(".", "/") for it in members]).replace("/", ".")
        children = tuple(it.removeprefix(f"{outer}.") for it in members)
        kind = (type(model.get_submodule(outer)), children, role.channels)
        if kind not in tried:
            tried[kind] = _computes(model, outer, children, role.channels)
        if not tried[kind]:
            found[name] = replace(role, channels=1)
    return found


@torch.no_grad()
def _computes(model: Any, outer: str, children: tuple[str, ...], channels: int) -> bool:
    """Whether the module makes the same without channels as with zeros in their place.

    Args:
        children: what writes, then what feeds it, by their names inside.
    """
    module = model.get_submodule(outer)
    calls: list[Any] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((args, kwargs))

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        vocabulary = model.config.get_text_config().vocab_size
        hidden_states(model, torch.arange(TOKENS).view(1, -1) % vocabulary)
    finally:
        handle.remove()
    share = (channels // 2, channels)
    zeroed, less = copy.deepcopy(module), copy.deepcopy(module)
    for place, name in enumerate(children):
        old = module.get_submodule(name)
        rows, width = weight_of(old).shape
        if place == 0:
            width = width * share[0] // share[1]
            blank = weight_of(old).clone()
            blank[:, width:] = 0
            set_weight(zeroed.get_submodule(name), blank)
        else:
            rows = rows * share[0] // share[1]
        above, _, last = name.rpartition(".")
        setattr(less.get_submodule(above), last, _first(old, rows, width))
    try:
        args, kwargs = calls[0]
        one, other = (_tensor(it(*args, **kwargs)) for it in (less, zeroed))
    except Exception:  # a module that reshapes what it gets may raise anything
        return False
    near = GAP * float(other.abs().max())
    return one.shape == other.shape and float((one - other).abs().max()) <= near


def _first(old: Any, rows: int, width: int) -> nn.Linear:
    """A linear map with the first outputs and inputs of another."""
    made = nn.Linear(width, rows, bias=old.bias is not None, dtype=old.weight.dtype)
    made.weight.copy_(weight_of(old)[:rows, :width])
    if old.bias is not None:
        made.bias.copy_(old.bias[:rows])
    return made


def _tensor(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found.float()
