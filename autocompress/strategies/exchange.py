"""Exchange: few layers change at once, and only what is measured to be better stays."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from autocompress.core import GRADIENT, Allocation, Problem, Trial
from autocompress.knapsack import Region, solve_knapsack
from autocompress.predictions import Estimate, Sensitivities
from autocompress.strategies import check_setting
from autocompress.strategies.prices import mix, predicted_change, prices_around
from autocompress.strategies.racing import race

Rounds = Generator[Trial, None, tuple[Trial, Estimate]]


@dataclass(frozen=True)
class Exchange:
    """Rounds of: gradients at the incumbent, a few exchanges that they promise most of, a race.

    Prices hold near the incumbent, so the integer program may change `reach` layers at most; a
    level that is not the incumbent's counts as worse than estimated by `caution` standard errors,
    because the program picks the most flattering errors. It ends when no exchange promises a gain,
    when a round brings none, or when the tokens are spent.

    Args:
        reach: layers that may change in a round.
        contenders: different exchanges to race; each twice as far as the one before.
        caution: standard errors, at least 0.
        share: of what a batch of gradients says in the prices, 0 to 1.
        batch: tokens of the gradients of one round.
        tokens: to compare on in the end; whole windows, at most the search split.
    """

    reach: int = 8
    contenders: int = 3
    caution: float = 1.0
    share: float = 0.1
    batch: int = 4096
    tokens: int = 24_576

    def __post_init__(self) -> None:
        check_setting("reach", self.reach, 2)
        check_setting("contenders", self.contenders, 1)
        check_setting("caution", self.caution, 0)
        check_setting("share", self.share, 0, 1)
        check_setting("batch", self.batch, 1)
        check_setting("tokens", self.tokens, 1)

    def rounds(
        self,
        problem: Problem,
        incumbent: Trial,
        sensitivities: Estimate,
        prices: Estimate,
        before: int,
        spend: int,
    ) -> Rounds:
        """Yields the incumbent after every round that found a better one.

        Args:
            sensitivities: beside a dense model.
            prices: beside the incumbent, as far as they are known.
            before: search tokens that gradients have seen.
            spend: tokens that `problem.spent()` may come to.

        Returns:
            The last incumbent and prices.
        """
        batch, compared = (problem.fidelity(it).tokens for it in (self.batch, self.tokens))
        while problem.spent() + GRADIENT * batch + compared <= spend:
            around = problem.linearize(incumbent.allocation, batch, before)
            there = prices_around(sensitivities, incumbent.allocation, around)
            prices, before = mix(prices, there, self.share), before + batch
            afford = (spend - problem.spent()) // compared
            proposed = self._propose(problem, incumbent.allocation, prices)[:afford]
            if not proposed:
                break
            best, *_ = race(problem, [incumbent.allocation, *proposed], self.tokens, "exchange")
            if best.allocation == incumbent.allocation:
                break
            incumbent = best
            yield incumbent
        return incumbent, prices

    def _propose(
        self, problem: Problem, incumbent: Allocation, prices: Estimate
    ) -> list[Allocation]:
        """Allocations within reach that promise a gain, the nearest first."""
        limits = [(problem.table(b.cost), b.limit) for b in problem.budgets]
        cautious = _pessimistic(prices, incumbent, self.caution)
        found: list[Allocation] = []
        for step in range(self.contenders):
            near = Region(incumbent, least=1, most=self.reach << step)
            apart = [Region(other, least=2) for other in found]
            another = solve_knapsack(problem.space, limits, cautious, [near, *apart])
            if another is not None and predicted_change(cautious, incumbent, another) < 0:
                found.append(another)
        return found


def _pessimistic(prices: Estimate, incumbent: Allocation, caution: float) -> Sensitivities:
    """Prices, those of other levels than the incumbent's with `caution` standard errors on top."""
    return tuple(
        {level: value if level == own else bound[level] for level, value in row.items()}
        for row, bound, own in zip(
            prices.mean, prices.bound(caution), incumbent.levels, strict=True
        )
    )
