import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import (
    Memory,
    random_table,
    spaces,
    toy_problem,
    toy_space,
)

from autocompress.config import StudyConfig
from autocompress.core import Budget, CostTable, Fidelity, Score
from autocompress.cost import parse_budget, size_tables
from autocompress.effort import plan
from autocompress.errors import BudgetError, ConfigError
from autocompress.knapsack import cheapest
from autocompress.levels import parse_level
from autocompress.strategies import STRATEGIES, configured, find_strategy
from autocompress.strategies.auto import Auto
from autocompress.strategies.evolution import Evolution
from autocompress.strategies.ilp import ILP
from autocompress.strategies.mutation import LevelSwitch
from autocompress.strategies.random_search import RandomSearch
from autocompress.strategies.uniform import Uniform, nearest_uniform, uniforms_that_fit

SPACE = toy_space()
COSTS = size_tables(SPACE, 1000)
SHORT = Evolution(generations=4, offspring=4, stages=((2, 32), (1, 64)))


def bits(text, space=SPACE):
    return parse_budget(f"{text}bits", space)


def run(strategy, problem, seed=0):
    return list(strategy(problem, np.random.default_rng(seed)))


# Registry and settings


def test_names_find_classes():
    assert find_strategy("evolution") is Evolution
    for name in STRATEGIES:
        find_strategy(name)()


def test_a_strategy_that_spends_no_tokens_refuses_them():
    spending = plan(30_000, 512, 24_576)
    assert configured(StudyConfig(spend=30_000), spending) == Auto(spending)
    assert configured(StudyConfig(strategy="ilp"), spending).sensitivity_tokens == 3584
    with pytest.raises(ConfigError, match=r"--tokens must go with .* such as auto\. Got 'ilp'"):
        configured(StudyConfig(strategy="ilp", spend=30_000), spending)


def test_an_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(
        ConfigError,
        match=r"auto, bayesian, ends, evolution, .*, uniform\. .*mean 'evolution'",
    ):
        find_strategy("evolutoin")


def test_a_strategy_whose_package_is_missing(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "far", ("no_such_package_of_ours", "Far"))
    with pytest.raises(ConfigError, match="pip install no_such_package_of_ours"):
        find_strategy("far")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Uniform(tokens=0),
        lambda: ILP(sensitivity_tokens=0),
        lambda: ILP(tokens=-1),
        lambda: Evolution(generations=-1),
        lambda: Evolution(offspring=0),
        lambda: Evolution(generations=None),
        lambda: Evolution(stages=()),
        lambda: Evolution(stages=((2, 64),)),
        lambda: Evolution(stages=((2, 64), (1, 32))),
        lambda: Evolution(stages=((2, 32), (4, 32), (1, 64))),
        lambda: Evolution(stages=((1, 0),)),
        lambda: Evolution(start="ipl"),
    ],
)
def test_settings_out_of_range(make):
    with pytest.raises(ConfigError, match="must be"):
        make()


# Uniform


def test_the_nearest_uniform_uses_most_of_the_budget():
    assert nearest_uniform(toy_problem(SPACE, [bits(4)])) == SPACE.uniform(parse_level("w3g64"))
    (trial,) = run(Uniform(tokens=64), toy_problem(SPACE, [bits(4)]))
    assert (trial.origin, trial.fidelity) == ("uniform w3g64", Fidelity(64))


def test_uniforms_that_fit_are_ranked_by_cost_then_by_other_costs():
    levels = tuple(map(parse_level, ("w3g64", "w4g64", "w2g64")))
    time_ = CostTable(
        "time", "ms", 0, tuple({it: str(it) != "w2g64" for it in levels} for _ in "ab")
    )
    flat = CostTable("flat", "ms", 0, tuple(dict.fromkeys(levels, 1) for _ in "ab"))
    space = replace(SPACE, layers=SPACE.layers[:2], levels=(levels, levels))
    problem = toy_problem(space, [Budget("flat", 9, "9")], (flat, time_, size_tables(space, 0)[0]))
    order = ["w2g64", "w3g64", "w4g64"]
    assert [str(a.levels[0]) for a in uniforms_that_fit(problem)] == order


def test_the_cheapest_mix_stands_in_where_no_uniform_fits():
    wide, narrow = map(parse_level, ("w6g64", "w2g64"))
    levels = tuple((wide, parse_level("w5g64")) if i else (narrow, wide) for i in range(12))
    space = replace(SPACE, levels=levels)
    problem = toy_problem(space, [bits(5.3, space)])
    assert nearest_uniform(problem) == cheapest(space, problem.costs[0])
    assert run(Uniform(), problem)[0].origin == "uniform"
    with pytest.raises(BudgetError, match="at least 5"):
        nearest_uniform(toy_problem(space, [bits(3, space)]))


# Mutation


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(0, 2**32), st.floats(0, 1))
def test_mutations_stay_legal_and_within_every_budget(space, seed, share):
    rng = np.random.default_rng(seed)
    costs = (*size_tables(space, 0), random_table(space, rng, "time", 1))
    parent = cheapest(space, costs[0])
    budgets = [
        Budget(t.name, t.total(parent) + share * max(1.0, 0.3 * t.total(parent)), "x")
        for t in (costs[0], costs[2])
    ]
    problem = toy_problem(space, budgets, costs)
    mutate = LevelSwitch.of(problem)
    for _ in range(20):
        child = mutate(parent, rng)
        if child is not None:
            assert child in space
            assert problem.fits(child)
            parent = child


def test_levels_rank_by_cost_and_not_by_their_place():
    shuffled = [parse_level(key) for key in ("w6g64", "w2g64", "w5g64")]
    space = replace(SPACE, levels=tuple(tuple(shuffled) for _ in SPACE.layers))
    mutate = LevelSwitch.of(toy_problem(space, [bits(4, space)], size_tables(space, 0)))
    six, two, five = shuffled
    assert mutate.up[0] == {two: five, five: six}
    assert mutate.limits[0][2][0] == {six: five, five: two}


def test_lowering_gives_up_where_two_budgets_want_opposite_levels():
    """What lowers the bits raises the time, of every layer; taking turns would never end."""
    space = toy_space(1, keys=("w2g64", "w4g64"))
    table, size = size_tables(space, 0)
    slow = tuple({level: -float(cost) for level, cost in row.items()} for row in table.entries)
    time = replace(table, name="latency", unit="ms", base=0.0, entries=slow)
    low, high = (table.total(space.uniform(level)) for level in space.levels[0])
    middle = (low + high) / 2 - 1
    budgets = [Budget("bits", middle, "x"), Budget("latency", -middle - 2, "x")]
    switch = LevelSwitch.of(toy_problem(space, budgets, (table, size, time)))
    above = space.uniform(space.levels[0][1])
    assert switch.lowered(above, np.random.default_rng(0)) is None


def test_a_raise_uses_slack_and_otherwise_pays_by_lowering():
    low = SPACE.uniform(parse_level("w2g64"))
    table = COSTS[0]
    roomy = LevelSwitch.of(toy_problem(SPACE, [bits(6)]))
    tight = LevelSwitch.of(
        toy_problem(SPACE, [Budget("bits", table.total(SPACE.uniform(parse_level("w4g64"))), "x")])
    )
    rng = np.random.default_rng(0)
    for _ in range(50):
        child = roomy(low, rng)
        assert all(not a.bits > b.bits for a, b in zip(low.levels, child.levels, strict=True))
        parent = SPACE.uniform(parse_level("w4g64"))
        child = tight(parent, rng)
        moved = [b.bits - a.bits for a, b in zip(parent.levels, child.levels, strict=True)]
        assert max(moved) > 0 > min(moved)


# Evolution


def test_evolution_improves_on_its_start():
    problem = toy_problem(SPACE, [bits(3.5)])
    first, *_, last = run(Evolution("uniform", generations=30), problem)
    # All windows: the comparison must not depend on which windows a generation saw.
    before, after = problem.evaluate([first.allocation, last.allocation], Fidelity(256), "check")
    assert after.loss < 0.8 * before.loss


def test_early_stages_draw_new_windows_and_the_last_never_does():
    memory = Memory(SPACE, COSTS)
    problem = toy_problem(SPACE, [bits(3.5)], COSTS, memory)
    incumbents = run(replace(SHORT, start=ILP(tokens=64)), problem)
    last = {t.allocation: t for t in memory.trials if t.fidelity == Fidelity(64)}
    for generation, parent in enumerate(incumbents[:-1], start=1):
        first = [t for t in memory.trials if t.fidelity == Fidelity(32, generation)]
        assert len(first) == len({t.allocation for t in first}) == 4
        best = sorted(first, key=lambda t: t.loss)[:2]
        finalists = [last[t.allocation] for t in best]
        assert incumbents[generation] == min([parent, *finalists], key=lambda t: t.loss)
    assert set(incumbents) <= set(last.values())


def test_random_search_stays_in_the_budget_and_keeps_the_best():
    problem = toy_problem(SPACE, [bits(3.5)])
    incumbents = run(RandomSearch(candidates=20, tokens=64), problem)
    trials = problem.evaluate.trials
    assert len(incumbents) == len(trials) == 21
    assert len({trial.allocation for trial in trials}) > 15
    assert all(problem.fits(trial.allocation) for trial in trials)
    assert incumbents[-1].loss == min(trial.loss for trial in trials)


def test_evolution_ends_where_nothing_can_move():
    top = SPACE.uniform(parse_level("w6g64"))
    problem = toy_problem(SPACE, [bits(16)])
    assert {t.allocation for t in run(SHORT, problem)} == {top}
    pinned = toy_space(pins=range(12))
    assert len(run(SHORT, toy_problem(pinned, [bits(3, pinned)]))) == 1


def test_evolution_stops_before_it_exceeds_its_tokens():
    memory = Memory(SPACE, COSTS)
    run(replace(SHORT, generations=None, tokens=2000, start=Uniform(64)),
        toy_problem(SPACE, [bits(3.5)], COSTS, memory))  # fmt: skip
    spent = sum(trial.fidelity.tokens for trial in memory.trials)
    assert 2000 - 320 < spent <= 2000


LOST = Score((math.inf,), (math.inf,))


def test_patience_counts_generations_that_keep_the_parent():
    memory = Memory(SPACE, COSTS)

    def flat(allocations, fidelity, origin):
        return [replace(t, score=LOST) for t in memory(allocations, fidelity, origin)]

    incumbents = run(
        replace(SHORT, generations=None, patience=3),
        toy_problem(SPACE, [bits(3.5)], COSTS, flat),
    )
    assert len(incumbents) == 1 + 3
    assert len({trial.allocation for trial in incumbents}) == 1


def test_the_whole_split_is_one_fidelity():
    problem = toy_problem(SPACE, [bits(3.5)])
    whole = replace(SHORT, stages=((2, 100), (1, 10**6)))
    incumbents = run(replace(whole, start=Uniform(10**6)), problem)
    assert {trial.fidelity for trial in incumbents} == {Fidelity(256)}
    losses = [trial.loss for trial in incumbents]
    assert losses == sorted(losses, reverse=True)
    assert {t.fidelity.tokens for t in problem.evaluate.trials} == {96, 256}


def test_no_generations_is_the_start_and_few_offspring_skip_a_stage():
    problem = toy_problem(SPACE, [bits(3.5)])
    assert [trial.origin for trial in run(Evolution(generations=0), problem)] == ["ilp"]
    assert len(run(Evolution(generations=2, offspring=1), problem)) == 3
