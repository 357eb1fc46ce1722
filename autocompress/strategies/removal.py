"""Removal: which sublayers to leave out, each judged by forward passes beside what is gone."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from autocompress.core import Allocation, Evaluate, Problem, Trial
from autocompress.predictions import Estimate
from autocompress.strategies import check_setting
from autocompress.strategies.harms import Harms
from autocompress.strategies.racing import FIRST, race
from autocompress.strategies.uniform import nearest_uniform, uniform_origin
from autocompress.strategies.units import NOTHING, Rest, Unit, dropped, find_units, only_removes

if TYPE_CHECKING:
    import numpy as np

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
            reserve = (len(found) + 3) * self._compare(problem)
            if spent == before or spent > min(self.paths * self.tokens, self.tokens - reserve):
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
