import math
from dataclasses import replace

import numpy as np
import pytest
from toys import (
    Memory,
    ToyLoss,
    toy_estimate,
    toy_linearization,
    toy_problem,
    toy_sensitivities,
    toy_space,
)

from autocompress.core import GRADIENT, Fidelity
from autocompress.cost import parse_budget, size_tables
from autocompress.errors import ConfigError
from autocompress.levels import parse_level
from autocompress.predictions import Estimate
from autocompress.strategies.exchange import Exchange
from autocompress.strategies.metering import metered
from autocompress.strategies.prices import mix, predicted_change, prices_around
from autocompress.strategies.refinement import Refinement
from autocompress.strategies.uniform import nearest_uniform

SPACE = toy_space()
COSTS = size_tables(SPACE, 1000)


def problem_of(limit="3.0", **changes):
    return replace(toy_problem(SPACE, [parse_budget(f"{limit}bits", SPACE)]), **changes)


def run(strategy, problem, seed=0):
    return list(strategy(problem, np.random.default_rng(seed)))


def quiet_loss(allocation):
    """`ToyLoss` without its noise."""
    loss = ToyLoss(SPACE)
    loss._noise = 0.0
    return loss(allocation, Fidelity(16)).loss


@pytest.mark.parametrize("uniform", [0, 2])
def test_prices_around_an_allocation_are_what_single_changes_cost(uniform):
    at = SPACE.uniform(SPACE.levels[0][uniform]).swap(3, parse_level("w4g64"))
    prices = prices_around(toy_estimate(SPACE), at, toy_linearization(SPACE, at)).mean
    before = quiet_loss(at)
    for index, row in enumerate(prices):
        for level in row:
            moved = at.swap(index, level)
            expected = quiet_loss(moved) - before
            found = predicted_change(prices, at, moved)
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_errors_of_prices_are_those_of_their_parts():
    at = SPACE.uniform(SPACE.levels[0][1])
    around = toy_linearization(SPACE, at)
    ones = tuple(dict.fromkeys(row, 1.0) for row in around.slope.mean)
    around = around._replace(slope=Estimate(around.slope.mean, ones))
    prices = prices_around(toy_estimate(SPACE), at, around)
    for row, error in zip(prices.stderr, toy_estimate(SPACE).stderr, strict=True):
        assert row == {level: math.hypot(error[level], 2.0) for level in row}


def test_a_mixture_has_the_mean_and_the_error_of_independent_parts():
    one, other = toy_estimate(SPACE), toy_estimate(SPACE, seed=1)
    mixed, level = mix(one, other, 0.25), SPACE.levels[0][0]
    mean = 0.75 * one.mean[0][level] + 0.25 * other.mean[0][level]
    error = math.hypot(0.75 * one.stderr[0][level], 0.25 * other.stderr[0][level])
    assert mixed.mean[0][level] == pytest.approx(mean)
    assert mixed.stderr[0][level] == pytest.approx(error)


def test_refinement_improves_on_the_ilp_where_losses_do_not_add_up():
    better = 0
    for limit in ("2.6", "3.0", "3.5", "4.0"):
        incumbents = run(Refinement(share=1.0, tokens=256), problem_of(limit))
        first, last = incumbents[0], incumbents[-1]
        better += quiet_loss(last.allocation) < quiet_loss(first.allocation)
        assert quiet_loss(last.allocation) <= quiet_loss(first.allocation) * 1.001
    assert better >= 2


def test_refinement_takes_new_windows_for_every_step():
    asked = []

    def around(at, tokens, before):
        asked.append((tokens, before))
        return toy_linearization(SPACE, at)

    run(Refinement(steps=3, sensitivity_tokens=64, batch=32), problem_of(linearize=around))
    assert asked == [(32, 64), (32, 96), (32, 128)]


def start_of(problem, tokens=256):
    """The ILP's answer on all windows, and prices that know nothing but sensitivities."""
    (trial,) = list(Refinement(steps=0)(problem, np.random.default_rng(0)))[:1]
    (trial,) = problem.evaluate([trial.allocation], problem.fidelity(tokens), "ilp")
    return trial, toy_estimate(SPACE)


def test_exchanges_improve_step_by_step_within_reach():
    better, estimate = 0, toy_estimate(SPACE)
    for limit in ("3.3", "4.3"):
        problem = problem_of(limit)
        (before,) = problem.evaluate([nearest_uniform(problem)], Fidelity(256), "uniform")
        exchange = Exchange(reach=2, contenders=1, caution=0.0, share=1.0, tokens=256)
        for after in exchange.rounds(problem, before, estimate, estimate, 0, 10**6):
            pairs = zip(before.allocation.levels, after.allocation.levels, strict=True)
            assert 1 <= sum(a != b for a, b in pairs) <= 2
            assert after.loss < before.loss
            assert problem.fits(after.allocation)
            better, before = better + 1, after
    assert better >= 3


def test_exchanges_that_promise_nothing_are_not_scored():
    memory = Memory(SPACE, COSTS)
    problem = replace(problem_of("3.0"), evaluate=memory)
    incumbent, estimate = start_of(problem)
    wide = estimate._replace(stderr=tuple(dict.fromkeys(row, 9.9) for row in estimate.mean))
    scored = len(memory.trials)
    rounds = Exchange(caution=5.0, tokens=256).rounds(problem, incumbent, wide, wide, 0, 10**6)
    assert list(rounds) == []
    assert len(memory.trials) == scored


def test_exchanges_end_when_the_tokens_are_spent():
    problem = metered(problem_of("3.0"))
    incumbent, estimate = start_of(problem)
    assert list(Exchange(tokens=256).rounds(problem, incumbent, estimate, estimate, 0, 1)) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: Refinement(steps=-1),
        lambda: Refinement(share=1.5),
        lambda: Refinement(batch=0),
        lambda: Refinement(contenders=0),
        lambda: Exchange(reach=1),
        lambda: Exchange(caution=-1),
    ],
)
def test_settings_out_of_range(make):
    with pytest.raises(ConfigError, match="must be"):
        make()


# Metering


def test_a_meter_counts_windows_once_and_gradients_threefold():
    problem = metered(problem_of())
    one, other = (SPACE.uniform(level) for level in SPACE.levels[0][:2])
    problem.evaluate([one], Fidelity(32), "a")
    problem.evaluate([one, other], Fidelity(64), "a")
    assert problem.spent() == 64 + 64
    problem.evaluate([one], Fidelity(64, seed=3), "a")
    assert problem.spent() == 192, "other windows"
    problem.sensitivities(48)
    problem.sensitivities(48)
    problem.linearize(one, 32, 0)
    problem.linearize(one, 32, 32)
    problem.linearize(one, 32, 0)
    assert problem.spent() == 192 + GRADIENT * (48 + 32 + 32)


def test_meters_do_not_disturb_each_other():
    outer = metered(problem_of())
    outer.evaluate([SPACE.uniform(SPACE.levels[0][0])], Fidelity(32), "a")
    inner = metered(outer)
    inner.sensitivities(16)
    assert (outer.spent(), inner.spent()) == (32 + 48, 48)
    assert toy_sensitivities(SPACE) == inner.sensitivities(16).mean
