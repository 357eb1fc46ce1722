"""What a loaded model computes with, what it reads, and whether its search measured the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from autocompress.backends import BACKENDS, choose_backend
from autocompress.experts import UnfusedExperts
from autocompress.models import is_tied
from autocompress.runtime import PackedWeight, TiedHead, packed_modules


def chosen_backends(model: nn.Module) -> dict[str, str]:
    """Name -> version of every backend that packed modules compute with, prepared yet or not."""
    names = {
        choose_backend(it.level, it.shape, it.mode, it.wanted).name for it in packed_modules(model)
    }
    return {name: backend.version() for name, backend in BACKENDS.items() if name in names}


def runtime_warning(manifest: Mapping[str, Any], model: nn.Module) -> str | None:
    """One line if the search measured latency on other backends than `model` runs on here.

    Args:
        manifest: its `runtime`, which only budgets of latency leave, holds `backends`: name ->
            version.
        model: as loaded on this machine.
    """
    if "runtime" not in manifest:
        return None
    recorded, used = manifest["runtime"]["backends"], chosen_backends(model)
    if recorded == used:
        return None
    return (
        f"latency was measured on {_list(recorded)}, this runs on {_list(used)}: "
        "the budget may not hold here"
    )


def _list(backends: Mapping[str, str]) -> str:
    return ", ".join(backends.values()) or "dense layers only"


def weight_bytes(model: Any, dense_size: int | None = None) -> int:
    """Bytes of weights that one decoded token reads, as they lie in memory.

    All of them, but one row of an embedding that is not the head too, and of experts as many as
    a token is sent to.

    Args:
        model: packed modules are prepared.
        dense_size: bytes of a dense weight where something else than the model's forward reads
            it; None is what the model holds.
    """
    total = _read_bytes(model, dense_size)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    config = model.config.get_text_config()
    if not (isinstance(head, TiedHead) or is_tied(model)):
        table = _read_bytes(embedding, dense_size)
        total -= table - table // config.vocab_size
    for experts in model.modules():
        if isinstance(experts, UnfusedExperts):
            every = experts.num_experts
            used = getattr(config, "num_experts_per_tok", every)
            total -= _read_bytes(experts, dense_size) * (every - used) // every
    return total


def _read_bytes(module: nn.Module, dense_size: int | None) -> int:
    """Bytes of a module's weights, shared ones once."""
    distinct = {tensor.data_ptr(): tensor for tensor in _packed(module)}
    packed = sum(tensor.nbytes for tensor in distinct.values())
    dense = sum(p.numel() * (dense_size or p.element_size()) for p in module.parameters())
    return packed + dense


def _packed(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        if isinstance(part, PackedWeight):
            yield from part.prepare().tensors.values()
