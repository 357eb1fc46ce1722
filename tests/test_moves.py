"""Moves and crosses: within every budget, drawn by what they should gain, nothing impossible."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import random_table, spaces, toy_problem, toy_sensitivities, toy_space

from autocompress.core import Budget
from autocompress.cost import parse_budget, size_tables
from autocompress.knapsack import cheapest
from autocompress.strategies.grid import Grid
from autocompress.strategies.ilp import solve
from autocompress.strategies.moves import Moves
from autocompress.strategies.offspring import cross, diverse_elites

SPACE = toy_space()
PROBLEM = toy_problem(SPACE, [parse_budget("3.5bits", SPACE)])
GRID = Grid.of(PROBLEM)
PRICES = GRID.array(toy_sensitivities(SPACE))
BEST = GRID.encode(
    [solve(SPACE, PROBLEM.costs, PROBLEM.budgets, toy_sensitivities(SPACE))]
)[0]  # fmt: skip


def total(picks):
    return PRICES[np.arange(len(picks)), picks].sum()


def drawn(moves, parent, count, seed=0):
    rng = np.random.default_rng(seed)
    return [child for _ in range(count) if (child := moves(parent, rng)) is not None]


@settings(max_examples=40, deadline=None)
@given(spaces(), st.integers(0, 2**32), st.floats(0, 1))
def test_moves_and_crosses_stay_legal_and_within_every_budget(space, seed, share):
    rng = np.random.default_rng(seed)
    costs = (*size_tables(space, 0), random_table(space, rng, "time", 100))
    parent = cheapest(space, costs[0])
    budgets = [
        Budget(t.name, t.total(parent) + int(share * max(1.0, 0.3 * t.total(parent))), "x")
        for t in (costs[0], costs[2])
    ]
    problem = toy_problem(space, budgets, costs)
    grid = Grid.of(problem)
    moves = Moves.of(grid, grid.array(toy_sensitivities(space)))
    found = grid.encode([parent])
    for child in drawn(moves, found[0], 10, seed):
        found = np.vstack([found, child])
    for _ in range(5):
        child = cross(found[0], found[-1], moves, rng)
        if child is not None:
            found = np.vstack([found, child])
    for picks in found:
        allocation = grid.decode(picks)
        assert allocation in space
        assert problem.fits(allocation)


def test_an_allocation_survives_the_grid():
    assert GRID.decode(BEST) in SPACE
    assert (GRID.encode([GRID.decode(BEST)])[0] == BEST).all()
    assert GRID.prices(PRICES)[0] == pytest.approx(dict(toy_sensitivities(SPACE)[0]))


def test_cold_moves_gain_more_than_hot_ones_and_hot_ones_reach_everywhere():
    parent = GRID.encode([SPACE.uniform(SPACE.levels[0][1])])[0]
    cold, warm, hot = (
        drawn(Moves.of(GRID, PRICES, temperature), parent, 400) for temperature in (0.1, 2, 1e6)
    )
    means = [np.mean([total(child) for child in children]) for children in (cold, warm, hot)]
    assert means[0] < means[1] < means[2]
    assert np.min([total(child) for child in cold]) < 0.9 * total(parent)
    reached = {(layer, level) for child in hot for layer, level in enumerate(child)}
    assert len(reached) == GRID.exists.sum()


def test_changes_are_drawn_in_proportion_to_what_they_gain():
    moves, rng = Moves.of(GRID, PRICES, 1.0), np.random.default_rng(0)
    counts = Counter()
    others = moves._others(BEST)
    for _ in range(20_000):
        picks, free = BEST.copy(), np.ones(len(BEST), dtype=bool)
        moves._change(picks, others, free, rng)
        (layer,) = np.flatnonzero(~free)
        counts[layer, picks[layer]] += 1
    regrets = moves.regretted - moves.regretted[np.arange(len(BEST)), BEST, None]
    chances = np.where(others, np.exp(-regrets / moves.temperature), 0)
    chances /= chances.sum()
    for place, chance in np.ndenumerate(chances):
        assert counts[place] / 20_000 == pytest.approx(chance, abs=0.015)


def test_a_raise_is_paid_for_and_what_is_left_is_used():
    moves = Moves.of(GRID, PRICES)
    room = GRID.room[0] - np.array([moves._used(child)[0] for child in drawn(moves, BEST, 200)])
    assert (room >= 0).all()
    cheapest_raise = min(np.diff(row).min() for row in GRID.costs[0])
    assert np.median(room) < cheapest_raise


def test_a_child_has_its_parents_levels_but_for_the_repair():
    moves, rng = Moves.of(GRID, PRICES), np.random.default_rng(0)
    one, other = drawn(moves, BEST, 2)
    kept = []
    for _ in range(100):
        child = cross(one, other, moves, rng)
        kept.append(((child == one) | (child == other)).mean())
    assert np.mean(kept) > 0.85
    same = cross(BEST, BEST, moves, rng)
    assert (same == BEST).all()


def test_elites_are_the_best_that_differ():
    picks = np.zeros((5, 100), dtype=np.intp)
    picks[1, 0] = 1  # one layer beside the best: too near
    picks[2, :10] = 1
    picks[3, :50] = 1
    picks[4, 50:] = 1
    assert diverse_elites(picks, np.array([1.0, 1.1, 3.0, 2.0, 4.0])) == [0, 3, 2, 4]


def test_equal_prices_and_single_levels_still_move():
    flat = Moves.of(GRID, np.zeros_like(PRICES))
    assert drawn(flat, BEST, 20)
    pinned = toy_space(pins=range(12))
    grid = Grid.of(toy_problem(pinned, [parse_budget("3bits", pinned)]))
    only = grid.encode([pinned.uniform(pinned.levels[0][0])])[0]
    assert all(
        (child == only).all() for child in drawn(Moves.of(grid, 0.0 * grid.costs[0]), only, 5)
    )
