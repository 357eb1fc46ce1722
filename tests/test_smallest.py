"""The smallest within a loss, on toys whose loss is known: what is claimed is measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from toys import WINDOW, ToyLoss, toy_problem, toy_sensitivities, toy_space

from autocompress.core import Allocation, Budget, Fidelity, Problem, Trial
from autocompress.cost import size_tables
from autocompress.knapsack import cheapest
from autocompress.predictions import Sensitivities
from autocompress.smallest import PROBE, Gauge, Hunt

TOKENS = 32 * WINDOW  # of the validation split


class Counted:
    """Evaluates a toy, counts windows, keeps what was measured in full."""

    def __init__(self, space, seed: int = 0, noise: float = 0.2) -> None:
        self.loss, self.costs = ToyLoss(space, seed), size_tables(space, 1000)
        self.windows = 0
        spread = np.random.default_rng(seed).lognormal(0, noise, 32)
        self.scale = (spread / spread.mean()).tolist()  # windows differ more than allocations
        self.known: dict[Allocation, int] = {}

    def __call__(
        self, allocations: Sequence[Allocation], fidelity: Fidelity, origin: str
    ) -> list[Trial]:
        found = []
        for it in allocations:
            score = self.loss(it, fidelity)
            scaled = [a * b for a, b in zip(score.losses, self.scale, strict=False)]
            score = score._replace(losses=tuple(scaled))
            costs = tuple(table.total(it) for table in self.costs)
            found.append(Trial(0, it, fidelity, score, costs, origin))
            fresh = len(scaled) - self.known.get(it, 0)
            self.windows += max(0, fresh)
            self.known[it] = max(self.known.get(it, 0), len(scaled))
        return found


def setting(seed: int, blocks: int = 6) -> tuple[Problem, Counted]:
    space = toy_space(blocks)
    counted = Counted(space, seed)
    return toy_problem(space, (), evaluate=counted), counted


def greedy_path(problem: Problem, prices: Sensitivities) -> list[Allocation]:
    """From the largest allocation down: each step takes the level that saves bytes for least."""
    table = problem.table("bytes")
    at = Allocation(tuple(max(row, key=row.__getitem__) for row in table.entries))
    path = [at]
    while True:
        steps = [
            ((row[new] - row[old]) / (cost[old] - cost[new]), i, new)
            for i, (old, row, cost) in enumerate(zip(at.levels, prices, table.entries, strict=True))
            for new in problem.space.levels[i]
            if cost[new] < cost[old]
        ]
        if not steps:
            return path
        _, index, level = min(steps, key=lambda step: step[:2])
        at = at.swap(index, level)
        path.append(at)


def hunted(problem: Problem, limit: float, seed: int, wrong: float = 1.0) -> tuple[Gauge, Hunt]:
    """By the toy's own sensitivities, off by a factor."""
    prices = toy_sensitivities(problem.space, seed)
    table = problem.table("bytes")

    path = greedy_path(problem, prices)

    def family(most: float) -> Allocation | None:
        return next((it for it in path if table.total(it) <= most), None)

    def predict(allocation: Allocation) -> float:
        return wrong * sum(row[lv] for row, lv in zip(prices, allocation.levels, strict=True))

    return Gauge(problem, TOKENS), Hunt(table, limit, family, predict, "x")


def bounds(problem: Problem, gauge: Gauge) -> tuple[Allocation, float, float, float]:
    """The largest allocation, the least cost, and the losses of both ends."""
    table = problem.table("bytes")
    space = problem.space
    largest = Allocation(tuple(max(row, key=row.__getitem__) for row in table.entries))
    smallest = cheapest(space, table)
    ends = [gauge.measure(it, "x").loss for it in (largest, smallest)]
    return largest, table.total(smallest), ends[0], ends[1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("wrong", [0.2, 1.0, 5.0])
def test_the_limit_is_kept_and_nearly_used(seed: int, share: float, wrong: float) -> None:
    problem, counted = setting(seed)
    gauge, _ = hunted(problem, 1.0, seed)
    largest, low, best, worst = bounds(problem, gauge)
    limit = best * (worst / best) ** share
    gauge, hunt = hunted(problem, limit, seed, wrong)
    gauge.measure(largest, "x")
    before = counted.windows
    found = hunt.run(gauge, largest, low)
    assert gauge.trials[found].loss <= limit
    assert len(gauge.trials[found].score.losses) == TOKENS // WINDOW, "measured on all windows"
    table = problem.table("bytes")
    smaller = hunt.family(table.total(found) - 0.02 * (table.total(found) - table.base))
    if smaller is not None and gauge.trials[found].loss < 0.99 * limit:
        assert gauge.measure(smaller, "x").loss > limit * 0.97, "two percent less would do as well"
    assert counted.windows - before <= 14 * PROBE + 6 * 32


def test_few_windows_tell_the_loss_on_all() -> None:
    problem, counted = setting(0)
    gauge = Gauge(problem, TOKENS)
    one, other = (problem.space.uniform(level) for level in problem.space.levels[0][1:3])
    gauge.measure(one, "x")
    before = counted.windows
    guess = gauge.estimate(other, "x")
    assert counted.windows - before == PROBE
    assert guess == pytest.approx(gauge.measure(other, "x").loss, rel=0.02)
    alone = counted([other], Fidelity(PROBE * WINDOW, 0, "validate"), "x")[0].loss
    assert abs(alone / gauge.trials[other].loss - 1) > 0.02, "these windows are not like all others"


def test_what_a_few_windows_flatter_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates that are far too good cost measurements, never the limit."""
    problem, _ = setting(1)
    gauge, _ = hunted(problem, 1.0, 1)
    largest, low, best, worst = bounds(problem, gauge)
    limit = math.sqrt(best * worst)
    gauge, hunt = hunted(problem, limit, 1)
    gauge.measure(largest, "x")
    measured = gauge.estimate
    monkeypatch.setattr(gauge, "estimate", lambda *given: 0.5 * measured(*given))
    found = hunt.run(gauge, largest, low)
    assert gauge.trials[found].loss <= limit
    assert any(trial.loss > limit for trial in gauge.trials.values())


def test_losses_that_are_infinite_or_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, counted = setting(2)
    table = problem.table("bytes")
    gauge, hunt = hunted(problem, 0.5, 2)
    largest, low, *_ = bounds(problem, gauge)
    middle = (low + table.total(largest)) / 2

    def broken(allocations, fidelity, origin):
        for trial in counted(allocations, fidelity, origin):
            value = 0.0 if table.total(trial.allocation) > middle else math.inf
            yield trial.__class__(
                0,
                trial.allocation,
                fidelity,
                trial.score._replace(losses=(value,) * len(trial.score.losses)),
                trial.costs,
                origin,
            )

    problem = toy_problem(problem.space, (), evaluate=lambda *given: list(broken(*given)))
    gauge = Gauge(problem, TOKENS)
    gauge.measure(largest, "x")
    found = hunt.run(gauge, largest, low)
    assert gauge.trials[found].loss == 0
    assert middle < table.total(found) <= middle + 0.02 * (table.total(largest) - table.base)


def test_every_cost_of_a_short_list_is_considered() -> None:
    """A family with gaps, such as uniform allocations: none between two costs is passed over."""
    problem, _ = setting(3)
    table = problem.table("bytes")
    every = sorted(map(problem.space.uniform, problem.space.levels[0]), key=table.total)
    gauge = Gauge(problem, TOKENS)
    losses = [gauge.measure(it, "x").loss for it in every]
    for loss, expected in zip(losses, every, strict=True):
        fresh = Gauge(problem, TOKENS)
        fresh.measure(every[-1], "x")
        hunt = Hunt(
            table,
            loss * 1.0001,
            lambda most: next((it for it in reversed(every) if table.total(it) <= most), None),
            lambda it: 1.0,
            "uniform",
        )
        assert hunt.run(fresh, every[-1], 0) == expected
    assert all(a > b for a, b in itertools.pairwise(losses))


def test_a_limit_beside_the_loss_stays(tmp_path) -> None:
    """The family of a problem with another budget never leaves it."""
    from autocompress.quality_search import _family
    from autocompress.smallest import Goal

    space = toy_space(2)
    bits, size = size_tables(space, 1000)
    other = Budget("bits", 4 * space.weights, "4bits")
    problem = toy_problem(space, (other,), (bits, size))
    family = _family(problem, Goal(Budget("loss", 1.0, "1KL"), "bytes"), toy_sensitivities(space))
    for most in np.linspace(1000, 1000 + space.weights, 5):
        found = family(float(most))
        if found is not None:
            assert bits.total(found) <= other.limit and size.total(found) <= most
