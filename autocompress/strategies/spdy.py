"""SPDY: learn how to weigh the sensitivities, and let the integer programme do the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.core import Allocation, Layer, Problem, Trial
from autocompress.predictions import Sensitivities
from autocompress.strategies import check_setting
from autocompress.strategies.ilp import GAP, SECONDS, solve
from autocompress.strategies.samplers import check_sampler, minimize

if TYPE_CHECKING:
    import numpy as np
    import optuna

Weights = Mapping[str, float]  # coefficient -> how much of it a layer has

DEPTHS: Mapping[
    str, Callable[[float], float]
] = {  # Legendre polynomials of the depth, -1 at the first block and 1 at the last
    "linear": lambda x: x,
    "quadratic": lambda x: (3 * x * x - 1) / 2,
    "cubic": lambda x: (5 * x**3 - 3 * x) / 2,
}


@dataclass(frozen=True)
class SPDY:
    """Integer programs over sensitivities whose weights a sampler of Optuna learns.

    Losses of layers do not add up, but an additive proxy with the right weights still leads to
    the best allocation. A layer's sensitivities are multiplied by the exponential of a coefficient
    of its type and of a polynomial of its depth, so about ten coefficients describe all layers.
    With all of them 0 the first candidate is the plain integer programme's answer. (SPDY gives
    every layer its own coefficient and searches locally from random ones.)

    Args:
        sampler: 'tpe', 'gp' (Optuna fits it with torch), 'nsgaii' or 'cmaes'.
        candidates: evaluated in all, the first included.
        tokens: to evaluate each on; whole windows, at most the search split.
        sensitivity_tokens: tokens that score every level of every layer; whole windows.
        reach: of each coefficient in either direction, natural logarithm of a factor.
        gap: of each integer programme, see `ILP`.
        seconds: likewise.

    References:
        Frantar, Alistarh, "SPDY: Accurate Pruning with Speedup Guarantees", arXiv 2201.13096,
        section 3.3.
    """

    sampler: str = "tpe"
    candidates: int = 64
    tokens: int = 8192
    sensitivity_tokens: int = 4096
    reach: float = 1.5
    gap: float = GAP
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        check_sampler(self.sampler)
        check_setting("candidates", self.candidates, 1)
        check_setting("tokens", self.tokens, 1)
        check_setting("sensitivity_tokens", self.sensitivity_tokens, 1)
        check_setting("reach", self.reach, 1e-3, 10)
        check_setting("gap", self.gap, 0, 1)
        check_setting("seconds", self.seconds, 0)

    def __call__(self, problem: Problem, rng: np.random.Generator) -> Iterator[Trial]:
        tokens = problem.fidelity(self.sensitivity_tokens).tokens
        sensitivities = problem.sensitivities(tokens).mean
        features = describe(problem.space.layers)
        names = list(dict.fromkeys(name for row in features for name in row))

        def propose(asked: optuna.Trial) -> Allocation:
            values = {name: asked.suggest_float(name, -self.reach, self.reach) for name in names}
            prices = reweigh(sensitivities, features, values)
            return solve(
                problem.space, problem.costs, problem.budgets, prices, self.gap, self.seconds
            )

        yield from minimize(
            problem,
            self.sampler,
            propose,
            dict.fromkeys(names, 0.0),
            self.candidates,
            problem.fidelity(self.tokens),
            "spdy",
            rng,
        )


def describe(layers: Sequence[Layer]) -> list[Weights]:
    """How much of each coefficient every layer has.

    A layer's type is the last part of its name, its depth the first number in it. Types count
    where there are several, depths where blocks differ; a layer without a number stands in the
    middle.
    """
    types = [layer.name.rpartition(".")[2] for layer in layers]
    depths = [_depth(layer.name) for layer in layers]
    known = [depth for depth in depths if depth is not None]
    first, last = (min(known), max(known)) if known else (0, 0)
    rows: list[Weights] = []
    for kind, depth in zip(types, depths, strict=True):
        row = {f"type {kind}": 1.0} if len(set(types)) > 1 else {}
        if first < last:
            place = 0.0 if depth is None else 2 * (depth - first) / (last - first) - 1
            row |= {f"depth {name}": shape(place) for name, shape in DEPTHS.items()}
        rows.append(row)
    return rows


def _depth(name: str) -> int | None:
    found = re.search(r"\d+", name)
    return None if found is None else int(found[0])


def reweigh(
    sensitivities: Sensitivities, features: Sequence[Weights], values: Weights
) -> Sensitivities:
    """Sensitivities of each layer times the exponential of its coefficients' sum."""
    factors = [
        math.exp(sum(share * values[name] for name, share in row.items())) for row in features
    ]
    return tuple(
        {level: factor * value for level, value in row.items()}
        for factor, row in zip(factors, sensitivities, strict=True)
    )
