"""What the loss is without some layers, as far as it was measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autocompress.core import Allocation, Evaluate, Fidelity
from autocompress.predictions import Estimate
from autocompress.strategies.units import DROP, NOTHING, Rest, Unit, dropped

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Harms:
    """What is known of the loss without some layers, the others at their best level.

    Args:
        rest: what becomes of the others.
        measure: evaluates allocations over the budgets, too.
        fidelity: of measurements beside what is gone.
        harm: unit -> nats/token that it cost when it was last measured.
    """

    rest: Rest
    measure: Evaluate
    fidelity: Fidelity
    harm: dict[Unit, float] = field(default_factory=dict)

    def losses(self, sets: Sequence[Unit], fidelity: Fidelity | None = None) -> list[float]:
        """Losses of the base without each of some sets."""
        allocations = [self.rest.without(gone) for gone in sets]
        trials = self.measure(allocations, fidelity or self.fidelity, "removal")
        return [trial.loss for trial in trials]

    def loss(self, gone: Unit) -> float:
        """Loss of the base without `gone`."""
        return self.losses([gone])[0]

    def promised(self, allocation: Allocation) -> float:
        """As a step's, of an allocation."""
        return self.loss(dropped(allocation)) + self.rest.predicted(allocation)

    def screen(self, units: Sequence[Unit], fidelity: Fidelity) -> None:
        """Measure units alone."""
        whole, *losses = self.losses([NOTHING, *units], fidelity)
        self.harm |= {unit: it - whole for unit, it in zip(units, losses, strict=True)}

    def next(self, gone: Unit, forbidden: Unit, fresh: int) -> Unit | None:
        """The unit to leave out behind `gone`: of the most promising, measured again, the best.

        Args:
            fresh: how many to measure; at 0 what is known decides.
        """
        every = [
            unit
            for unit in self.harm
            if not unit <= gone and not unit & forbidden and self._keeps_some(gone | unit)
        ]
        if not every:
            return None
        promising = sorted(every, key=lambda unit: self._price(unit, gone))[: max(1, fresh)]
        if fresh:
            before, *losses = self.losses([gone, *(gone | unit for unit in promising)])
            self.harm |= {unit: loss - before for unit, loss in zip(promising, losses, strict=True)}
        return min(promising, key=lambda unit: self._price(unit, gone))

    def missed(
        self, gone: Unit, tried: set[Unit], fresh: int, rng: np.random.Generator
    ) -> Unit | None:
        """Of some units that are gone, the one whose return gains most for what it takes.

        Once each was tried, pairs of layers.
        """
        units = [unit for unit in self.harm if unit <= gone and unit not in tried]
        if not units:
            pairs = map(frozenset, itertools.combinations(sorted(gone), 2))
            units = [pair for pair in pairs if pair not in tried]
        if not units:
            return None
        some: list[Unit] = [units[i] for i in rng.permutation(len(units))[:fresh]]
        with_all, *losses = self.losses([gone, *(gone - unit for unit in some)])
        gains = [with_all - loss for loss in losses]
        takes = [self.rest.saving(unit, gone - unit) or math.inf for unit in some]
        order = sorted(range(len(some)), key=lambda i: gains[i] / takes[i])
        return some[order[-1]]

    def by_rank(self, ranked: Sequence[Unit]) -> Allocation | None:
        """The first units left out until the budgets hold; None where nothing must go."""
        gone = NOTHING
        for unit in ranked:
            if self.rest.complete(gone) is not None:
                break
            if self._keeps_some(gone | unit):
                gone |= unit
        return self.rest.complete(gone) if gone else None

    def _price(self, unit: Unit, gone: Unit) -> float:
        """Loss for the share of the budgets that it meets."""
        saving = self.rest.saving(unit, gone)
        harm = self.harm[unit]
        return harm / saving if saving > 0 and math.isfinite(harm) else math.inf

    def _keeps_some(self, gone: Unit) -> bool:
        return self.rest.without(gone).keeps_some


def measured_prices(prices: Estimate, harms: Harms) -> Estimate:
    """Prices, those of `drop` as measured; their relative errors as they were."""
    mean, stderr = [dict(row) for row in prices.mean], [dict(row) for row in prices.stderr]
    for unit, harm in harms.harm.items():
        if len(unit) == 1:
            (layer,) = unit
            known = mean[layer][DROP]
            mean[layer][DROP] = harm
            stderr[layer][DROP] *= abs(harm / known) if known else 1.0
    return Estimate(tuple(mean), tuple(stderr))
