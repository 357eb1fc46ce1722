"""Results that are equally narrow in every block, for loaders that know one width for all.

Their matrices are smaller as they lie on disk; only the configuration has to say so. Where blocks
differ, no plain configuration can, and formats without a word for it write zeros in place of what
is gone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autocompress.exporters.source import Source
from autocompress.levels import Drop, Rows, Unread, Width

FFN = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner")  # names of its width
HEADS, GROUPS = "num_attention_heads", "num_key_value_heads"


def narrowed(source: Source) -> Source:
    """A result with a configuration of its width; the result itself where there is none."""
    if not source.narrow:
        return source
    found = replace(source, config=source.config | _sizes(source), levels=_inner(source))
    return found if _fits(found) else source


def narrow_facts(result: Source, source: Source) -> dict[str, Any]:
    """What an export says of its width: the settings that are smaller than those of the result."""
    sizes = {key: source.config.get(key) for key in (*FFN, HEADS, GROUPS)}
    less = {key: size for key, size in sizes.items() if size != result.config.get(key)}
    return {"narrower": less} if less else {}


def _sizes(source: Source) -> dict[str, int]:
    """Settings of the configuration with their new values, as the first narrow layers have them."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(**source.config)
    found: dict[str, int] = {}
    for name, level in source.levels.items():
        if not isinstance(level, Width):
            continue
        shape = source.shape(name)
        kept = level.inner_shape(shape)[1]
        if level.of == 1:
            own = {key: kept for key in FFN if source.config.get(key, 0) in (None, shape[1])}
        else:
            own = _head_sizes(known, shape[1], kept)
        found = own | found
    return found


def _head_sizes(known: Any, width: int, kept: int) -> dict[str, int]:
    """Of attention with fewer groups of heads.

    Args:
        known: the configuration, whole.
        width: inputs of the last matrix of attention.
        kept: those that are left.
    """
    names = known.attribute_map
    heads = getattr(known, HEADS)
    groups = getattr(known, GROUPS, None) or heads
    found = {names.get(HEADS, HEADS): heads * kept // width, "head_dim": width // heads}
    if hasattr(known, GROUPS):
        found[names.get(GROUPS, GROUPS)] = groups * kept // width
    return found


def _inner(source: Source) -> dict[str, Any]:
    """What the smaller matrices are stored as."""
    return {
        name: level.inner if isinstance(level, Width | Rows) else level
        for name, level in source.levels.items()
    }


def _fits(source: Source) -> bool:
    """Whether the configuration makes a model of the very sizes in the file."""
    try:
        made = {name: tuple(tensor.shape) for name, tensor in source.model.state_dict().items()}
        for name, level in source.levels.items():
            if not isinstance(level, Drop | Unread):
                source.packed(name)
        return all(tuple(source.full(name).shape) == made[name] for name in source.plain())
    except Exception:  # a configuration that contradicts itself may raise anything
        return False
