import ctypes
import itertools
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import SMOLLM2, random_table, spaces, toy_problem, toy_sensitivities, toy_space

from autocompress import dual, highs
from autocompress.beam import solve_beam
from autocompress.core import Allocation, Budget, CostTable
from autocompress.cost import parse_budget, size_tables
from autocompress.dual import lower_bound
from autocompress.errors import BudgetError, ConfigError
from autocompress.highs import SolverError, solve_highs
from autocompress.knapsack import Region, diverse_solutions, solve_knapsack
from autocompress.levels import parse_level
from autocompress.strategies.ilp import ILP, solve

SPACE = toy_space()
COSTS = size_tables(SPACE, 1000)
LARGE_KEYS = tuple(f"w{b}g{g}" for g in range(16, 72, 8) for b in (2, 3, 4, 5, 6, 8))[:40]


def bits(text, space=SPACE):
    return parse_budget(f"{text}bits", space)


def enumerate_best(space, costs, budgets, prices):
    """Least total price within the budgets by trying everything; None when nothing fits."""
    tables = {table.name: table for table in costs}
    best = None
    for levels in itertools.product(*space.levels):
        allocation = Allocation(levels)
        if all(tables[b.cost].total(allocation) <= b.limit for b in budgets):
            price = sum(row[level] for row, level in zip(prices, levels, strict=True))
            best = price if best is None else min(best, price)
    return best


@settings(max_examples=60, deadline=None)
@given(
    spaces(),
    st.integers(0, 2**32),
    st.integers(1, 2),
    st.sampled_from([1, 9, 10**9, 10**12]),
    st.floats(0, 1),
)
def test_ilp_is_enumeration(space, seed, count, high, slack):
    rng = np.random.default_rng(seed)
    costs = tuple(random_table(space, rng, f"cost{i}", high) for i in range(count))
    prices = tuple({level: float(rng.random()) for level in allowed} for allowed in space.levels)
    limits = []
    for table in costs:
        totals = [table.total(Allocation(levels)) for levels in itertools.product(*space.levels)]
        limits.append(sorted(totals)[int(slack * (len(totals) - 1))])  # met exactly by some
    budgets = [Budget(t.name, limit, "x") for t, limit in zip(costs, limits, strict=True)]
    expected = enumerate_best(space, costs, budgets, prices)
    if expected is None:
        with pytest.raises(BudgetError, match="beside"):
            solve(space, costs, budgets, prices)
        return
    found = solve(space, costs, budgets, prices, gap=1e-9)
    assert found in space
    assert toy_problem(space, budgets, costs).fits(found)
    total = sum(row[level] for row, level in zip(prices, found.levels, strict=True))
    assert total == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert solve(space, costs, budgets, prices, gap=1e-9) == found


def test_ilp_does_not_let_one_bit_over_where_the_solver_would():
    space = replace(SPACE, layers=SPACE.layers[:3], levels=SPACE.levels[:3])
    levels = space.levels[0][:3]
    # One part in 10**12 is far below HiGHS's tolerance; the best choice is over by that part.
    entries = tuple(dict(zip(levels, costs, strict=True)) for costs in [
        (0, 10**12 + 1, 10**12), (0, 10**12, 10**11), (0, 7, 3)
    ])  # fmt: skip
    space = replace(space, levels=(levels,) * 3)
    prices = tuple(dict(zip(levels, costs, strict=True)) for costs in [
        (9.0, 1.0, 2.0), (9.0, 1.0, 3.0), (1.0, 1.0, 1.0)
    ])  # fmt: skip
    costs = (CostTable("size", "bits", 0, entries),)
    budgets = [Budget("size", 2 * 10**12, "x")]
    found = solve(space, costs, budgets, prices)
    assert found.levels == (levels[2], levels[1], levels[0])


def test_ilp_survives_sensitivities_that_are_not_finite():
    prices = [dict(row) for row in toy_sensitivities(SPACE)]
    for row, bad in zip(prices, itertools.cycle([math.inf, math.nan, 0.0]), strict=False):
        row[SPACE.levels[0][0]] = bad
    found = solve(SPACE, COSTS, [bits(4)], tuple(prices))
    low = [i for i, level in enumerate(found.levels) if str(level) == "w2g64"]
    assert all(i % 3 == 2 for i in low)


def test_ilp_of_a_real_models_size_is_silent_and_fills_the_budget(capfd):
    space = toy_space(30, shapes=SMOLLM2)
    costs = size_tables(space, 0)
    found = solve(space, costs, [bits(3.5, space)], toy_sensitivities(space))
    assert 0.999 < costs[0].total(found) / bits(3.5, space).limit <= 1
    ctypes.CDLL(None).fflush(None)  # HiGHS 1.12 prints a line of its own for this very problem
    assert capfd.readouterr().out == ""


def test_ilp_without_a_budget_takes_the_least_loss():
    found = solve(SPACE, COSTS, [], toy_sensitivities(SPACE))
    assert found == SPACE.uniform(parse_level("w6g64"))


# --- regions ---------------------------------------------------------------------------------


def apart(one, other):
    return sum(a != b for a, b in zip(one.levels, other.levels, strict=True))


@settings(max_examples=40, deadline=None)
@given(spaces(), st.integers(0, 2**32), st.integers(0, 3), st.integers(0, 3))
def test_regions_are_enumeration(space, seed, least, more):
    rng = np.random.default_rng(seed)
    every = [Allocation(levels) for levels in itertools.product(*space.levels)]
    prices = tuple({level: float(rng.random()) for level in allowed} for allowed in space.levels)
    center = every[rng.integers(len(every))]
    table = random_table(space, rng, "cost", 9)
    limit = sorted(map(table.total, every))[len(every) // 2]

    def price(allocation):
        return sum(row[level] for row, level in zip(prices, allocation.levels, strict=True))

    legal = [
        it
        for it in every
        if table.total(it) <= limit and least <= apart(it, center) <= least + more
    ]
    found = solve_knapsack(space, [(table, limit)], prices, [Region(center, least, least + more)])
    if not legal:
        assert found is None
    else:
        assert found in legal and price(found) == pytest.approx(min(map(price, legal)))


def test_diverse_solutions_differ_and_get_worse():
    prices = toy_sensitivities(SPACE)
    table = COSTS[0]
    limit = bits("4").limit
    found = diverse_solutions(SPACE, [(table, limit)], prices, count=4, distance=2)
    assert len(found) == 4 and found[0] == solve(SPACE, COSTS, [bits("4")], prices)
    assert all(apart(a, b) >= 2 for a, b in itertools.combinations(found, 2))
    totals = [sum(p[lv] for p, lv in zip(prices, it.levels, strict=True)) for it in found]
    assert totals == sorted(totals)
    assert all(table.total(it) <= limit for it in found)


def test_fewer_diverse_solutions_than_wanted():
    space = replace(SPACE, layers=SPACE.layers[:1], levels=SPACE.levels[:1])
    prices = toy_sensitivities(space)
    found = diverse_solutions(space, [], prices, count=99, distance=1)
    assert len(found) == len(space.levels[0]) == len(set(found))


# --- without an answer of the solver ---------------------------------------------------------


def refuse(*args):
    raise SolverError("HiGHS must solve or refuse the knapsack. Got: time limit.")


def total(prices, allocation):
    return sum(row[level] for row, level in zip(prices, allocation.levels, strict=True))


@settings(max_examples=40, deadline=None)
@given(spaces(), st.integers(0, 2**32), st.integers(1, 2), st.floats(0, 1), st.integers(0, 3))
def test_the_beam_is_enumeration_where_it_keeps_every_state(space, seed, count, slack, most):
    rng = np.random.default_rng(seed)
    every = [Allocation(levels) for levels in itertools.product(*space.levels)]
    prices = tuple({level: float(rng.random()) for level in allowed} for allowed in space.levels)
    tables = [random_table(space, rng, f"cost{i}", 9) for i in range(count)]
    limits = [(t, sorted(map(t.total, every))[int(slack * (len(every) - 1))]) for t in tables]
    region = Region(every[rng.integers(len(every))], 1, 1 + most)
    legal = [
        it
        for it in every
        if all(table.total(it) <= limit for table, limit in limits)
        and 1 <= apart(it, region.center) <= 1 + most
    ]
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="time limit"):
        patch.setattr("autocompress.highs.solve_highs", refuse)
        found = solve_knapsack(space, limits, prices, [region])
    if not legal:
        assert found is None
    else:
        assert found in legal
        best = min(total(prices, it) for it in legal)
        assert total(prices, found) == pytest.approx(best)


@pytest.mark.parametrize("second", [False, True])
def test_the_beam_is_near_the_optimum_of_a_real_problem(second, monkeypatch):
    space = toy_space(30, shapes=SMOLLM2)
    prices = toy_sensitivities(space)
    limits = [(size_tables(space, 0)[0], bits("3.5", space).limit)]
    if second:
        table = random_table(space, np.random.default_rng(0), "ms", 10**6)
        middle = np.mean([table.total(space.uniform(level)) for level in space.uniform_levels()])
        limits.append((table, 0.9 * middle))
    best = total(prices, solve_knapsack(space, limits, prices))
    monkeypatch.setattr("autocompress.highs.solve_highs", refuse)
    with pytest.warns(UserWarning, match="beam"):
        found = solve_knapsack(space, limits, prices)
    assert all(table.total(found) <= limit for table, limit in limits)
    assert best <= total(prices, found) * (1 + 1e-9) and total(prices, found) <= 1.01 * best


def test_the_beam_does_without_scipy(monkeypatch):
    space = toy_space(30, shapes=SMOLLM2)
    prices, (table, _) = toy_sensitivities(space), size_tables(space, 0)
    limits = [(table, bits("3.5", space).limit)]
    best = total(prices, solve_knapsack(space, limits, prices))
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.warns(UserWarning, match="HiGHS must come with scipy"):
        found = solve_knapsack(space, limits, prices)
    assert table.total(found) <= limits[0][1]
    assert total(prices, found) <= 1.01 * best


def test_a_beam_that_finds_nothing_proves_nothing(monkeypatch):
    monkeypatch.setattr("autocompress.highs.solve_highs", refuse)
    monkeypatch.setattr("autocompress.beam.solve_beam", lambda *_: (None, False))
    with pytest.raises(BudgetError, match="does not mean that there is none"):
        solve(SPACE, COSTS, [bits(4)], toy_sensitivities(SPACE))


def test_a_narrow_beam_says_what_it_left_out():
    prices = np.tile([0.0, 1.0, 2.0], 6) + np.linspace(0, 0.5, 18)
    owner, costs = np.repeat(np.arange(6), 3), np.tile([3.0, 1.0, 0.0], 6)
    whole, every = solve_beam(prices, owner, [(costs, 9.0)])
    few, left_out = solve_beam(prices, owner, [(costs, 9.0)], width=2)
    assert every and not left_out
    assert costs[whole].sum() <= 9 and costs[few].sum() <= 9
    assert prices[whole].sum() <= prices[few].sum()
    assert solve_beam(prices, owner, [(costs, -1.0)]) == (None, True)


# --- HiGHS on a core -------------------------------------------------------------------------


def raw_problem(space, seed, count, slack):
    """Prices, owners and limits as arrays, and the total price and costs of every solution."""
    rng = np.random.default_rng(seed)
    sizes = [len(allowed) for allowed in space.levels]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    prices, costs = rng.random(len(owner)), rng.random((count, len(owner))).round(1)
    starts = np.cumsum([0, *sizes[:-1]])
    every = [np.array(it) + starts for it in itertools.product(*map(range, sizes))]
    rooms = np.array([np.quantile([row[it].sum() for it in every], slack) for row in costs]) + 1e-6
    legal = [it for it in every if (costs[:, it].sum(axis=1) <= rooms).all()]
    return prices, owner, list(zip(costs, rooms, strict=True)), legal


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(0, 2**32), st.integers(0, 3), st.floats(0, 1))
def test_the_bound_is_below_every_solution_with_a_pick(space, seed, count, slack):
    prices, owner, rows, legal = raw_problem(space, seed, count, slack)
    least, excess, worth = lower_bound(prices, owner, rows)
    assert (excess >= 0).all() and (worth >= 0).all()
    for it in legal:
        assert prices[it].sum() >= least + excess[it].max() - 1e-9
    if not rows:
        assert least == pytest.approx(min(prices[it].sum() for it in legal))


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(0, 2**32), st.integers(1, 3), st.floats(0, 1))
def test_a_core_of_one_pick_grows_to_the_best_answer(space, seed, count, slack):
    prices, owner, rows, legal = raw_problem(space, seed, count, slack)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autocompress.highs.CORE", 1)
        found = solve_highs(prices, owner, rows, 1e-9, math.inf)
    if not legal:
        assert found is None
    else:
        assert list(found) in [list(it) for it in legal]
        best = min(prices[it].sum() for it in legal)
        assert prices[found].sum() == pytest.approx(best, abs=1e-5)


def test_a_core_that_cannot_prove_its_answer_grows(monkeypatch):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        owner, prices = np.repeat(np.arange(6), 12), rng.random(72)
        rows = [(rng.random(72), 1.5), (rng.random(72), 1.5)]
        answers = []
        for core in (1, 1000):
            monkeypatch.setattr("autocompress.highs.CORE", core)
            answers.append(solve_highs(prices, owner, rows, 1e-9, math.inf))
        small, whole = (prices[it].sum() for it in answers)
        assert small == pytest.approx(whole, abs=1e-5)


def large_problem(layers=1000, keys=LARGE_KEYS):
    """Layers with noisy, about convex prices, whole bits and milliseconds that do not follow."""
    rng = np.random.default_rng(0)
    space = toy_space(-(-layers // 7), keys, shapes=SMOLLM2)
    space = replace(space, layers=space.layers[:layers], levels=space.levels[:layers])
    prices = tuple(
        {level: price * rng.lognormal(0, 0.2) for level, price in row.items()}
        for row in toy_sensitivities(space)
    )
    (table, _), ms = size_tables(space, 0), random_table(space, rng, "ms", 1)
    limits = []
    for it in (table, ms):
        totals = [it.total(space.uniform(level)) for level in space.uniform_levels()]
        limits.append((it, math.floor(np.quantile(totals, 0.3))))
    return space, limits, prices


def test_a_thousand_layers_with_forty_levels_and_two_limits():
    space, limits, prices = large_problem()
    assert len(space.layers) == 1000 and len(space.levels[0]) == 40
    found = solve_knapsack(space, limits, prices, gap=1e-3)
    assert all(table.total(found) <= limit for table, limit in limits)
    exact = solve_knapsack(space, limits, prices, gap=1e-5)
    assert total(prices, found) <= (1 + 1e-3) * total(prices, exact)


def test_an_answer_that_time_leaves_unproven_says_how_good_it_is(monkeypatch):
    answer = highs._milp

    def late(*args):
        found = answer(*args)
        return found._replace(price=1.25 * found.price, least=0.0, late=True)

    monkeypatch.setattr("autocompress.highs._milp", late)
    with pytest.warns(UserWarning, match=r"within 7 seconds.* at most 2\d\.\d\d% above"):
        found = solve(SPACE, COSTS, [bits("3.5")], toy_sensitivities(SPACE), seconds=7.0)
    assert COSTS[0].total(found) <= bits("3.5").limit


def test_settings_of_the_solver_have_ranges():
    with pytest.raises(ConfigError, match="gap must be from 0 to 1"):
        ILP(gap=2)
    with pytest.raises(ConfigError, match="seconds must be at least 0"):
        ILP(seconds=-1)


def test_the_ilp_hands_gap_and_seconds_to_the_solver(monkeypatch):
    seen = []
    solver = highs.solve_highs

    def spy(prices, owner, rows, gap, seconds):
        seen.append((gap, seconds))
        return solver(prices, owner, rows, gap, seconds)

    monkeypatch.setattr("autocompress.highs.solve_highs", spy)
    problem = toy_problem(SPACE, [bits("3.5")])
    list(ILP(gap=0.25, seconds=33)(problem, np.random.default_rng(0)))
    assert seen == [(0.25, 33)]


def test_time_runs_out(monkeypatch):
    space = toy_space(30, shapes=SMOLLM2)
    limits = [(size_tables(space, 0)[0], bits("3.5", space).limit)]
    with pytest.warns(UserWarning, match="HiGHS must solve or refuse"):
        found = solve_knapsack(space, limits, toy_sensitivities(space), seconds=0.0)
    assert found is not None and limits[0][0].total(found) <= limits[0][1]


def test_a_bound_stands_where_the_planes_have_no_top(monkeypatch):
    """As for one layer of 1 x 1 weights, whose limits are all used: HiGHS may find no optimum."""
    prices, owner = np.array([3.0, 1.0, 2.0]), np.array([0, 0, 1])
    rows = [(np.array([0.0, 1.0, 1.0]), 1.0)]
    whole = lower_bound(prices, owner, rows)
    monkeypatch.setattr(dual, "_top", lambda planes, most: None)
    assert lower_bound(prices, owner, rows).least <= whole.least <= 5.0
    assert solve_highs(prices, owner, rows, 1e-9, 60.0).tolist() == [0, 2]
