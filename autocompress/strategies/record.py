"""Everything a strategy has seen: scores by windows, and the differences between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, variance
from typing import NamedTuple

from autocompress.core import Allocation, Fidelity, Problem, Score, Trial

PRIOR_WINDOWS = 4  # that the usual spread of a difference counts as, beside a pair's own


class Difference(NamedTuple):
    """How much more `one` loses than `other` on windows that both were scored on.

    Args:
        gaps: per window, nats/token.
    """

    one: Allocation
    other: Allocation
    gaps: tuple[float, ...]


class Record:
    """Evaluates like a problem, and keeps the longest score of every allocation and seed.

    What a strategy learns from must be what it asked for itself. A study knows more, from runs
    before: with that, a resumed search would not repeat what it did.
    """

    def __init__(self, problem: Problem) -> None:
        self._evaluate, self.window = problem.evaluate, problem.window
        self._scores: dict[tuple[int, str], dict[Allocation, Score]] = {}

    def evaluate(
        self, allocations: Sequence[Allocation], fidelity: Fidelity, origin: str
    ) -> list[Trial]:
        """Trials of `allocations`, in order."""
        trials = self._evaluate(allocations, fidelity, origin)
        known = self._scores.setdefault((fidelity.seed, fidelity.split), {})
        for trial in trials:
            before = known.get(trial.allocation)
            if before is None or len(before.losses) < len(trial.score.losses):
                known[trial.allocation] = trial.score
        return trials

    def allocations(self) -> list[Allocation]:
        """Every allocation that was scored, in order."""
        return list(dict.fromkeys(it for known in self._scores.values() for it in known))

    def met(self, fidelity: Fidelity) -> set[Allocation]:
        """Allocations that were scored on every window of a fidelity."""
        known = self._scores.get((fidelity.seed, fidelity.split), {})
        windows = fidelity.tokens // self.window
        return {it for it, score in known.items() if len(score.losses) >= windows}

    def differences(self) -> list[Difference]:
        """Of every allocation to the one that knows most windows of the same seed, finite ones."""
        found = []
        for known in self._scores.values():
            other = max(known, key=lambda it: len(known[it].losses))
            for one in known:
                pairs = zip(known[one].losses, known[other].losses, strict=False)
                gaps = tuple(a - b for a, b in pairs)
                if one != other and all(map(math.isfinite, gaps)):
                    found.append(Difference(one, other, gaps))
        return found


def usual_spread(differences: Sequence[Difference]) -> float:
    """Variance of a difference from window to window, (nats/token)²: the median over pairs."""
    told = [variance(it.gaps) for it in differences if len(it.gaps) > 1]
    return median(told) if told else fmean([it.gaps[0] ** 2 for it in differences] or [0.0])


def variances(differences: Sequence[Difference]) -> list[float]:
    """Of the mean of each difference; drawn towards the usual, for few windows do not tell it."""
    usual = usual_spread(differences)
    found = []
    for gaps in (it.gaps for it in differences):
        rest = len(gaps) - 1
        spread = (PRIOR_WINDOWS * usual + rest * (variance(gaps) if rest else 0.0)) / (
            PRIOR_WINDOWS + rest
        )
        found.append(spread / len(gaps))
    return found
