"""Levels of narrower sublayers: channels that nothing stores any more."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from autocompress.errors import LevelError
from autocompress.levels.quantize import Dense, Quantize
from autocompress.levels.remove import Role
from autocompress.levels.storage import PERCENT, Shape, part_of


def _match(word: str, key: str) -> tuple[float, Quantize | None, int] | None:
    """Percent, codes and channels of a group, in any order of the parts."""
    parts = [text.strip() for text in key.split("+")]
    own = [
        found
        for text in parts
        if (found := re.fullmatch(rf"{word}{PERCENT}%(?:of(\d{{1,5}}))?", text))
    ]
    codes = [level for text in parts if (level := Quantize.parse(text)) is not None]
    if not own or len(own) + len(codes) < len(parts):
        return None
    if len(own) > 1 or len(codes) > 1:
        raise LevelError(f"a narrower level must have one width and at most one code. Got '{key}'.")
    return float(own[0][1]), codes[0] if codes else None, int(own[0][2] or 1)


@dataclass(frozen=True, slots=True)
class _Narrower(ABC):
    """What both sides of a narrower sublayer share: a key, and a smaller weight."""

    word: ClassVar[str]  # that keys begin with

    percent: float
    codes: Quantize | None = None
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.percent < 100:
            raise LevelError(
                f"a width must be above 0 % and below 100 %. Got '{self}'. Write 'drop' to keep "
                "nothing and 'dense' to keep all."
            )
        if self.of < 1:
            raise LevelError(f"a channel must have at least one input. Got '{self}'.")

    def __str__(self) -> str:
        of = "" if self.of == 1 else f"of{self.of}"
        codes = "" if self.codes is None else f"+{self.codes}"
        return f"{self.word}{self.percent:g}%{of}{codes}"

    @classmethod
    def parse(cls, key: str) -> Self | None:
        found = _match(cls.word, key)
        return None if found is None else cls(*found)

    @property
    def inner(self) -> Level:
        """What the smaller weight is stored as."""
        return self.codes or Dense()

    @abstractmethod
    def inner_shape(self, shape: Shape) -> Shape:
        """Of the smaller weight."""

    def storage_bits(self, shape: Shape) -> int:
        return self.inner.storage_bits(self.inner_shape(shape))

    def parameters(self, shape: Shape) -> int:
        return self.inner.parameters(self.inner_shape(shape))


@dataclass(frozen=True, slots=True)
class Width(_Narrower):
    """The best channels of a sublayer, the others gone from all its weights.

    Key: `width{percent kept}%`, and what the smaller weights are stored as: `width75%`,
    `width75%+w4g64`. A layer at this level holds a whole sublayer: what writes into the residual
    stream keeps some of its inputs, refitted to make up for the others; what feeds it keeps the
    same outputs, at `Rows`. In an FFN a channel is one input; in attention it is a head of keys
    and values with the heads of queries that read it.

    Args:
        percent: of the channels kept, above 0 and below 100, two decimals at most; rounded down,
            to one at least.
        codes: how the smaller weights are stored; None in bf16.
        of: inputs that make a channel. Found from the model: not written in a search space.
    """

    form: ClassVar[str] = "width{percent of channels kept}%[+w...], such as width75%+w4g64"
    word: ClassVar[str] = "width"

    def inner_shape(self, shape: Shape) -> Shape:
        """(out, kept inputs)."""
        return shape[0], kept_of(self, shape[1])


@dataclass(frozen=True, slots=True)
class Rows(_Narrower):
    """The outputs that a narrower sublayer still reads; no choice of its own.

    Args:
        percent, codes, of: as `Width` has them, `of` in outputs.
    """

    form: ClassVar[str] = "rows{percent of outputs kept}%[+w...]"
    word: ClassVar[str] = "rows"

    def inner_shape(self, shape: Shape) -> Shape:
        """(kept outputs, in)."""
        return kept_of(self, shape[0]), shape[1]


Level = Dense | Quantize  # of the smaller weight


def kept_of(level: Width | Rows, size: int) -> int:
    """How many of `size` inputs or outputs are kept: whole channels, one at least.

    Raises:
        LevelError: they are no whole channels.
    """
    if size % level.of:
        raise LevelError(f"channels at {level} must be whole. Got {size} for {level.of} each.")
    return max(1, part_of(size // level.of, level.percent)) * level.of


def width_modules(
    level: Width, modules: Sequence[str], roles: Sequence[Role], shapes: Sequence[Shape]
) -> tuple[Width | Rows, ...]:
    """What each module of a narrower layer keeps.

    Raises:
        LevelError: the layer is not one sublayer with channels.
    """
    writers = [i for i, role in enumerate(roles) if role.writes]
    if len(roles) < len(modules) or len(writers) != 1:
        raise LevelError(
            "a narrower layer must be one sublayer of a block. Got one that is none. Write tie = "
            '"sublayers" in the search space, or give it other levels.'
        )
    (writer,) = writers
    missing = roles[writer].feeders - frozenset(modules)
    if missing or not roles[writer].feeders:
        names = ", ".join(sorted(missing)) or "anything that feeds it"
        raise LevelError(
            f"a narrower layer must hold '{modules[writer]}' with all that feeds it. Got it "
            f'without {names}. Write tie = "sublayers" in the search space.'
        )
    channels = roles[writer].channels
    if channels < 2:
        raise LevelError(
            "a narrower layer must have channels that hang together with no others, in a module "
            f"that computes with fewer. Got '{modules[writer]}', which has none. Give it other "
            "levels."
        )
    return tuple(
        replace(level, of=shape[1] // channels)
        if role.writes
        else Rows(level.percent, level.codes, shape[0] // channels)
        for role, shape in zip(roles, shapes, strict=True)
    )
