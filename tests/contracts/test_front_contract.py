"""What every registered front strategy must keep."""

from __future__ import annotations

import numpy as np
import pytest
from toys import ToyLoss, toy_problem, toy_space

from autocompress.core import Budget, CostTable
from autocompress.cost import parse_budget, size_tables
from autocompress.effort import front_plan
from autocompress.errors import ConfigError
from autocompress.strategies.fronts import FRONTS, find_front
from autocompress.study import Study

SPACE = toy_space(pins=(5,))
COSTS = size_tables(SPACE, 1000)
LATENCY = CostTable(
    "latency", "ms", 5.0, tuple({k: 3.0 - 0.1 * i for i, k in enumerate(r)} for r in SPACE.levels)
)
LIMITS = [parse_budget(f"{bits}bits", SPACE) for bits in (2.6, 3.5, 5.0)]
SPENDING = front_plan(1200, len(LIMITS), 16, 256)
BESIDE = {"alone": (), "beside": (Budget("latency", 5 + 2.97 * len(SPACE.layers), "x"),)}


@pytest.fixture(params=sorted(FRONTS))
def strategy(request):
    return find_front(request.param, SPENDING)


def search(strategy, budgets, folder, seed=0):
    costs = (*COSTS, LATENCY)
    with Study(folder, SPACE, costs, {}, ToyLoss(SPACE)) as study:
        problem = toy_problem(SPACE, budgets, costs, study.evaluate)
        found = list(strategy(problem, LIMITS, np.random.default_rng(seed)))
        return found, study.trials, study.fresh, problem


@pytest.mark.parametrize("budgets", BESIDE.values(), ids=BESIDE)
def test_every_limit_is_answered_within_it_and_within_the_space(strategy, budgets, tmp_path):
    found, trials, _, problem = search(strategy, budgets, tmp_path)
    assert {number for number, _ in found} == set(range(len(LIMITS)))
    for number, trial in found:
        assert COSTS[0].total(trial.allocation) <= LIMITS[number].limit
    for trial in trials:
        assert trial.allocation in SPACE and problem.fits(trial.allocation)
        assert COSTS[0].total(trial.allocation) <= LIMITS[-1].limit


def test_the_same_seed_finds_the_same_front_and_resume_is_replay(strategy, tmp_path):
    found, _, fresh, _ = search(strategy, (), tmp_path / "a")
    again, _, nothing, _ = search(strategy, (), tmp_path / "a")
    other, *_ = search(strategy, (), tmp_path / "b")
    assert fresh > 0 and nothing == 0
    assert found == again == other
    last = [trial.loss for _, trial in sorted(dict(found).items())]
    assert last == sorted(last, reverse=True) and last[0] > 2 * last[-1]


def test_an_unknown_strategy():
    with pytest.raises(ConfigError, match="Did you mean 'sweep'"):
        find_front("swep", SPENDING)
