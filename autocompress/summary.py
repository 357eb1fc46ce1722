"""An allocation in at most six numbers: what a table or a plot of many can show."""

from __future__ import annotations

import re
from collections.abc import Sequence

from autocompress.core import Allocation, Layer, SearchSpace
from autocompress.levels import Level

_ATTENTION = re.compile(r"attn|attention|qkv|(^|[._])[qkvo]_(proj|lin)|c_attn")
_MLP = re.compile(r"mlp|ffn|feed_forward|expert|gate|up_proj|down_proj|(^|[._])fc\d?")


def summary(space: SearchSpace, allocation: Allocation) -> dict[str, float]:
    """At most six numbers, to four decimals: dashboards send and draw every one of every trial.

    | number | meaning |
    |---|---|
    | `bits_attention`, `bits_mlp`, `bits_other` | effective bits of these layers, by name |
    | `bits_first`, `bits_middle`, `bits_last` | effective bits of each third of the blocks |

    Parts without layers are left out.
    """
    layers, levels = space.layers, allocation.levels
    return {
        f"bits_{part}": round(mean_bits([layers[i] for i in at], [levels[i] for i in at]), 4)
        for part, at in _parts(space).items()
    }


def block_of(layer: Layer) -> int | None:
    """Number of the transformer block: the first number in the module's dotted name."""
    return next((int(part) for part in layer.modules[0].split(".") if part.isdecimal()), None)


def mean_bits(layers: Sequence[Layer], levels: Sequence[Level]) -> float:
    """Effective bits of some layers."""
    stored = sum(layer.storage_bits(level) for layer, level in zip(layers, levels, strict=True))
    return stored / sum(layer.weights for layer in layers)


def _parts(space: SearchSpace) -> dict[str, list[int]]:
    """The layers of each part, by index; empty parts are left out."""
    parts: dict[str, list[int]] = {}
    blocks = [block_of(layer) for layer in space.layers]
    count = 1 + max((block for block in blocks if block is not None), default=0)
    for index, (layer, block) in enumerate(zip(space.layers, blocks, strict=True)):
        parts.setdefault(_kind(layer), []).append(index)
        if block is not None:
            third = ("first", "middle", "last")[block * 3 // count]
            parts.setdefault(third, []).append(index)
    return parts


def _kind(layer: Layer) -> str:
    name = layer.modules[0].lower()
    if _ATTENTION.search(name):
        return "attention"
    return "mlp" if _MLP.search(name) else "other"
