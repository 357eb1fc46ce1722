"""Results with dropped sublayers, for loaders that know of none.

Blocks of which nothing is left are taken out: a plain smaller configuration, later blocks numbered
anew. A sublayer dropped from a block that stays has to be there, so its weights are zeros, which
add the same nothing to the residual stream but take their room and their time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.errors import SpaceError
from autocompress.exporters.source import Source
from autocompress.levels import Drop, Unread
from autocompress.models import find_blocks

GONE = (Drop, Unread)
NUMBERS = ("mlp_only_layers",)  # settings that list blocks by number
UNEQUAL = ("layer_idx", "training")  # attributes that may differ between equal blocks


@dataclass
class Shallow(Source):
    """A result with every sublayer there, in the blocks that stay.

    Args:
        origin: as it lies on disk.
        kept: numbers of its blocks that stay, rising.
    """

    origin: Source | None = None
    kept: tuple[int, ...] = ()

    @property
    def whole(self) -> Source:
        """The result as it lies on disk."""
        assert self.origin is not None
        return self.origin

    @cached_property
    def prefix(self) -> str:
        """Of the names of blocks."""
        return find_blocks(self.model)[0]

    @property
    def zeroed(self) -> list[str]:
        """Sublayers of zeros, each by the module that writes its output."""
        return [name for name, level in self.levels.items() if isinstance(level, Drop)]

    def there(self, name: str) -> str:
        """A name in the result on disk."""
        return _renumbered(name, self.prefix, self.kept)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file; zeros where it belonged to a dropped sublayer."""
        there = self.there(name)
        parent = next((it for it in self.removed if there.startswith(f"{it}.")), None)
        if parent is None:
            return self.whole.tensor(there)
        writers = [it for it in self.zeroed if self.there(it).startswith(f"{parent}.")]
        kept_bias = f"{parent}.bias"
        if name in [f"{it}.bias" for it in writers] and kept_bias in self._file.keys():
            return self.whole.tensor(kept_bias)
        return torch.zeros(self.model.state_dict()[name].shape, dtype=torch.bfloat16)

    def plain(self) -> Iterator[str]:
        biases = {f"{name}.bias" for name in self.removed}
        here = {there: number for number, there in enumerate(self.kept)}
        places = [here.get(number, -1) for number in range(max(self.kept) + 1)]
        for name in self.whole.plain():
            if name not in biases:
                yield _renumbered(name, self.prefix, places)
        weights = {f"{name}.weight" for name in self.levels}
        parents = tuple(f"{name}." for name in self.removed)
        for name in self.model.state_dict():
            if name not in weights and self.there(name).startswith(parents):
                yield name

    def stitched(self, rounded: Mapping[str, str] | None = None) -> Any:
        """The model that was searched: at its full depth, what was dropped zeros."""
        _, blocks = find_blocks(self.whole.model)
        if len(self.kept) == len(blocks):
            return super().stitched(rounded)
        return _view(self.whole, range(len(blocks))).stitched(rounded)


def without_dropped(source: Source) -> Source:
    """A result as plain loaders want it; the result itself where nothing was dropped.

    Raises:
        SpaceError: its configuration cannot say what is left.
    """
    if not any(isinstance(level, GONE) for level in source.levels.values()):
        return source
    prefix, blocks = find_blocks(source.model)
    left = [i for i in range(len(blocks)) if f"{prefix}.{i}" not in source.removed]
    found = _view(source, left)
    _check_blocks(found, blocks)
    return found


def depth_facts(source: Source) -> dict[str, Any]:
    """What an export says of its depth: the blocks it has, of how many, and sublayers of zeros."""
    if not isinstance(source, Shallow):
        return {}
    _, blocks = find_blocks(source.whole.model)
    return {"blocks": list(source.kept), "of_blocks": len(blocks), "zeroed": source.zeroed}


def _view(source: Source, kept: Sequence[int]) -> Shallow:
    """A result's blocks of these numbers."""
    prefix, blocks = find_blocks(source.model)
    gone = tuple(f"{prefix}.{i}." for i in range(len(blocks)) if i not in set(kept))
    here = [list(kept).index(i) if i in set(kept) else -1 for i in range(len(blocks))]

    def left(names: Sequence[str]) -> list[str]:
        return [_renumbered(it, prefix, here) for it in names if not it.startswith(gone)]

    rows = [row | {"modules": left(row["modules"])} for row in source.manifest["allocation"]]
    levels = [(it, level) for it, level in source.levels.items() if not it.startswith(gone)]
    return Shallow(
        source.folder,
        fewer_blocks(source.config, kept, len(blocks)),
        source.manifest | {"allocation": [row for row in rows if row["modules"]]},
        {_renumbered(name, prefix, here): level for name, level in levels},
        source.packing,
        source._file,
        source,
        tuple(kept),
    )


def fewer_blocks(config: Mapping[str, Any], kept: Sequence[int], count: int) -> dict[str, Any]:
    """A configuration of `count` blocks with those of these numbers only.

    Settings with an entry for each block lose theirs; `_check_blocks` finds what this misses.
    """
    from transformers import AutoConfig

    known = AutoConfig.for_model(**config)
    key = known.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    found = dict(config) | {key: len(kept)}
    for name, value in config.items():
        if not isinstance(value, list | tuple):
            continue
        if name in NUMBERS:
            found[name] = [place for place, number in enumerate(kept) if number in value]
        elif "layer" in name and len(value) == count:
            found[name] = [value[number] for number in kept]
    return found


def _renumbered(name: str, prefix: str, numbers: Sequence[int]) -> str:
    """A name with its block's number looked up in `numbers`."""
    if not name.startswith(f"{prefix}."):
        return name
    number, dot, rest = name.removeprefix(f"{prefix}.").partition(".")
    return f"{prefix}.{numbers[int(number)]}{dot}{rest}"


def _check_blocks(source: Shallow, blocks: nn.ModuleList) -> None:
    """Check that the smaller configuration makes the very blocks that are left.

    Raises:
        SpaceError: a block would be another, as some kinds follow from its number.
    """
    _, made = find_blocks(source.model)
    for place, number in enumerate(source.kept):
        before, after = _traits(blocks[number]), _traits(made[place])
        for name in before.keys() | after.keys():
            if before.get(name) != after.get(name):
                raise SpaceError(
                    f"a block must be the same in a model with fewer. Got block {number}, which "
                    f"would be block {place} with another '{name}' ({after.get(name)} in place of "
                    f"{before.get(name)}), as its kind follows from its number. Export it as "
                    "native."
                )


def _traits(block: nn.Module) -> dict[str, Any]:
    """What tells blocks apart besides the values of their weights."""
    found: dict[str, Any] = {name: tuple(t.shape) for name, t in block.state_dict().items()}
    for name, module in block.named_modules():
        found[f"{name}.class"] = type(module).__name__
        for key, value in vars(module).items():
            if isinstance(value, str | int | float) and key not in UNEQUAL:
                found[f"{name}.{key}"] = value
    return found
