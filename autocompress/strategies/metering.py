"""Metering: what a strategy asks for, in tokens, whoever answers it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autocompress.core import GRADIENT, Allocation, Fidelity, Problem, Trial
from autocompress.predictions import Estimate, Linearization


def metered(problem: Problem) -> Problem:
    """The same problem, whose `spent` starts at 0 and counts.

    An evaluation counts the windows that this strategy has not asked for before at the same
    allocation and seed; a gradient pass counts `GRADIENT` times its tokens, once. What a study
    knows from an earlier run counts as well: a resumed search must end where it would have ended.
    """
    meter = _Meter(problem)
    return replace(
        problem,
        evaluate=meter.evaluate,
        sensitivities=meter.sensitivities,
        linearize=meter.linearize,
        spent=lambda: meter.spent,
        influence=meter.influence,
    )


class _Meter:
    """Counts what passes through to a problem."""

    def __init__(self, problem: Problem) -> None:
        self.spent = 0
        self._problem = problem
        self._scored: dict[tuple[Allocation, Fidelity], int] = {}
        self._passes: set[object] = set()

    def evaluate(
        self, allocations: Sequence[Allocation], fidelity: Fidelity, origin: str
    ) -> list[Trial]:
        for allocation in allocations:
            same = (allocation, replace(fidelity, tokens=0))
            known = self._scored.get(same, 0)
            self.spent += max(0, fidelity.tokens - known)
            self._scored[same] = max(known, fidelity.tokens)
        return self._problem.evaluate(allocations, fidelity, origin)

    def sensitivities(self, tokens: int) -> Estimate:
        self._count(tokens, tokens)
        return self._problem.sensitivities(tokens)

    def linearize(self, allocation: Allocation, tokens: int, before: int) -> Linearization:
        self._count((allocation, tokens, before), tokens)
        return self._problem.linearize(allocation, tokens, before)

    def influence(self, tokens: int) -> Sequence[float]:
        found = self._problem.influence(tokens)
        if found:
            self._count(("influence", tokens), tokens, 1)
        return found

    def _count(self, what: object, tokens: int, passes: int = GRADIENT) -> None:
        if what not in self._passes:
            self._passes.add(what)
            self.spent += passes * tokens
