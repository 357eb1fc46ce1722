"""llama.cpp's mixes of tensor types for the Llama family with an importance matrix.

As `llama_tensor_get_type_impl` of llama.cpp's src/llama-quant.cpp chooses them, for models that are
no mixture of experts and whose head is tied to the embedding; `studies/gguf/llama_quantize.py`
compares them with what it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autocompress.core import Allocation, Problem, SearchSpace
from autocompress.levels import GgufType, Level

BASE = {  # mix -> type of what no rule names
    "Q2_K": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "IQ3_XXS": "IQ3_XXS",
    "IQ3_S": "IQ3_S",
    "IQ4_XS": "IQ4_XS",
}
NAMES = {  # last part of a module's name -> kind
    "embed_tokens": "embedding",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "output",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}

FALLBACKS = {  # type of blocks of 256 -> what a width takes that 256 does not divide
    **dict.fromkeys(("Q2_K", "Q3_K"), "Q4_0"),
    **dict.fromkeys(("IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def largest_mix(problem: Problem, config: Any) -> tuple[Allocation, str] | None:
    """The mix of most bits within a problem's budgets, and its name; None where none is possible.

    Args:
        config: of the model in transformers.
    """
    found = []
    for name in BASE:
        allocation = mix_allocation(problem.space, name, config)
        if allocation is not None and problem.fits(allocation):
            found.append((allocation, name))
    table = problem.table("bits")
    return max(found, key=lambda it: table.total(it[0]), default=None)


def mix_allocation(space: SearchSpace, mix: str, config: Any) -> Allocation | None:
    """A mix as an allocation; None where a layer may not take its type or no rule knows it.

    Where a layer has another type of the same size in its place, it takes that.
    """
    blocks = getattr(config, "num_hidden_layers", 0)
    keys = getattr(config, "num_key_value_heads", None)
    if not blocks or not keys or not isinstance(keys, int):  # some state one a block
        return None
    chosen, queries = [], config.num_attention_heads // keys
    for layer, allowed in zip(space.layers, space.levels, strict=True):
        if not all(map(is_known, layer.modules)):
            return None
        types = {
            stored_type(mix, module, width, blocks, queries)
            for module, (_, width) in zip(layer.modules, layer.shapes, strict=True)
        }
        level = _allowed(allowed, GgufType(types.pop()))
        if types or level is None:
            return None
        chosen.append(level)
    return Allocation(tuple(chosen))


def _allowed(allowed: Sequence[Level], level: GgufType) -> Level | None:
    """A level, or one of its size: a space may have left it out for that (`domination.py`)."""
    alike = (it for it in allowed if isinstance(it, GgufType) and it.rate == level.rate)
    return level if level in allowed else next(alike, None)


def is_known(module: str) -> bool:
    """Whether there is a rule for a module, by its dotted name in transformers."""
    kind = NAMES.get(module.rpartition(".")[2])
    return kind == "embedding" or (kind is not None and ".layers." in module)


def stored_type(mix: str, module: str, width: int, blocks: int, queries: int) -> str:
    """The type that a mix gives a module's weight of so many inputs, fallbacks included."""
    kind = mix_type(mix, module, blocks, queries)
    return fallback(kind, width, NAMES[module.rpartition(".")[2]])


def fallback(kind: str, width: int, role: str) -> str:
    """What llama.cpp stores where 256 does not divide the inputs.

    Args:
        kind: type that the mix gives.
        width: inputs of the weight.
        role: of `NAMES`; an embedding that is the head falls back to 8 bits.
    """
    if width % 256 == 0:
        return kind
    return "Q8_0" if role == "embedding" else FALLBACKS[kind]


def more_bits(block: int, blocks: int) -> bool:
    """Which blocks mixes ending in M favour."""
    return block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2


def mix_type(mix: str, module: str, blocks: int, queries: int) -> str:
    """The type that a mix gives a module's weight.

    Args:
        module: its dotted name in transformers.
        blocks: of the model.
        queries: heads that share one key and value head.
    """
    kind = NAMES[module.rpartition(".")[2]]
    base = BASE[mix]
    if kind == "embedding":
        return "Q5_K" if mix == "IQ3_XXS" else "Q6_K"
    block = int(module.split(".layers.")[1].split(".")[0])
    if kind == "v":
        return _value(mix, base, block, blocks, queries)
    if kind == "down":
        return _down(mix, base, block, blocks)
    if kind == "output":
        return {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K"}.get(mix, base)
    return "IQ2_S" if mix == "IQ3_XXS" and kind in ("q", "k") else base


def _value(mix: str, base: str, block: int, blocks: int, queries: int) -> str:
    many = queries >= 4
    if mix == "Q2_K":
        return "Q4_K" if many else "Q3_K"
    if mix == "Q3_K_M":
        return "Q5_K" if block < 2 else "Q4_K"
    if mix == "Q4_K_M" and more_bits(block, blocks):
        return "Q6_K"
    if mix == "Q4_K_S" and block < 4:
        return "Q5_K"
    if many and mix in ("IQ3_XXS", "IQ3_S"):
        return "Q4_K"
    return "Q5_K" if many and mix == "IQ4_XS" else base


def _down(mix: str, base: str, block: int, blocks: int) -> str:
    if mix == "Q2_K":
        return "Q3_K"
    if mix == "Q3_K_M":
        return "Q5_K" if block < blocks // 16 else "Q4_K"
    if mix == "Q4_K_M" and more_bits(block, blocks):
        return "Q6_K"
    return "Q5_K" if mix == "Q4_K_S" and block < blocks // 8 else base
