"""Put an allocation's weights into a live model, changing only the layers that differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autocompress.core import Allocation, Layer, SearchSpace
from autocompress.database import LevelDatabase
from autocompress.levels import Dense, Level, Rows, is_unchanged
from autocompress.models import is_transposed, set_weight, weight_of

TOGETHER = 1 << 28  # changes of weights, float32, that are compared at once: 1 GiB


class StitchedModel:
    """A dense model whose layers take the levels of one allocation at a time.

    Args:
        model: causal LM with dense weights; used in place.
        space: its layers.
        database: holds every level but dense.
    """

    def __init__(self, model: Any, space: SearchSpace, database: LevelDatabase) -> None:
        self.model, self.space, self.database = model, space, database
        self.dense = {
            name: model.get_submodule(name).weight
            for layer in space.layers
            for name in layer.modules
        }
        self.tied = tied_modules(model)
        self._products: dict[tuple[str, tuple[Level, ...]], npt.NDArray[np.float64]] = {}
        self.current: dict[str, Level | None] = dict.fromkeys(self.dense, Dense())  # None: between

    def stitch(self, allocation: Allocation) -> Any:
        """The model with the allocation's weights."""
        for name, level in self.space.module_levels(allocation).items():
            self._set(name, level)
        return self.model

    def restore(self) -> Any:
        """The dense model."""
        for name in self.dense:
            self._set(name, Dense())
        return self.model

    def change(self, name: str, level: Level) -> Tensor:  # (out, in), float32
        """What a module's level adds to its dense weight."""
        dense = self.dense[name]
        module = self.model.get_submodule(name)
        weight = (dense.T if is_transposed(module) else dense).float()
        if is_unchanged(level):
            return torch.zeros_like(weight)
        return self._stored(name, level) - weight

    def products(
        self, layer: Layer, levels: Sequence[Level]
    ) -> npt.NDArray[np.float64]:  # (levels, levels)
        """Inner products of what the levels change of a layer's weights, computed once."""
        key = (layer.name, tuple(levels))
        if key not in self._products:
            found = np.zeros((len(levels), len(levels)))
            for name, own in zip(layer.modules, layer.stored_at(levels), strict=True):
                for changes in self._changes(name, own):
                    found += (changes @ changes.T).double().numpy()
            self._products[key] = found
        return self._products[key]

    def _changes(self, name: str, levels: Sequence[Level]) -> Iterator[Tensor]:  # (levels, weights)
        """What the levels change of a module, a number of rows at a time.

        All levels of a large vocabulary at once would take more memory than the model.
        """
        dense = self.dense[name]
        transposed = is_transposed(self.model.get_submodule(name))
        rows, width = dense.T.shape if transposed else dense.shape
        step = max(1, TOGETHER // (len(levels) * width))
        for start in range(0, rows, step):
            changes = torch.empty(len(levels), min(step, rows - start), width)
            for i, level in enumerate(levels):
                changes[i] = self.change(name, level)[start : start + step]
            yield changes.flatten(1)

    def blend(self, allocation: Allocation, share: float) -> Any:
        """The model on its way: dense weights plus `share` of what the allocation changes."""
        self.restore()
        for name, level in self.space.module_levels(allocation).items():
            if not is_unchanged(level):
                module = self.model.get_submodule(name)
                set_weight(module, weight_of(module) + share * self.change(name, level))
                self._tie(name)
                self.current[name] = None
        return self.model

    def _set(self, name: str, level: Level) -> None:
        if self.current[name] == level:
            return
        module = self.model.get_submodule(name)
        if is_unchanged(level):
            module.weight = self.dense[name]
        else:
            set_weight(module, self._stored(name, level))
        self._tie(name)
        self.current[name] = level

    def _stored(self, name: str, level: Level) -> Tensor:  # (out, in)
        """What the database has; outputs that nobody reads stay as they are."""
        dense = self.dense[name]
        stored = self.database.weight(name, level, dense.dtype)
        if not isinstance(level, Rows):
            return stored
        module = self.model.get_submodule(name)
        kept = self.database.kept(name, level)
        return torch.where(kept[:, None], stored, dense.T if is_transposed(module) else dense)

    def _tie(self, name: str) -> None:
        """Give a module's weight to those that share it."""
        for other in self.tied.get(name, ()):
            self.model.get_submodule(other).weight = self.model.get_submodule(name).weight


def tied_modules(model: Any) -> dict[str, tuple[str, ...]]:
    """Module -> other modules that share its weight."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    groups = [names for names in owners.values() if len(names) > 1]
    return {name: tuple(o for o in names if o != name) for names in groups for name in names}
