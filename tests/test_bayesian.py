import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from toys import SMOLLM2, Memory, toy_problem, toy_sensitivities, toy_space

from autocompress.core import Allocation, Layer, Score
from autocompress.cost import parse_budget, size_tables
from autocompress.errors import ConfigError
from autocompress.strategies.bayesian import Bayesian, distances
from autocompress.strategies.ilp import ILP
from autocompress.strategies.samplers import SAMPLERS
from autocompress.strategies.spdy import SPDY, describe, reweigh

SPACE = toy_space(pins=(5,))
BUDGETS = [parse_budget("3.5bits", SPACE)]
FEW = 12  # candidates; TPE and GP draw the first 10 at random


def run(strategy, problem, seed=0):
    return list(strategy(problem, np.random.default_rng(seed)))


@pytest.mark.parametrize("family", [SPDY, Bayesian])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_repeats_itself_within_budget_from_the_ilps_answer(family, sampler):
    problems = [toy_problem(SPACE, BUDGETS) for _ in range(2)]
    strategy = family(sampler=sampler, candidates=FEW)
    one, two = (run(strategy, problem, seed=3) for problem in problems)
    first, second = (problem.evaluate.trials for problem in problems)
    assert one == two and first == second and len(first) == FEW
    (ilp,) = run(ILP(), problems[0])
    assert first[0].allocation == ilp.allocation
    assert all(problems[0].fits(t.allocation) and t.allocation in SPACE for t in first)
    assert len({t.allocation for t in first}) > 2
    assert [t.loss for t in one] == sorted((t.loss for t in one), reverse=True)
    assert one[-1].loss == min(t.loss for t in first)


@pytest.mark.parametrize("family", [SPDY, Bayesian])
def test_seeds_differ(family):
    problems = [toy_problem(SPACE, BUDGETS) for _ in range(2)]
    for seed, problem in enumerate(problems):
        run(family(candidates=FEW), problem, seed)
    assert problems[0].evaluate.trials != problems[1].evaluate.trials


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_spdy_learns_which_type_matters(sampler):
    """Where down_proj hurts ten times more than predicted, the best weights find it out."""
    space = toy_space(8)
    budgets = [parse_budget("3.5bits", space)]
    predicted = toy_sensitivities(space)
    true = tuple(
        {k: v * (10 if layer.name.endswith("down_proj") else 1) for k, v in row.items()}
        for layer, row in zip(space.layers, predicted, strict=True)
    )

    def loss(allocation):
        return sum(row[level] for row, level in zip(true, allocation.levels, strict=True))

    class Known(Memory):
        def __call__(self, allocations, fidelity, origin):
            self._loss = lambda allocation, _: Score((loss(allocation),) * 16, (1.0,) * 16)
            return super().__call__(allocations, fidelity, origin)

    problem = toy_problem(space, budgets, evaluate=Known(space, size_tables(space, 1000)))
    trials = run(SPDY(sampler=sampler, candidates=60), problem)
    best = loss(run(ILP(), replace(problem, sensitivities=lambda _: _estimate(true)))[0].allocation)
    start = trials[0].loss
    assert start > 1.2 * best
    assert trials[-1].loss < best + 0.25 * (start - best)


def _estimate(mean):
    from autocompress.predictions import Estimate

    return Estimate(mean, mean)


def test_a_failed_evaluation_is_no_end():
    class Broken(Memory):
        def __call__(self, allocations, fidelity, origin):
            trials = super().__call__(allocations, fidelity, origin)
            return [
                replace(trial, score=Score((float("inf"),), (float("inf"),)))
                if trial.number % 2
                else trial
                for trial in trials
            ]

    problem = toy_problem(SPACE, BUDGETS, evaluate=Broken(SPACE, size_tables(SPACE, 1000)))
    assert np.isfinite(run(SPDY(candidates=FEW), problem)[-1].loss)


def test_types_and_depths_come_from_names():
    names = ("model.layers.0.mlp.up_proj", "model.layers.4.mlp.up_proj", "lm_head")
    rows = describe([Layer(name, (name,), ((2, 2),)) for name in names])
    assert rows[0] == {
        "type up_proj": 1,
        **{"depth linear": -1, "depth quadratic": 1, "depth cubic": -1},
    }
    assert rows[1] == {
        "type up_proj": 1,
        **{"depth linear": 1, "depth quadratic": 1, "depth cubic": 1},
    }
    assert rows[2] == {
        "type lm_head": 1,
        **{"depth linear": 0, "depth quadratic": -0.5, "depth cubic": 0},
    }


def test_one_type_at_one_depth_has_nothing_to_learn():
    assert describe([Layer("a.1.x", ("a.1.x",), ((2, 2),))]) == [{}]
    space = toy_space(1, shapes={"up_proj": (64, 64)})
    problem = toy_problem(space, [parse_budget("3.5bits", space)])
    assert {t.allocation for t in run(SPDY(candidates=3), problem)} == {
        run(ILP(), problem)[0].allocation
    }


def test_reweighed_sensitivities_are_multiples():
    prices = toy_sensitivities(SPACE)
    rows = describe(SPACE.layers)
    weighed = reweigh(prices, rows, {**dict.fromkeys(rows[0] | rows[1] | rows[2] | rows[3], 0.0)})
    assert weighed == prices
    values = dict.fromkeys({name for row in rows for name in row}, 0.0) | {
        "type up_proj": np.log(2)
    }
    weighed = reweigh(prices, rows, values)
    for layer, old, new in zip(SPACE.layers, prices, weighed, strict=True):
        factor = 2 if layer.name.endswith("up_proj") else 1
        assert new == pytest.approx({k: factor * v for k, v in old.items()})


def test_a_repaired_proposal_keeps_every_layer_it_can():
    dear = SPACE.uniform(SPACE.levels[0][-1])
    problem = toy_problem(SPACE, BUDGETS)
    (row, *_), *_ = [distances(toy_sensitivities(SPACE), dear)]
    assert row[dear.levels[0]] == 0 and all(v > 0 for k, v in row.items() if k != dear.levels[0])
    repaired = Bayesian()._solve(problem, distances(toy_sensitivities(SPACE), dear))
    assert problem.fits(repaired) and isinstance(repaired, Allocation)
    kept = [a == b for a, b in zip(repaired.levels, dear.levels, strict=True)]
    assert any(kept)


@pytest.mark.parametrize("family", [SPDY, Bayesian])
@pytest.mark.parametrize(
    ("setting", "value", "match"),
    [
        ("sampler", "tep", r"sampler must be one of tpe, gp, nsgaii, cmaes\. .*mean 'tpe'"),
        ("candidates", 0, "candidates must be at least 1"),
        ("tokens", 0, "tokens must be at least 1"),
        ("sensitivity_tokens", 0, "sensitivity_tokens must be at least 1"),
        ("gap", -1, "gap must be from 0 to 1"),
        ("seconds", -1, "seconds must be at least 0"),
    ],
)
def test_settings_have_ranges(family, setting, value, match):
    with pytest.raises(ConfigError, match=match):
        family(**{setting: value})


def test_reach_has_a_range():
    with pytest.raises(ConfigError, match="reach must be from"):
        SPDY(reach=0)


def test_a_sampler_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("autocompress.strategies.samplers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="Run: pip install cmaes"):
        SPDY(sampler="cmaes")
    SPDY(sampler="tpe")


def test_many_layers_are_warned_of():
    space = toy_space(30, shapes=SMOLLM2)
    problem = toy_problem(space, [parse_budget("3.5bits", space)])
    with pytest.warns(UserWarning, match="at most 64 layers .* Got 210"):
        next(iter(Bayesian(candidates=1)(problem, np.random.default_rng(0))))


def test_only_the_gaussian_process_loads_torch():
    code = """
import sys, warnings, numpy as np
from toys import toy_problem, toy_space
from autocompress.cost import parse_budget
from autocompress.strategies.spdy import SPDY
space = toy_space()
for sampler in ("tpe", "nsgaii", "cmaes", "gp"):
    problem = toy_problem(space, [parse_budget("3.5bits", space)])
    list(SPDY(sampler=sampler, candidates=12)(problem, np.random.default_rng(0)))
    print(sampler, "torch" in sys.modules)
"""
    path = [entry for entry in sys.path if entry]
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == [
        "tpe",
        "False",
        "nsgaii",
        "False",
        "cmaes",
        "False",
        "gp",
        "True",
    ]
