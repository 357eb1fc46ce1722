"""Removal: which sublayers to leave out, each judged by forward passes beside what is gone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from autocompress.core import Allocation, Evaluate, Fidelity, Problem, Trial
from autocompress.predictions import Estimate
from autocompress.strategies import check_setting
from autocompress.strategies.racing import FIRST, race
from autocompress.strategies.uniform import nearest_uniform, uniform_origin
from autocompress.strategies.units import DROP, Rest, Unit, dropped, find_units, only_removes

if TYPE_CHECKING:
    import numpy as np

NOTHING: Unit = frozenset()
INFLUENCE = 4  # windows that influence is taken on
PATIENCE = 2  # removals in a row that promise less, before a path ends
SLACK = 1.02  # a set that loses so much more on the few windows of a measurement does not race


class Step(NamedTuple):
    """One set on a path.

    Args:
        gone: what is left out.
        answer: with all other layers at the levels that the budgets allow.
        promised: the measured loss of what is gone and the predicted loss of the rest.
    """

    gone: Unit
    answer: Allocation
    promised: float


@dataclass(frozen=True)
class Removal:
    """Greedy removal by measurement, then repair of its answer as long as that helps.

    Leaving out a sublayer is far outside the range of gradients, so the loss without each unit
    (a sublayer or a whole block, the others at their best level) is measured. The unit that loses
    least for the share of the budget it meets goes; the next few are measured again beside it,
    since what is gone changes what the others are worth; and so on until the budgets hold. Where
    such a path ends is much a matter of its first steps, so several are walked, each on a window of
    its own. Their answers race the blocks of least influence, as ShortGPT leaves them out, and the
    nearest uniform allocation. Then rounds: what is missed most comes back, and a path is walked
    from there without it.

    Args:
        tokens: that may be spent, by the problem's meter.
        fresh: units that are measured again before one goes or comes back.
        windows: of a measurement in rounds, at most; fewer where tokens are few.
        compare: windows that answers race on in the end.
        paths: share of the tokens that the first paths may have taken, what was known included.

    References:
        Men et al., ShortGPT, arXiv:2403.03853, eq. 1. Minoux, Accelerated greedy algorithms, 1978.
        Feo, Resende, Greedy randomized adaptive search procedures, 1995. Ruiz, Stützle, iterated
        greedy, European Journal of Operational Research 177, 2007.
    """

    tokens: int
    fresh: int = 6
    windows: int = 4
    compare: int = 16
    paths: float = 0.7

    def __post_init__(self) -> None:
        check_setting("paths", self.paths, 0, 1)
        for name in ("tokens", "fresh", "windows", "compare"):
            check_setting(name, getattr(self, name), 1)

    def search(
        self, problem: Problem, measure: Evaluate, prices: Estimate, rng: np.random.Generator
    ) -> Generator[Trial, None, Harms]:
        """Yields the incumbent, then every better one.

        Args:
            problem: metered; its answers are within the budgets.
            measure: evaluates what is not, on the same meter.
            prices: of the levels that keep something.

        Returns:
            What was measured.
        """
        influence = problem.influence(min(problem.tokens, INFLUENCE * problem.window))
        harms = self._screen(problem, measure, prices, influence)
        found = self._walks(problem, harms)
        incumbent = self._start(problem, harms, influence, found)
        yield incumbent
        yield from self._rounds(problem, harms, incumbent, rng)
        return harms

    def _screen(
        self, problem: Problem, measure: Evaluate, prices: Estimate, influence: Sequence[float]
    ) -> Harms:
        """Every unit alone on one window, or those of least influence if tokens are few."""
        count = max(1, min(self.windows, self.tokens // (200 * problem.window)))
        fidelity = problem.fidelity(count * problem.window)
        harms = Harms(Rest.of(problem, prices.mean), measure, fidelity)
        afford = (self.tokens - problem.spent()) // 2 // problem.window
        harms.screen(find_units(problem.space, influence)[: max(1, afford)], problem.fidelity(1))
        return harms

    def _start(
        self, problem: Problem, harms: Harms, influence: Sequence[float], found: Sequence[Step]
    ) -> Trial:
        """The best of the paths' answers, the blocks of least influence and uniform."""
        uniform = nearest_uniform(problem)
        names = {uniform: uniform_origin(problem, uniform)}
        shortened = harms.by_rank(find_blocks(problem, influence)) if influence else None
        if shortened is not None:
            names[shortened] = "influence"
        names |= {step.answer: "removal" for step in found}
        best, *_ = race(problem, list(names), self._compare(problem), "removal")
        return replace(best, origin=names[best.allocation])

    def _walks(self, problem: Problem, harms: Harms) -> list[Step]:
        """Where paths from nothing end, each by its own window."""
        alone, found, number = harms.harm, dict[Allocation, Step](), 0
        while True:
            before, fidelity = problem.spent(), problem.fidelity(problem.window, number)
            own = replace(harms, fidelity=fidelity, harm=dict(alone))
            step = self._walk(own, NOTHING, NOTHING)
            harms.harm = own.harm
            if step is not None:
                found.setdefault(step.answer, step)
            spent = 2 * problem.spent() - before  # behind one more path
            race = (len(found) + 3) * self._compare(problem)
            if spent == before or spent > min(self.paths * self.tokens, self.tokens - race):
                return list(found.values())
            number += 1

    def _walk(self, harms: Harms, gone: Unit, forbidden: Unit) -> Step | None:
        """The step of a path that promises least; None where no step meets the budgets."""
        best, worse = None, 0
        while True:
            answer = harms.rest.complete(gone)
            if answer is not None:
                promised = harms.loss(gone) + harms.rest.predicted(answer)
                if best is None or promised < best.promised:
                    best, worse = Step(gone, answer, promised), 0
                else:
                    worse += 1
                if worse == PATIENCE or only_removes(harms.rest.problem.space):
                    return best
            more = harms.next(gone, forbidden, self._affords(harms))
            if more is None:
                return best
            gone |= more

    def _rounds(
        self, problem: Problem, harms: Harms, incumbent: Trial, rng: np.random.Generator
    ) -> Iterator[Trial]:
        """What is missed most comes back and others go, until nothing helps or tokens are spent."""
        tried: set[Unit] = set()
        reserve = 2 * self._compare(problem)
        while self._affords(harms) >= 1 and problem.spent() + reserve <= self.tokens:
            gone = dropped(incumbent.allocation)
            back = harms.missed(gone, tried, min(self.fresh, self._affords(harms)), rng)
            if back is None:
                return
            tried.add(back)
            found = self._walk(harms, gone - back, back)
            if found is None or found.answer == incumbent.allocation:
                continue
            if found.promised > SLACK * harms.promised(incumbent.allocation):
                continue
            best, *_ = race(
                problem, [incumbent.allocation, found.answer], self._compare(problem), "removal"
            )
            if best.allocation != incumbent.allocation:
                incumbent, tried = best, set()
                yield incumbent

    def _compare(self, problem: Problem) -> int:
        """Tokens that answers race on."""
        most = max(FIRST, min(self.compare, self.tokens // (16 * problem.window)))
        return problem.fidelity(most * problem.window).tokens

    def _affords(self, harms: Harms) -> int:
        """How many measurements there are tokens for, the races' put aside."""
        problem = harms.rest.problem
        left = self.tokens - problem.spent() - 3 * self._compare(problem)
        return max(0, min(self.fresh, left // harms.fidelity.tokens))


def find_blocks(problem: Problem, influence: Sequence[float]) -> list[Unit]:
    """The largest units, those of least influence first."""
    units = find_units(problem.space, influence)
    return [unit for unit in units if not any(unit < other for other in units)]


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
