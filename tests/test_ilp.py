import ctypes
import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import SMOLLM2, random_table, spaces, toy_problem, toy_sensitivities, toy_space

from autocompress.core import Allocation, Budget, CostTable
from autocompress.cost import parse_budget, size_tables
from autocompress.errors import BudgetError
from autocompress.knapsack import Region, SolverError, diverse_solutions, solve_knapsack
from autocompress.levels import parse_level
from autocompress.strategies.ilp import solve

SPACE = toy_space()
COSTS = size_tables(SPACE, 1000)


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
    found = solve(space, costs, budgets, prices)
    assert found in space
    assert toy_problem(space, budgets, costs).fits(found)
    total = sum(row[level] for row, level in zip(prices, found.levels, strict=True))
    assert total == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert solve(space, costs, budgets, prices) == found


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


def test_ilp_of_a_real_models_size_is_quick_and_silent_and_fills_the_budget(capfd):
    space = toy_space(30, shapes=SMOLLM2)
    costs = size_tables(space, 0)
    start = time.perf_counter()
    found = solve(space, costs, [bits(3.5, space)], toy_sensitivities(space))
    assert time.perf_counter() - start < 10
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
        patch.setattr("autocompress.knapsack._solve_exactly", refuse)
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
    monkeypatch.setattr("autocompress.knapsack._solve_exactly", refuse)
    with pytest.warns(UserWarning, match="beam"):
        found = solve_knapsack(space, limits, prices)
    assert all(table.total(found) <= limit for table, limit in limits)
    assert best <= total(prices, found) * (1 + 1e-9) and total(prices, found) <= 1.01 * best


def test_time_runs_out(monkeypatch):
    space = toy_space(30, shapes=SMOLLM2)
    limits = [(size_tables(space, 0)[0], bits("3.5", space).limit)]
    with pytest.warns(UserWarning, match="HiGHS must solve or refuse"):
        found = solve_knapsack(space, limits, toy_sensitivities(space), seconds=0.0)
    assert found is not None and limits[0][0].total(found) <= limits[0][1]
