"""Strategies: who proposes allocations. To add one, write a file and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar, cast

from autocompress.core import Strategy
from autocompress.errors import ConfigError
from autocompress.tables import did_you_mean

if TYPE_CHECKING:
    from autocompress.config import StudyConfig
    from autocompress.effort import Plan

Made = TypeVar("Made")

# name -> module and class, imported when asked for
STRATEGIES = {
    "arithmetic": ("autocompress.strategies.ratios", "Arithmetic"),
    "auto": ("autocompress.strategies.auto", "Auto"),
    "bayesian": ("autocompress.strategies.bayesian", "Bayesian"),
    "ends": ("autocompress.strategies.ends", "Ends"),
    "evolution": ("autocompress.strategies.evolution", "Evolution"),
    "evopress": ("autocompress.strategies.evopress", "EvoPress"),
    "ilp": ("autocompress.strategies.ilp", "ILP"),
    "random": ("autocompress.strategies.random_search", "RandomSearch"),
    "random-ratios": ("autocompress.strategies.ratios", "RandomRatios"),
    "refinement": ("autocompress.strategies.refinement", "Refinement"),
    "spdy": ("autocompress.strategies.spdy", "SPDY"),
    "surrogate": ("autocompress.strategies.surrogate", "SurrogateSearch"),
    "uniform": ("autocompress.strategies.uniform", "Uniform"),
}


def register_strategy(name: str) -> Callable[[type[Made]], type[Made]]:
    """Make a dataclass the strategy `name`: `autocompress.search(..., strategy=name)` finds it.

    Its fields are settings with defaults; `spending`, `sensitivity_tokens`, `generations` and
    `offspring` are filled from the configuration where it has them.
    """

    def register(family: type[Made]) -> type[Made]:
        STRATEGIES[name] = family.__module__, family.__qualname__
        return family

    return register


def find_strategy(name: str) -> type[Strategy]:
    """The strategy class called `name`; its settings are the constructor's arguments.

    Raises:
        ConfigError: no such strategy, or a package that it needs is not installed.
    """
    if name not in STRATEGIES:
        raise ConfigError(
            f"a strategy must be one of {', '.join(STRATEGIES)}. Got '{name}'."
            f"{did_you_mean(name, STRATEGIES)}"
        )
    module, symbol = STRATEGIES[name]
    try:
        return cast(type[Strategy], getattr(import_module(module), symbol))
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the strategy '{name}' must have the package '{error.name}', which is not installed. "
            f"Run: pip install {error.name}"
        ) from error


def check_setting(name: str, value: float, least: float, most: float = float("inf")) -> None:
    """Check that a setting lies in its range.

    Raises:
        ConfigError: it does not.
    """
    if not least <= value <= most:
        bound = f"at least {least}" if most == float("inf") else f"from {least} to {most}"
        raise ConfigError(f"{name} must be {bound}. Got {value}.")


def check_ends(**ends: int | None) -> None:
    """Check the settings of which one at least must end a search; None is no end.

    Raises:
        ConfigError: one is below 0, or none is set.
    """
    for name, value in ends.items():
        if value is not None:
            check_setting(name, value, 0)
    if all(value is None for value in ends.values()):
        *most, last = ends
        raise ConfigError(f"{', '.join(most)} or {last} must be set. Got none: no end.")


def configured(config: StudyConfig, spending: Plan) -> Strategy:
    """The strategy a configuration names, with those of its settings that the strategy has.

    Raises:
        ConfigError: no such strategy, or it has no limit on tokens and one was given.
    """
    family = find_strategy(config.strategy)
    names = {field.name for field in fields(cast(Any, family))}
    if config.spend is not None and "spending" not in names:
        raise ConfigError(
            f"--tokens must go with a strategy that spends them, such as auto. Got "
            f"'{config.strategy}'. Leave --tokens out."
        )
    wanted = {
        "spending": spending,
        "sensitivity_tokens": spending.sensitivities,
        "generations": config.generations,
        "offspring": config.offspring,
    }
    settings = {k: v for k, v in wanted.items() if k in names and v is not None}
    return cast(Any, family)(**settings)  # type: ignore[no-any-return]
