"""Per limit: the default search at every limit of a front, on shared sensitivities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autocompress.core import Budget, Problem, Trial
from autocompress.effort import Plan
from autocompress.strategies.auto import Auto

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class PerLimit:
    """The integer programme, refinement, exchanges and evolution at each limit in turn.

    Args:
        spending: of each limit, the shared sensitivities included.
    """

    spending: Plan

    def __call__(
        self, problem: Problem, limits: Sequence[Budget], rng: np.random.Generator
    ) -> Iterator[tuple[int, Trial]]:
        search = Auto(self.spending)
        for number, limit in enumerate(limits):
            within = replace(problem, budgets=(limit, *problem.budgets))
            for trial in search(within, rng):
                yield number, trial
