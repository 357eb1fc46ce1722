"""Mixture-of-experts blocks with experts in 3-D parameters, as linear layers per expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One expert: a gated FFN of three linear layers."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act_fn: Any) -> None:
        super().__init__()
        self.gate_proj = _linear(gate)
        self.up_proj = _linear(up)
        self.down_proj = _linear(down)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class UnfusedExperts(nn.Module):
    """The same function as transformers' fused experts, computed expert by expert.

    Every expert is called, even with no token: its layers see each forward exactly once.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.num_experts = fused.num_experts
        gates, ups = fused.gate_up_proj.data.chunk(2, dim=1)
        downs = fused.down_proj.data
        # Named `unfused`: `experts.0.gate_proj.weight` would be caught by transformers' own
        # conversion, which merges such names back into the 3-D parameter.
        self.unfused = nn.ModuleList(
            Expert(gates[i], ups[i], downs[i], fused.act_fn) for i in range(self.num_experts)
        )

    def forward(
        self,
        hidden_states: Tensor,  # (tokens, hidden)
        top_k_index: Tensor,  # (tokens, k), expert numbers
        top_k_weights: Tensor,  # (tokens, k)
    ) -> Tensor:  # (tokens, hidden)
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self.unfused):
            token, place = torch.where(top_k_index == number)
            result = expert(hidden_states[token]) * top_k_weights[token, place, None]
            out.index_add_(0, token, result.to(out.dtype))
        return out


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear


def unfuse_experts(model: nn.Module) -> int:
    """Replace every fused expert module of the common gated form; returns how many were."""
    fused = [(name, module) for name, module in model.named_modules() if _is_gated_experts(module)]
    for name, module in fused:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, UnfusedExperts(module))
    return len(fused)


def _is_gated_experts(module: nn.Module) -> bool:
    """Fused (experts, 2*inner, hidden) and (experts, hidden, inner) without biases."""
    parameters = dict(module.named_parameters(recurse=False))
    return (
        set(parameters) == {"gate_up_proj", "down_proj"}
        and all(p.dim() == 3 for p in parameters.values())
        and parameters["gate_up_proj"].shape[1] == 2 * parameters["down_proj"].shape[2]
        and hasattr(module, "act_fn")
        and hasattr(module, "num_experts")
    )
