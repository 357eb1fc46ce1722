"""Levels of several parts in one weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from autocompress.errors import LevelError
from autocompress.levels.low_rank import LowRank
from autocompress.levels.prune import Outliers, Prune
from autocompress.levels.quantize import Dense, Quantize
from autocompress.levels.storage import Shape

Part = LowRank | Outliers | Prune | Quantize
ORDER: tuple[type[Part], ...] = (LowRank, Outliers, Prune, Quantize)
COMBINATIONS = (  # what stands beside a low-rank part, or alone where there are two
    (Prune, Quantize),
    (Outliers, Quantize),
    (Quantize,),
    (Prune,),
)


@dataclass(frozen=True, slots=True)
class Joint:
    """Parts joined by plus signs, one of a kind, in any order; written in one.

    `2:4+w4g64`, `s50+w4g64`: kept weights are quantized. `o1%+w3g64`: outliers in bf16, the others
    quantized. A low-rank part is added to what the other parts store: `r8+w3g64`, `r8w8+w3g64`
    with quantized factors, `r8+s50`, `r8+2:4+w4g64`, `r8+o1%+w3g64`.

    Args:
        steps: two or three parts.
    """

    form: ClassVar[str] = (
        "of these and o{percent of outliers}% joined by '+', such as r8+w3g64, o1%+w3g64, 2:4+w4g64"
    )

    steps: tuple[Part, ...]

    def __post_init__(self) -> None:
        kinds = [type(step) for step in self.steps]
        if len(set(kinds)) < len(kinds):
            raise LevelError(f"a joint level must not repeat a part. Got '{self}'.")
        ordered = tuple(sorted(self.steps, key=lambda step: ORDER.index(type(step))))
        object.__setattr__(self, "steps", ordered)
        base = tuple(type(step) for step in ordered if not isinstance(step, LowRank))
        if base not in COMBINATIONS or len(ordered) < 2:
            raise LevelError(
                "a joint level must be a sparse part and a quantized one, outliers and a quantized "
                "part, or a low-rank part beside one of these, a sparse or a quantized part. "
                f"Got '{self}'."
            )

    def __str__(self) -> str:
        return "+".join(map(str, self.steps))

    @classmethod
    def parse(cls, key: str) -> Self | None:
        texts = [text.strip() for text in key.split("+")]
        steps = [step for text in texts for kind in ORDER if (step := kind.parse(text)) is not None]
        if len(steps) < len(texts):
            return None
        alone = len(steps) == 1 and not isinstance(steps[0], Outliers)
        return None if alone else cls(tuple(steps))

    @property
    def low_rank(self) -> LowRank | None:
        """What is added to the other parts."""
        return next((step for step in self.steps if isinstance(step, LowRank)), None)

    @property
    def outliers(self) -> Outliers | None:
        """What is kept in bf16 beside the codes."""
        return next((step for step in self.steps if isinstance(step, Outliers)), None)

    @property
    def prune(self) -> Prune | None:
        """Which weights are kept."""
        return next((step for step in self.steps if isinstance(step, Prune)), None)

    @property
    def quantize(self) -> Quantize | None:
        """How the kept weights are stored; None in bf16."""
        return next((step for step in self.steps if isinstance(step, Quantize)), None)

    @property
    def base(self) -> Prune | Quantize | Joint:
        """The level without its low-rank part."""
        rest = tuple(step for step in self.steps if not isinstance(step, LowRank))
        return rest[0] if len(rest) == 1 else Joint(rest)  # type: ignore[return-value]

    def storage_bits(self, shape: Shape) -> int:
        if self.low_rank is not None:
            return self.low_rank.storage_bits(shape) + self.base.storage_bits(shape)
        assert self.quantize is not None
        if self.outliers is not None:
            return self.outliers.storage_bits(shape) + self.quantize.storage_bits(shape)
        assert self.prune is not None
        codes = self.quantize.code_bits(self.prune.kept(shape))
        return self.prune.mask_bits(shape) + codes + self.quantize.grid_bits(shape)

    def parameters(self, shape: Shape) -> int:
        added = 0 if self.low_rank is None else self.low_rank.parameters(shape)
        return added + (self.prune or Dense()).parameters(shape)  # codes and outliers are one sum
