"""Removal in a search: what is left out is measured, beside what is gone already."""

from dataclasses import replace

import numpy as np
import pytest
from toys import TOKENS, WINDOW, Memory, toy_problem, toy_space

from autocompress.core import Score, SearchSpace
from autocompress.cost import parse_budget, size_tables
from autocompress.effort import plan
from autocompress.levels import Role, parse_level
from autocompress.predictions import Estimate
from autocompress.strategies.auto import Auto
from autocompress.strategies.metering import metered
from autocompress.strategies.removal import Removal
from autocompress.strategies.uniform import nearest_uniform
from autocompress.strategies.units import dropped, find_units, only_removes, removes
from autocompress.study import Study

SHAPES = {"attn": (64, 64), "mlp": (192, 64)}
BLOCKS = 6


def space_of(*keys):
    """Sublayers that may be dropped: an attention and a larger FFN in each block."""
    space = toy_space(BLOCKS, keys, shapes=SHAPES)
    layers = tuple(replace(layer, roles=(Role(True),)) for layer in space.layers)
    return SearchSpace("toy", layers, space.levels)


DEPTH, MIXED = space_of("dense", "drop"), space_of("w2g64", "w4g64", "w8g64", "drop")


class Interplay:
    """Each sublayer has a harm; two that follow each other harm five times as much together.

    Alone those of even places look harmless, so what prices promise is a trap.
    """

    def __init__(self, space):
        rng = np.random.default_rng(1)
        self.space, self.harms = space, rng.uniform(0.5, 1, len(space.layers))
        self.harms[::2] *= 0.5

    def __call__(self, allocation, fidelity, known=0):
        gone = sorted(dropped(allocation))
        loss = sum(self.harms[i] * len(self.space.layers[i].shapes) for i in gone)
        loss += sum(4 * self.harms[i] for i in gone if i + 2 in gone)
        rows = zip(self.space.layers, allocation.levels, strict=True)
        loss += sum(0.1 * 4 ** -(a.storage_bits(b) / a.weights) for a, b in rows)
        windows = max(1, fidelity.tokens // WINDOW)
        losses = tuple(loss * (1 + 0.01 * (i % 3)) for i in range(windows))[known:]
        return Score(losses, losses)


def problem_of(space, limit, path=None, **changes):
    costs = size_tables(space, 1000)
    memory = Memory(space, costs)
    memory._loss = Interplay(space)
    problem = toy_problem(space, [parse_budget(f"{limit}bits", space)], costs, memory)
    return replace(problem, **changes), memory


def run(problem, tokens):
    return list(Auto(plan(tokens, WINDOW, TOKENS))(problem, np.random.default_rng(0)))


def best_of(space, problem):
    """By trying every set."""
    loss, found = Interplay(space), []
    for number in range(2 ** len(space.layers)):
        allocation = space.uniform(parse_level("dense"))
        for i in range(len(space.layers)):
            if number >> i & 1:
                allocation = allocation.swap(i, parse_level("drop"))
        if problem.fits(allocation) and allocation.keeps_some:
            found.append(loss(allocation, problem.fidelity(WINDOW)).loss)
    return min(found)


@pytest.mark.parametrize("limit", [14, 12, 10])
def test_what_goes_is_nearly_the_best_there_is(limit):
    """What each sublayer costs alone is no guide here: the ranking loses by far."""
    problem, memory = problem_of(DEPTH, limit)
    last = run(problem, 60_000)[-1]
    best = best_of(DEPTH, problem)
    order, ranked = np.argsort(memory._loss.harms), DEPTH.uniform(parse_level("dense"))
    for layer in order:
        if not problem.fits(ranked):
            ranked = ranked.swap(int(layer), parse_level("drop"))
    alone = memory._loss(ranked, problem.fidelity(WINDOW)).loss
    found = memory._loss(last.allocation, problem.fidelity(WINDOW)).loss
    assert best <= found <= 1.1 * best
    assert found < 0.8 * alone or alone < 1.05 * best


def test_what_went_first_comes_back_where_it_is_missed():
    """Alone layer 1 is the least harmful; beside anything else it is the worst."""

    class Trap(Interplay):
        def __call__(self, allocation, fidelity, known=0):
            score = super().__call__(allocation, fidelity, known)
            gone = dropped(allocation)
            more = -2.0 if gone == {1} else 3.0 * (1 in gone)
            return Score(*2 * (tuple(loss + more for loss in score.losses),))

    problem, memory = problem_of(DEPTH, 11)
    memory._loss = Trap(DEPTH)
    incumbents = run(problem, 60_000)
    assert 1 in dropped(incumbents[0].allocation)
    assert 1 not in dropped(incumbents[-1].allocation)


def first_of(problem, **settings):
    """What races before any round."""
    nothing = tuple(dict.fromkeys(levels, 0.0) for levels in problem.space.levels)
    problem = metered(problem)
    removal, rng = Removal(60_000, **settings), np.random.default_rng(0)
    prices = Estimate(nothing, nothing)
    return dropped(next(removal.search(problem, problem.evaluate, prices, rng)).allocation)


def test_paths_on_other_windows_see_what_one_window_hides():
    """On the first window layer 1 may go for free; everywhere else it is the worst."""

    class Hiding(Interplay):
        def __call__(self, allocation, fidelity, known=0):
            score = super().__call__(allocation, fidelity, 0)
            more = 3.0 * (1 in dropped(allocation))
            losses = [loss + more for loss in score.losses]
            if fidelity.seed == 0:
                losses[0] -= 2 * more
            return Score(*2 * (tuple(losses[known:]),))

    problem, memory = problem_of(DEPTH, 11)
    memory._loss = Hiding(DEPTH)
    assert 1 in first_of(problem, paths=0)
    assert 1 not in first_of(problem)


def test_every_answer_is_within_the_budget_though_measurements_are_not():
    problem, memory = problem_of(DEPTH, 12)
    incumbents = run(problem, 60_000)
    assert all(map(problem.fits, (trial.allocation for trial in incumbents)))
    assert not all(problem.fits(trial.allocation) for trial in memory.trials)
    assert {trial.origin for trial in incumbents} <= {"removal", "uniform", "influence"}
    losses = [trial.loss for trial in incumbents]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("space", [DEPTH, MIXED], ids=["depth", "mixed"])
@pytest.mark.parametrize("tokens", [320, 400, 600, 2000, 8000])
def test_removal_spends_no_more_than_it_may(space, tokens):
    problem = metered(problem_of(space, 12 if space is DEPTH else 2.5)[0])
    run(problem, tokens)
    assert problem.spent() <= tokens


def test_the_blocks_of_least_influence_race():
    """Where they are the best, they win."""
    blocks, best = {1, 4}, {2, 3, 8, 9}

    class Friendly(Interplay):
        def __call__(self, allocation, fidelity, known=0):
            gone = dropped(allocation)
            loss = 0.1 if gone == best else 1.0 + sum(5 if i in best else 1 for i in gone)
            losses = (loss,) * max(1, fidelity.tokens // WINDOW)
            return Score(losses[known:], losses[known:])

    influence = [0.1 if i // 2 in blocks else 1.0 for i in range(len(DEPTH.layers))]
    problem, memory = problem_of(DEPTH, 11, influence=lambda tokens: influence)
    memory._loss = Friendly(DEPTH)
    last = run(problem, 20_000)[-1]
    assert dropped(last.allocation) == best
    assert find_units(DEPTH, influence)[:3] == [{2, 3}, {2}, {3}]


def test_without_influence_units_stand_in_order():
    assert find_units(DEPTH)[:4] == [{0, 1}, {0}, {1}, {2, 3}]
    assert not removes(toy_space())
    assert only_removes(DEPTH) and removes(MIXED) and not only_removes(MIXED)


def test_in_a_mixed_space_what_follows_knows_what_dropping_costs():
    """Prices say that dropping costs nothing; measured, it costs more than two bits do."""
    drop = parse_level("drop")

    def misled(tokens):
        estimate = toy_problem(MIXED, []).sensitivities(tokens)
        return estimate._replace(mean=tuple({**row, drop: 0.0} for row in estimate.mean))

    problem, memory = problem_of(MIXED, 2.6, sensitivities=misled)
    last = run(problem, 60_000)[-1]
    assert not dropped(last.allocation)
    assert not any(dropped(it.allocation) for it in memory.trials if it.origin == "ilp")
    assert memory._loss(last.allocation, last.fidelity).loss <= (
        memory._loss(nearest_uniform(problem), last.fidelity).loss
    )


def test_a_second_run_asks_nothing_new(tmp_path):
    costs = size_tables(DEPTH, 1000)
    found = []
    for _ in range(2):
        with Study(tmp_path / "run", DEPTH, costs, {}, Interplay(DEPTH)) as study:
            problem = toy_problem(DEPTH, [parse_budget("12bits", DEPTH)], costs, study.evaluate)
            found.append((run(problem, 20_000), study.fresh))
    assert found[0][0] == found[1][0]
    assert found[1][1] == 0
