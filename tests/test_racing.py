"""Races: who leaves, when, and that nobody leaves by chance."""

import math

import numpy as np
import pytest
from toys import toy_problem, toy_space

from autocompress.core import Allocation, Fidelity, Score, Trial
from autocompress.levels import parse_level
from autocompress.strategies.racing import race, ranked, surely_worse

SPACE = toy_space(1)
LEVELS = [parse_level(f"w{bits}g64") for bits in (2, 3, 4, 5, 6)]
UNIFORM = [SPACE.uniform(level) for level in LEVELS]


class Windows:
    """Losses of candidates on windows that differ much more than the candidates."""

    def __init__(self, means: dict[Allocation, float], noise: float, seed: int = 0) -> None:
        self.means, self.noise, self.seed = means, noise, seed
        self.seen: dict[Allocation, int] = dict.fromkeys(means, 0)

    def __call__(self, allocations, fidelity, origin):
        return [self.trial(allocation, fidelity, origin) for allocation in allocations]

    def trial(self, allocation, fidelity, origin):
        count = fidelity.tokens // 16
        self.seen[allocation] = max(self.seen[allocation], count)
        shared = np.random.default_rng(fidelity.seed).normal(0, 5, 1000)[:count]
        number = list(self.means).index(allocation)
        own = np.random.default_rng((self.seed, number, fidelity.seed)).normal(0, self.noise, 1000)
        losses = (10 + self.means[allocation] + shared + own[:count]).tolist()
        return Trial(0, allocation, fidelity, Score(tuple(losses), tuple(losses)), (), origin)


def problem_of(windows, tokens=1024):
    return toy_problem(SPACE, [], evaluate=windows, tokens=tokens)


def test_the_best_wins_and_the_bad_leave_early():
    windows = Windows(dict(zip(UNIFORM, (3.0, 0.0, 2.0, 0.3, 1.0), strict=True)), noise=0.2)
    first, *others = race(problem_of(windows), UNIFORM, 1024, "x")
    assert first.allocation == UNIFORM[1]
    assert first.fidelity == Fidelity(1024)
    assert len(others) == 0
    assert windows.seen[UNIFORM[1]] == 64
    assert windows.seen[UNIFORM[0]] == windows.seen[UNIFORM[2]] == 4


def test_equals_stay_to_the_end():
    windows = Windows(dict.fromkeys(UNIFORM[:3], 0.0), noise=0.0)
    trials = race(problem_of(windows), UNIFORM[:3], 1024, "x")
    assert len(trials) == 3
    assert {trial.fidelity for trial in trials} == {Fidelity(1024)}


@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_the_best_seldom_leaves(noise):
    kept = 0
    for seed in range(200):
        means = dict(zip(UNIFORM[:2], (0.0, 0.3), strict=True))
        trials = race(problem_of(Windows(means, noise, seed)), UNIFORM[:2], 1024, "x")
        kept += UNIFORM[0] in {trial.allocation for trial in trials}
    assert kept >= 180


def test_one_candidate_is_scored_on_everything():
    windows = Windows({UNIFORM[0]: 0.0}, noise=0.1)
    (only,) = race(problem_of(windows), [UNIFORM[0]] * 2, 500, "x", seed=3)
    assert only.fidelity == Fidelity(496, 3)


def test_infinite_losses_leave_and_do_not_end_the_race():
    lost, good = Score((math.inf,) * 4, (math.inf,) * 4), Score((1.0,) * 4, (1.0,) * 4)
    assert surely_worse(lost, good)
    assert not surely_worse(good, lost)
    assert not surely_worse(lost, lost)
    one = Score((1.0, 1.0), (1.0, 1.0))
    assert not surely_worse(Score((2.0, 2.0), (1.0, 1.0)), one), "two windows say nothing"


def trial_of(losses):
    return Trial(0, UNIFORM[0], Fidelity(16), Score(tuple(losses), tuple(losses)), (), "x")


WINDOW_LOSSES = np.random.default_rng(3).normal(10, 2, 16)


@pytest.mark.parametrize(
    ("gain", "order"),
    [
        (0.60, ["searched", "ilp", "uniform"]),  # 2.4 standard errors
        (0.40, ["ilp", "uniform", "searched"]),  # 1.6
        (-0.10, ["ilp", "uniform", "searched"]),
    ],
)
def test_simple_answers_stay_unless_they_are_surely_worse(gain, order):
    wobble = np.tile([1.0, -1.0], 8) * (15 / 16) ** 0.5  # its standard error is 0.25
    raced = {
        "uniform": trial_of(WINDOW_LOSSES + 1),
        "ilp": trial_of(WINDOW_LOSSES),
        "searched": trial_of(WINDOW_LOSSES - gain + wobble),
    }
    assert ranked(raced, {"uniform", "ilp"}) == order


def test_without_simple_answers_the_least_loss_leads():
    raced = {"a": trial_of(WINDOW_LOSSES), "b": trial_of(WINDOW_LOSSES - 0.01)}
    assert ranked(raced, ()) == ["b", "a"]
    assert ranked(raced, {"a", "b"}) == ["b", "a"]
