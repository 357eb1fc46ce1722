"""The decision unit: one linear map as the runtime sees it, or several that share a level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autocompress.levels import Level, Role, Shape, module_levels


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear map as the runtime sees it; its modules always share one level.

    Args:
        name: unique; the module's name, or the joined name of tied modules.
        modules: dotted names in the model; fused q/k/v is one layer with three modules.
        shapes: (out, in) of each module's weight.
        roles: how each module hangs together with others; () where nobody asked.
    """

    name: str
    modules: tuple[str, ...]
    shapes: tuple[Shape, ...]
    roles: tuple[Role, ...] = ()

    @property
    def weights(self) -> int:
        """Dense parameters of the layer."""
        return sum(rows * width for rows, width in self.shapes)

    def storage_bits(self, level: Level) -> int:
        """Bits on disk of the whole layer at `level`.

        Raises:
            LevelError: the layer cannot take it.
        """
        stored = zip(self.module_levels(level), self.shapes, strict=True)
        return sum(own.storage_bits(shape) for own, shape in stored)

    def parameters(self, level: Level) -> int:
        """Numbers that the whole layer at `level` multiplies with."""
        stored = zip(self.module_levels(level), self.shapes, strict=True)
        return sum(own.parameters(shape) for own, shape in stored)

    def module_levels(self, level: Level) -> tuple[Level, ...]:
        """What each module stores when the layer is at `level`: the same, but where it is removed.

        Raises:
            LevelError: the layer cannot take it.
        """
        return module_levels(level, self.modules, self.roles, self.shapes)

    def stored_at(self, levels: Sequence[Level]) -> tuple[tuple[Level, ...], ...]:
        """What each module stores at each of the layer's levels: (modules, levels)."""
        return tuple(zip(*map(self.module_levels, levels), strict=True))
