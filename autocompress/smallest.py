"""The smallest allocation whose loss stays within a limit: a budget of quality, not of size.

Losses are measured on validation windows, so what is returned keeps the limit there. Most
allocations are measured on the first few of those windows only: windows differ far more than
allocations do, so the ratio of two allocations' losses on the same few windows says what the one
that is known on all windows tells of the other (a ratio estimate). What is claimed in the end is
measured on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from autocompress.core import Allocation, Budget, CostTable, Fidelity, Problem, Trial
from autocompress.cost import LOSS

Family = Callable[[float], Allocation | None]  # limit on a cost -> the best within, or None
Predict = Callable[[Allocation], float]  # nats/token

PROBE = 4  # validation windows that an allocation is first measured on
PROBES = 6  # of a family, at most, between two measurements on all windows
NEAR = 0.01  # share of the limit on the loss that may stay unused
FINE = 0.005  # share of a cost, without what no level changes, that is not worth a measurement
DOUBT = 0.05  # share of the limit by which an estimate may be off
HALVINGS = 24  # of the range of costs, while predictions are asked


@dataclass(frozen=True)
class Goal:
    """The smallest within a loss, in place of the least loss within a size.

    Args:
        budget: limit on the loss on validation windows, nats/token.
        objective: name of the cost to make small: 'bytes' or 'latency'.
    """

    budget: Budget
    objective: str


@dataclass
class Gauge:
    """The loss of allocations on validation windows, in full or from a few of them.

    Args:
        problem: evaluates; its window says how many tokens one has.
        tokens: of the validation split.
        trials: every allocation that was measured on all windows.
    """

    problem: Problem
    tokens: int
    trials: dict[Allocation, Trial] = field(default_factory=dict)

    def measure(self, allocation: Allocation, origin: str) -> Trial:
        """The trial on all validation windows."""
        if allocation not in self.trials:
            self.trials[allocation] = self._trial(allocation, self.tokens, origin)
        return self.trials[allocation]

    def estimate(self, allocation: Allocation, origin: str) -> float:
        """The loss on all windows as the first few tell, nats/token."""
        few = PROBE * self.problem.window
        if few >= self.tokens or not self.trials:
            return self.measure(allocation, origin).loss
        if allocation in self.trials:
            return self.trials[allocation].loss
        first = self._trial(allocation, few, origin).loss
        parts = [(it.score.first(PROBE).loss, it.loss) for it in self.trials.values()]
        known = [(part, whole) for part, whole in parts if part > 0 and math.isfinite(whole)]
        if not known or not 0 < first < math.inf:
            return first
        part, whole = min(known, key=lambda pair: abs(math.log(pair[0] / first)))
        return first * whole / part

    def _trial(self, allocation: Allocation, tokens: int, origin: str) -> Trial:
        (trial,) = self.problem.evaluate([allocation], Fidelity(tokens, 0, "validate"), origin)
        return trial


@dataclass
class Hunt:
    """Looks in a family of allocations, one for each size, for the smallest that keeps a limit.

    Predictions say where to look: right up to a factor, which the last measurement sets. Each
    measurement halves what is left at least every other time, so none is needed but a few.

    Args:
        table: the cost to make small.
        limit: on the loss on validation windows, inclusive, nats/token.
        family: limit on the cost -> allocation.
        predict: its loss; only ratios count.
        origin: who proposes.
    """

    table: CostTable
    limit: float
    family: Family
    predict: Predict
    origin: str
    _known: dict[float, Allocation | None] = field(default_factory=dict, repr=False)

    def run(self, gauge: Gauge, start: Allocation, low: float) -> Allocation:
        """The smallest that was measured to keep the limit on all validation windows.

        Args:
            start: keeps it, measured.
            low: cost below which none is expected; no allocation has less.
        """
        best = start
        while True:
            found, low = self._probe(gauge, best, low)
            if found is None or found == best:
                return best
            if gauge.measure(found, self.origin).loss <= self.limit:
                best = found
            else:
                low = self.table.total(found)
            if self._settled(gauge.trials[best].loss, low, self.table.total(best)):
                return best

    def _probe(self, gauge: Gauge, best: Allocation, low: float) -> tuple[Allocation | None, float]:
        """The smallest that a few windows say keeps the limit, and what cost seems too little."""
        high, found = self.table.total(best), None
        ratio = self._ratio(gauge.trials[best].loss, best)
        for step in range(PROBES):
            between = self._aim(ratio, low, high) if step % 2 == 0 else None
            between = between or self._inside((low + high) / 2, low, high)
            between = between or self._inside(high - self._step(high), low, high)
            if between is None:
                break
            loss = self._estimate(gauge, between, high)
            ratio = self._ratio(loss, between)
            if loss <= self.limit:
                found, high = between, self.table.total(between)
            else:
                low = self.table.total(between)
            if found is not None and self._settled(loss, low, high):
                break
        return found, low

    def _estimate(self, gauge: Gauge, allocation: Allocation, high: float) -> float:
        """The loss from a few windows; from all, where it is in doubt and much smaller."""
        loss = gauge.estimate(allocation, self.origin)
        gain = high - self.table.total(allocation)
        if self.limit < loss <= self.limit * (1 + DOUBT) and gain > 4 * self._step(high):
            return gauge.measure(allocation, self.origin).loss
        return loss

    def _ratio(self, loss: float, allocation: Allocation) -> float:
        predicted = self.predict(allocation)
        return loss / predicted if predicted > 0 and 0 < loss < math.inf else 1.0

    def _settled(self, loss: float, low: float, high: float) -> bool:
        """Whether little more can be gained: the limit is nearly reached, or the size is known."""
        reached = self.limit * (1 - NEAR) <= loss <= self.limit
        return reached or high - low <= self._step(high)

    def _step(self, high: float) -> float:
        return FINE * (high - self.table.base)

    def _aim(self, ratio: float, low: float, high: float) -> Allocation | None:
        """The smallest between two costs that predictions, times a ratio, say keeps the limit."""
        found = None
        for _ in range(HALVINGS):
            if high - low <= self._step(high):
                break
            middle = (low + high) / 2
            here = self._inside(middle, low, high)
            if here is None:
                low = middle
            elif ratio * self.predict(here) <= self.limit:
                found, high = here, self.table.total(here)
            else:
                low = middle
        return found

    def _best(self, limit: float) -> Allocation | None:
        """The family's allocation within a limit; the best within more that fits is the best."""
        for most, known in self._known.items():
            if known is not None and self.table.total(known) <= limit <= most:
                return known
        self._known[limit] = self.family(limit)
        return self._known[limit]

    def _inside(self, limit: float, low: float, high: float) -> Allocation | None:
        """The family's allocation within `limit`, if it costs more than `low`, less than `high`."""
        found = self._best(limit)
        if found is None or not low < self.table.total(found) < high:
            return None
        return found


def split_goal(
    budgets: Sequence[Budget], objective: str | None
) -> tuple[Goal | None, list[Budget]]:
    """What is to be made small, bytes unless said, under which loss, if any; the other budgets."""
    losses = [budget for budget in budgets if budget.cost == LOSS]
    others = [budget for budget in budgets if budget.cost != LOSS]
    if not losses:
        return None, others
    return Goal(min(losses, key=lambda it: it.limit), objective or "bytes"), others
