"""Latency of whole models: how often modules run, what a token takes, what no layer explains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.core import Allocation, SearchSpace
from autocompress.latency import Use, Uses
from autocompress.latency_store import ModelPart
from autocompress.latency_timing import Measured, logits_options
from autocompress.levels import Dense, Level
from autocompress.models import is_linear, weight_of
from autocompress.packed import Packed
from autocompress.packing import pack_modules
from autocompress.removal import GONE, find_removed
from autocompress.runtime import prepare
from autocompress.stitch import tied_modules
from autocompress.targets import MODES, Target

PASSES = 8  # of one token each, to see which experts run
SCALES = (0.5, 2.0)  # of a fitted scale; outside it, timings and model do not belong together
REFERENCES = 3  # allocations whose latency gives the fixed part

Source = Callable[[str, Level], Packed]  # (module, level) -> its stored weight


def find_uses(model: Any, space: SearchSpace, target: Target) -> Uses:
    """How the passes of a target call every module in scope, seen by running the dense model.

    A tied embedding is used where its head is; an embedding alone is a look-up and has no use.
    """
    tied = tied_modules(model)
    modules = {name for layer in space.layers for name in layer.modules}
    users = {user: name for name in modules for user in (name, *tied.get(name, ()))}
    rows: dict[str, dict[str, list[int]]] = {name: {} for name in modules}
    passes: dict[str, int] = {}
    phase = ""

    def watch(user: str, name: str) -> Any:
        def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].numel():  # experts are called with no token, too
                reached = args[0].numel() // args[0].shape[-1]
                rows[name].setdefault(phase, []).append(reached)

        return model.get_submodule(user).register_forward_pre_hook(count)

    linear = {user: name for user, name in users.items() if is_linear(model.get_submodule(user))}
    handles = [watch(user, name) for user, name in linear.items()]
    options = logits_options(model)
    try:
        with torch.inference_mode():
            for phase, tokens in _passes(model, target):
                passes[phase] = passes.get(phase, 0) + 1
                model(input_ids=tokens, use_cache=False, **options)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _uses(counts, passes) for name, counts in rows.items()}


def _passes(model: Any, target: Target) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])

    def draw(length: int) -> Tensor:
        return torch.randint(vocabulary, (target.batch, length), generator=generator)

    if "decode" in target.phases:
        yield from (("decode", draw(1)) for _ in range(PASSES))
    if "prefill" in target.phases:
        yield "prefill", draw(target.prompt)


def _uses(counts: Mapping[str, Sequence[int]], passes: Mapping[str, int]) -> tuple[Use, ...]:
    return tuple(
        Use(phase, len(rows) / passes[phase], max(1, round(sum(rows) / len(rows))))
        for phase, rows in counts.items()
    )


def packed_model(model: Any, levels: Mapping[str, Level], source: Source, target: Target) -> Any:
    """A copy of a dense model with packed layers on their backends, as `load` makes it.

    Tensors outside the packed modules are shared with `model`.

    Args:
        model: dense, as loaded.
        levels: module -> level; the others stay dense.
        source: where packed weights come from.
        target: its mode is what kernels round activations to.
    """
    shared = [*model.parameters(), *model.buffers()]
    made = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    packed = {name: level for name, level in levels.items() if not isinstance(level, Dense)}
    activations = next(name for name, mode in MODES.items() if mode == target.mode)
    removed = find_removed(model, levels)
    pack_modules(made, packed, model.dtype, activations, removed)
    for name, level in packed.items():
        if isinstance(level, GONE):
            continue
        module = made.get_submodule(name)
        for part, tensor in source(name, level).tensors.items():
            getattr(module, part).copy_(tensor)
    prepare(made)
    return made.eval()


def random_source(model: Any) -> Source:
    """Random weights of the modules' shapes; one per level and shape."""
    from autocompress.latency_cases import random_packed

    known: dict[tuple[Level, tuple[int, ...]], Packed] = {}

    def source(name: str, level: Level) -> Packed:
        rows, width = weight_of(model.get_submodule(name)).shape
        if (level, (rows, width)) not in known:
            known[level, (rows, width)] = random_packed(level, (rows, width))
        return known[level, (rows, width)]

    return source


def reference_allocations(space: SearchSpace, seed: int = 0) -> list[Allocation]:
    """Mixed allocations of few, medium and many bits: what searches find lies between them.

    Mixed, because modules that happen to share a level are fused and uniform models all are.
    """
    rng = np.random.default_rng(seed)
    found = []
    for third in range(REFERENCES):
        levels = []
        for layer, allowed in zip(space.layers, space.levels, strict=True):
            ranked = sorted(allowed, key=layer.storage_bits)
            low = third * len(ranked) // REFERENCES
            high = max(low + 1, -(-(third + 1) * len(ranked) // REFERENCES))
            levels.append(ranked[int(rng.integers(low, high))])
        found.append(Allocation(tuple(levels)))
    return list(dict.fromkeys(found))


def fit_part(
    sums: Sequence[float],  # ms per token of each reference, by the table
    measured: Sequence[Measured],
    dense: Measured | None,
) -> ModelPart:
    """Fixed part and scale that explain the references, by least squares on relative errors.

    The scale is 1 where the references do not differ enough, or where it would be absurd.
    """
    x, y = np.array(sums), np.array([one.ms for one in measured])
    scale = 1.0
    if len(x) > 1 and (x.max() - x.min()) > 0.2 * y.mean():
        weights = 1 / y
        slope = np.polyfit(x, y, 1, w=weights)[0]
        scale = float(slope) if SCALES[0] <= slope <= SCALES[1] else 1.0
    fixed = median(y - scale * x)
    errors = np.abs(fixed + scale * x - y) / y
    noise = max(one.spread for one in measured)
    return ModelPart(
        fixed_ms=float(fixed),
        scale=scale,
        dense_ms=None if dense is None else dense.ms,
        spread=float(max(errors.max(), noise)),
        decoder=measured[0].decoder,
        references=tuple((float(a), float(b)) for a, b in zip(x, y, strict=True)),
    )


@contextmanager
def dense_bfloat16(model: Any) -> Iterator[Any]:
    """The dense model in bf16: itself, or a copy that is gone afterwards."""
    if model.dtype == torch.bfloat16:
        yield model
    else:
        yield copy.deepcopy(model).to(torch.bfloat16)
