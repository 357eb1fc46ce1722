"""Operators: weight x input statistics x levels -> packed weights, found by the level's type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from autocompress.errors import ConfigError
from autocompress.levels import GgufType, Level
from autocompress.packed import Packed

CHOICES: dict[str, tuple[object, ...]] = {
    "method": ("gptq", "rtn"),
    "pruning": ("sparsegpt", "wanda", "magnitude"),
    "low_rank": ("whitened", "svd"),
    "scale_bits": (8, 11),
}
RULES: dict[tuple[str, type], str] = {  # that replaced others: their codes never mix
    ("gptq", GgufType): "importance of scales: geometric mean of the Hessian's diagonal and 1/u²"
}
LATER = (
    "pruning",
    "refit",
    "low_rank",
    "alternations",
    "scale_bits",
)  # unknown to the first databases


@dataclass(frozen=True, slots=True)
class Solver:
    """How weights are rounded to a level; part of a database's identity.

    Args:
        method: 'gptq' compensates rounding errors (Frantar et al., arXiv:2210.17323), 'rtn' not.
        damping: added to the Hessian's diagonal, as a fraction of its mean, in (0, 1].
        activation_order: solve columns by falling Hessian diagonal; group scales are fixed before,
            in the stored column order, so the layout does not change.
        search_scales: shrink each group's range to the least Hessian-weighted squared error
            instead of taking minimum and maximum.
        pruning: 'sparsegpt' compensates dropped weights (Frantar, Alistarh, arXiv:2301.00774),
            'wanda' (Sun et al., arXiv:2306.11695) and 'magnitude' only choose them.
        refit: conjugate-gradient steps on the kept weights and on outliers; 0 is as published.
        low_rank: 'whitened' is the best product for the layer's outputs (SVD-LLM, EoRA), 'svd'
            for the weight itself.
        alternations: times that a low-rank part and the parts beside it are solved again, each
            for what the other left (LQ-LoRA); 0 is one after the other.
        scale_bits: significant bits of scales: 11 are any fp16, 8 are exact in bf16 too, so that
            runtimes which keep scales in bf16 compute with the very same weights.

    Raises:
        ConfigError: an unknown name, or a negative number.
    """

    method: str = "gptq"
    damping: float = 0.01
    activation_order: bool = True
    search_scales: bool = True
    pruning: str = "sparsegpt"
    refit: int = 8
    low_rank: str = "whitened"
    alternations: int = 2
    scale_bits: int = 11

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"'{name}' of a solver must be one of {', '.join(map(str, known))}. "
                    f"Got {getattr(self, name)!r}."
                )
        if self.refit < 0 or self.alternations < 0:
            raise ConfigError(
                f"'refit' and 'alternations' must be 0 or more. Got {self.refit} and "
                f"{self.alternations}."
            )

    def identity(self, families: Iterable[type] = ()) -> dict[str, Any]:
        """What a database that was solved this way records.

        Settings that quantized levels do not have count only where they were changed: a database
        of those alone stays the same database.

        Args:
            families: of its levels. Rules that no setting names are those of `RULES`.
        """
        plain, own = Solver(), own_operators()
        found = {
            name: value
            for name, value in asdict(self).items()
            if name not in LATER or value != getattr(plain, name)
        }
        found |= {f.__name__: RULES[self.method, f] for f in families if (self.method, f) in RULES}
        return {**found, "operators": own} if own else found


@dataclass(frozen=True, slots=True)
class Statistics:
    """What an operator may know of a layer's inputs.

    Args:
        hessian: (in, in) float32, mean of x xT over calibration tokens; None means identity.
        tokens: how many tokens it was averaged over.
        factors: of the inverse, by order of columns: kept, because several operators need them.
        kept: share of the outputs, percent -> (out,), bool: those that are read still.
    """

    hessian: Tensor | None
    tokens: int
    factors: dict[object, tuple[Tensor, Tensor]] = field(
        default_factory=dict, compare=False, repr=False
    )
    kept: dict[float, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def known(self) -> Tensor | None:
        """The Hessian; None where no token came, or only zeros: there is no output to keep."""
        return None if self.hessian is None or not self.hessian.diagonal().any() else self.hessian


@dataclass(frozen=True, slots=True)
class Solution:
    """One weight at one level, with its error.

    Args:
        packed: the stored form.
        error: tr(dW H dWT) / tr(W H WT), relative squared error of the layer's output.
        rows: (out,) float32, diagonal of dW H dWT: mean squared error of every output.
    """

    packed: Packed
    error: float
    rows: Tensor


TINY = torch.finfo(torch.float32).tiny  # in place of the energy of an all-zero weight
Operator = Callable[[Sequence[Tensor], Statistics, Sequence[Level], Solver], list[list[Solution]]]
OPERATORS: dict[type, Operator] = {}


def operator(level_type: type) -> Callable[[Operator], Operator]:
    """Register the operator of a level family; yours takes the place of the one that ships.

    A database that it fills names it, so that levels of two operators are never mixed.

    Args:
        level_type: such as `autocompress.levels.Quantize`.
    """

    def register(function: Operator) -> Operator:
        if level_type not in OPERATORS or not _ships(function):  # those that ship come last
            OPERATORS[level_type] = function
        return function

    return register


def _ships(function: Operator) -> bool:
    return function.__module__.startswith(f"{__name__}.")


def own_operators() -> dict[str, str]:
    """Level family -> operator, of those that a script registered."""
    return {
        family.__name__: f"{function.__module__}.{function.__qualname__}"
        for family, function in OPERATORS.items()
        if not _ships(function)
    }


def solve(
    weights: Sequence[Tensor],  # each (out_i, in), float32, modules that share one input
    statistics: Statistics,
    levels: Sequence[Level],
    solver: Solver,
) -> list[list[Solution]]:  # [module][level]
    """Every weight at every level; levels of one family are solved together."""
    from autocompress.operators import (  # noqa: F401  (they register themselves)
        dense,
        drop,
        gguf,
        joint,
        low_rank,
        quantize,
        sparse,
        width,
    )

    rows: list[dict[Level, Solution]] = [{} for _ in weights]
    for family in dict.fromkeys(map(type, levels)):
        wanted = [level for level in levels if type(level) is family]
        for row, found in zip(
            rows, OPERATORS[family](weights, statistics, wanted, solver), strict=True
        ):
            row.update(zip(wanted, found, strict=True))
    return [[row[level] for level in levels] for row in rows]


def output_energy(weight: Tensor, hessian: Tensor | None) -> Tensor:  # (out,)
    """Mean squared output of each row: w H wT, or w wT without statistics."""
    return ((weight if hessian is None else weight @ hessian) * weight).sum(1)
