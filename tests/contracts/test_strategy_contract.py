"""What every registered strategy must keep; a new one is tested by being registered."""

import itertools

import numpy as np
import pytest
from toys import FEWER, ToyLoss, toy_problem, toy_space

from autocompress.core import Budget, CostTable
from autocompress.cost import parse_budget, size_tables
from autocompress.strategies import STRATEGIES, find_strategy
from autocompress.study import Study

SPACE = toy_space(pins=(5,))
SLOW = {"w2g64": 3.1, "w3g64": 3.7, "w4g64": 1.3, "w5g64": 2.9, "w6g64": 2.3}  # fewer, not faster
LATENCY = CostTable(
    "latency", "ms", 5.0, tuple({level: SLOW[str(level)] for level in row} for row in SPACE.levels)
)
COSTS = (*size_tables(SPACE, 1000), LATENCY)
BITS = parse_budget("3.5bits", SPACE)
BUDGETS = {
    "bits": [BITS],
    "bytes": [parse_budget("50kB", SPACE)],
    "tight": [Budget("bits", COSTS[0].total(SPACE.uniform(SPACE.levels[0][1])), "x")],
    "two": [BITS, Budget("latency", 5.0 + 2.6 * len(SPACE.layers), "36.2ms")],
}


@pytest.fixture(params=sorted(STRATEGIES))
def strategy(request):
    return find_strategy(request.param)(**FEWER.get(request.param, {}))


@pytest.fixture(params=sorted(BUDGETS))
def budgets(request):
    return BUDGETS[request.param]


@pytest.fixture
def search(strategy, budgets, tmp_path):
    """Run the strategy on a study in the folder `name`: incumbents, all trials, fresh ones."""

    def run(name, seed=0, stop=None):
        with Study(tmp_path / name, SPACE, COSTS, {}, ToyLoss(SPACE)) as study:
            problem = toy_problem(SPACE, budgets, COSTS, study.evaluate)
            incumbents = []
            for trial in strategy(problem, np.random.default_rng(seed)):
                incumbents.append(trial)
                if stop is not None and len(incumbents) == stop:
                    break
            return incumbents, study.trials, study.fresh

    return run


def test_never_leaves_the_space_and_never_exceeds_a_budget(search, budgets):
    _, trials, _ = search("run")
    problem = toy_problem(SPACE, budgets, COSTS)
    assert trials
    for trial in trials:
        assert trial.allocation in SPACE
        assert problem.fits(trial.allocation)
        assert trial.costs == tuple(table.total(trial.allocation) for table in COSTS)


def test_same_seed_same_trials(search):
    assert search("one", seed=7) == search("two", seed=7)


def test_resume_is_replay(search):
    whole, trials, _ = search("whole")
    search("stopped", stop=len(whole) // 2 + 1)
    resumed, table, _ = search("stopped")
    assert (resumed, table) == (whole, trials)
    again, table, fresh = search("whole")
    assert (again, table, fresh) == (whole, trials, 0)


def test_incumbents_never_get_worse_at_equal_fidelity(search):
    incumbents, trials, _ = search("run")
    for before, after in itertools.pairwise(incumbents):
        known = {(t.allocation, t.fidelity): t.loss for t in trials}
        former = known.get((before.allocation, after.fidelity))
        assert former is not None, "the former incumbent must be measured where it is replaced"
        assert after.loss <= former
    by_fidelity = {}
    for trial in incumbents:
        assert trial.loss <= by_fidelity.get(trial.fidelity, trial.loss)
        by_fidelity[trial.fidelity] = trial.loss
