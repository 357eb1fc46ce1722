"""Fronts: strategies that answer many limits of one cost in one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from autocompress.core import Budget, Problem, Trial
from autocompress.effort import Plan
from autocompress.errors import ConfigError
from autocompress.tables import did_you_mean

if TYPE_CHECKING:
    import numpy as np

# name -> module and class, imported when asked for
FRONTS = {
    "auto": ("autocompress.strategies.per_limit", "PerLimit"),
    "nsgaii": ("autocompress.strategies.nsga", "NSGAII"),
    "sweep": ("autocompress.strategies.sweep", "Sweep"),
}


class FrontStrategy(Protocol):
    """A search for a front: settings are fields, `spending` among them; run state is local."""

    def __call__(
        self, problem: Problem, limits: Sequence[Budget], rng: np.random.Generator
    ) -> Iterator[tuple[int, Trial]]:
        """Yield (number of a limit, its incumbent) after every step.

        Args:
            problem: its budgets hold beside each limit.
            limits: on one cost, rising; each can be met.
        """


def find_front(name: str, spending: Plan) -> FrontStrategy:
    """The front strategy called `name`.

    Args:
        spending: what each limit may spend; sensitivities are shared by all.

    Raises:
        ConfigError: no such strategy.
    """
    if name not in FRONTS:
        raise ConfigError(
            f"with --pareto, a strategy must be one of {', '.join(FRONTS)}. Got '{name}'."
            f"{did_you_mean(name, FRONTS)}"
        )
    module, symbol = FRONTS[name]
    return cast(FrontStrategy, cast(Any, getattr(import_module(module), symbol))(spending))
