"""What a surrogate search believes after everything it has seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from autocompress.core import Allocation, Fidelity, Trial
from autocompress.strategies.grid import Grid
from autocompress.strategies.offspring import Offspring, diverse_elites
from autocompress.strategies.record import Record, usual_spread, variances
from autocompress.strategies.surrogate_basis import Basis
from autocompress.strategies.surrogate_model import (
    Surrogate,
    expected_improvement,
    most_promising,
)

HOPE = 0.15  # least chance of being better than the incumbent that is worth a race


@dataclass(frozen=True, eq=False)
class Learner:
    """Answers questions about allocations by a surrogate of all trials in a record."""

    grid: Grid
    basis: Basis
    record: Record

    def surrogate(self) -> Surrogate:
        """The surrogate of everything recorded so far."""
        differences = self.record.differences()
        return Surrogate.fit(
            self.basis,
            self.grid.encode([it.one for it in differences]),
            self.grid.encode([it.other for it in differences]),
            np.array([fmean(it.gaps) for it in differences]),
            np.array(variances(differences)),
        )

    def offspring(
        self,
        draw: Offspring,
        parent: Allocation,
        pool: int,
        count: int,
        fidelity: Fidelity,
        rng: np.random.Generator,
    ) -> list[Allocation]:
        """Of a pool of new offspring, those of most expected improvement as a group.

        Args:
            pool: offspring to choose from.
            count: to choose.
            fidelity: that they will be scored at.
        """
        surrogate, seen, at = (
            self.surrogate(),
            self.record.allocations(),
            self.grid.encode([parent])[0],
        )
        picks = self.grid.encode(seen)
        mean, _ = surrogate.predict(picks, at)
        elites = [seen[number] for number in diverse_elites(picks, mean)]
        known = set(seen)
        drawn = draw(parent, elites, surrogate, pool, rng)
        fresh = [it for it in drawn if it not in known]
        mean, covariance = surrogate.predict(self.grid.encode(fresh), at)
        windows = fidelity.tokens // self.record.window
        noise = usual_spread(self.record.differences()) / windows
        return [fresh[number] for number in most_promising(mean, covariance, noise, count)]

    def hopeful(self, incumbent: Trial, count: int) -> list[Allocation]:
        """Seen allocations that may be better, most expected improvement first.

        Not those that the incumbent has met on all of its windows.
        """
        met = self.record.met(incumbent.fidelity)
        rest = [it for it in self.record.allocations() if it not in met]
        if not rest:
            return []
        mean, covariance = self.surrogate().predict(
            self.grid.encode(rest), self.grid.encode([incumbent.allocation])[0]
        )
        deviation = np.sqrt(np.maximum(covariance.diagonal(), 1e-300))
        promise = expected_improvement(mean, deviation)
        chance = np.array([0.5 * math.erfc(z / math.sqrt(2)) for z in mean / deviation])
        best = [number for number in np.argsort(-promise, kind="stable") if chance[number] >= HOPE]
        return [rest[number] for number in best[:count]]

    def prefers(self, one: Allocation, other: Allocation) -> bool:
        """Whether `one` is believed to have the lower loss."""
        mean, _ = self.surrogate().predict(self.grid.encode([one]), self.grid.encode([other])[0])
        return bool(mean[0] < 0)
