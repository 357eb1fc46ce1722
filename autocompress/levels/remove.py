"""Levels that remove a sublayer, and what each of its modules keeps then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from autocompress.errors import LevelError
from autocompress.levels.storage import Shape


@dataclass(frozen=True, slots=True)
class Role:
    """How a linear map hangs together with others: found by running the model.

    Args:
        writes: its output goes into the residual stream, not only into other linear maps.
        readers: modules that read what it makes, nothing linear in between; only where it does
            not write.
        feeders: modules whose only readers are this one or others that write with it.
        channels: equal stretches of its inputs, each of which depends on the same stretch of every
            feeder's outputs and on nothing else; 1 where all depend on all, or where what is around
            them cannot do with fewer.
    """

    writes: bool
    readers: frozenset[str] = frozenset()
    feeders: frozenset[str] = frozenset()
    channels: int = 1


@dataclass(frozen=True, slots=True, order=True)
class Drop:
    """Nothing: the sublayer adds zero to the residual stream, or its bias where it has one.

    A layer at this level holds whole sublayers: what writes into the residual stream and all that
    feeds it. What writes has a zero weight; what feeds it is `Unread`.
    """

    form: ClassVar[str] = "drop"

    def __str__(self) -> str:
        return "drop"

    @classmethod
    def parse(cls, key: str) -> Self | None:
        return cls() if key == "drop" else None

    def storage_bits(self, shape: Shape) -> int:
        return 0

    def parameters(self, shape: Shape) -> int:
        return 0


@dataclass(frozen=True, slots=True, order=True)
class Unread:
    """Nothing, in a module whose output nobody reads: its weight may be any.

    What feeds a dropped module has this level; it is no choice of its own.
    """

    form: ClassVar[str] = "unread"

    def __str__(self) -> str:
        return "unread"

    @classmethod
    def parse(cls, key: str) -> Self | None:
        return cls() if key == "unread" else None

    def storage_bits(self, shape: Shape) -> int:
        return 0

    def parameters(self, shape: Shape) -> int:
        return 0


def drop_modules(modules: Sequence[str], roles: Sequence[Role]) -> tuple[Drop | Unread, ...]:
    """What each module of a dropped layer keeps.

    Raises:
        LevelError: the layer is not made of whole sublayers.
    """
    if len(roles) < len(modules):
        raise LevelError(
            "a dropped layer must be a sublayer of a block. Got one that is none. Give it other "
            "levels."
        )
    own = frozenset(modules)
    missing = [
        (module, sorted((role.feeders if role.writes else role.readers) - own), role.writes)
        for module, role in zip(modules, roles, strict=True)
    ]
    for module, others, writes in missing:
        if others:
            what = "all that feeds it" if writes else "all that reads it"
            raise LevelError(
                f"a dropped layer must hold '{module}' with {what}. Got it without "
                f'{", ".join(others)}. Write tie = "sublayers" in the search space.'
            )
    return tuple(Drop() if role.writes else Unread() for role in roles)
