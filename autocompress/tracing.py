"""Which linear layers see the same input: found by running the model, not by their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def body(model: Any) -> Any:
    """The model without its head: returns hidden states."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def hidden_states(model: Any, tokens: Tensor) -> Tensor:  # (windows, window, hidden)
    """The head's input for (windows, window) tokens."""
    return body(model)(input_ids=tokens, use_cache=False).last_hidden_state


def embedding_scale(embedding: nn.Module) -> float | None:
    """What rows are multiplied with. Gemma's buffer has no value before loading, its float has."""
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return None if scale is None else float(scale)


def is_causal(model: Any) -> bool:
    """Whether no token's logits depend on a later token: tried, not believed (BERT loads too)."""
    one = torch.arange(8).view(1, 8) % model.config.vocab_size
    two = one.clone()
    two[0, -1] = model.config.vocab_size // 2
    with torch.inference_mode():
        a, b = (model(input_ids=tokens, use_cache=False).logits[0, :-1] for tokens in (one, two))
    near = 1e-3 * float(a.abs().max())  # experts see other batches, so sums differ in order
    return torch.allclose(a, b, rtol=0, atol=near, equal_nan=True)


def input_groups(
    model: Any, modules: Sequence[str], same: Callable[[Tensor, Tensor], bool] | None = None
) -> list[tuple[str, ...]]:
    """Modules grouped by the tensor they read, in the order the forward pass reaches them.

    Args:
        same: whether two inputs are one; by default, if they are the same memory.

    Modules the probe never reaches (they read nothing but their own input) come last, alone.
    """
    seen: list[tuple[str, Tensor]] = []
    handles = []
    for name in modules:

        def note(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            seen.append((name, args[0]))

        handles.append(model.get_submodule(name).register_forward_pre_hook(note))
    try:
        with torch.inference_mode():
            hidden_states(model, torch.arange(64).view(1, 64) % model.config.vocab_size)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[tuple[Tensor, list[str]]] = []
    for name, tensor in seen:
        for shared, members in groups:
            if (same or _same)(shared, tensor):
                members.append(name)
                break
        else:
            groups.append((tensor, [name]))
    found = [tuple(dict.fromkeys(members)) for _, members in groups]
    reached = {name for members in found for name in members}
    return found + [(name,) for name in modules if name not in reached]


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one: the same object, or the same view of the same memory."""
    return a is b or (
        a.numel() > 0
        and a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
    )
