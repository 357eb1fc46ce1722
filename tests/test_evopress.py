"""EvoPress as its authors' `evo_quant_search.py` does it: what is drawn, scored and kept."""

import itertools
from collections import Counter

import numpy as np
import pytest
from toys import SMOLLM2, Memory, toy_problem, toy_space

from autocompress.core import Budget, Fidelity
from autocompress.cost import parse_budget, size_tables
from autocompress.errors import ConfigError
from autocompress.strategies.evopress import EqualSwitch, EvoPress, RoundedUp
from autocompress.strategies.uniform import nearest_uniform

SPACE = toy_space(blocks=6, shapes=SMOLLM2, keys=("w2g64", "w3g64", "w4g64", "w5g64", "w6g64"))
COSTS = size_tables(SPACE, 1000)
LEVELS = SPACE.levels[0]
THREE = SPACE.uniform(LEVELS[1])


def exactly(allocation, space=SPACE):
    table = size_tables(space, 1000)[0]
    return Budget("bits", table.total(allocation), "exact")


def run(strategy, problem, seed=0):
    return list(strategy(problem, np.random.default_rng(seed)))


def moved(parent, child):
    pairs = zip(parent.levels, child.levels, strict=True)
    return {layer: b.bits - a.bits for layer, (a, b) in enumerate(pairs) if a != b}


def test_a_mutation_is_one_to_three_pairs_of_equal_layers():
    problem, rng = toy_problem(SPACE, [exactly(THREE)]), np.random.default_rng(0)
    mutate, table = EqualSwitch.of(problem), COSTS[0]
    pairs = Counter()
    for _ in range(4000):
        child = mutate(THREE, rng)
        steps = moved(THREE, child)
        by_size = Counter()
        for layer, step in steps.items():
            by_size[SPACE.layers[layer].weights] += step
        assert not any(by_size.values()), "what one layer gives, an equal layer takes"
        assert table.total(child) == table.total(THREE)
        pairs[sum(step for step in steps.values() if step > 0)] += 1
    # The smaller of two draws from 1, 2, 3 is 1, 2 or 3 with chances 5, 3 and 1 out of 9; a pair
    # that draws one layer twice moves nothing: once in 12 or 18 times here.
    assert pairs[1] / 4000 == pytest.approx(0.55, abs=0.05)
    assert pairs[2] / 4000 == pytest.approx(0.29, abs=0.04)
    assert pairs[3] / 4000 == pytest.approx(0.09, abs=0.03)
    assert max(pairs) == 3


def test_groups_are_drawn_in_proportion_to_their_layers():
    problem, rng = toy_problem(SPACE, [exactly(THREE)]), np.random.default_rng(1)
    mutate = EqualSwitch.of(problem)
    assert sorted({len(group) for group in mutate.groups}) == [12, 18]  # q, o; k, v; gate, up, down
    singles = [steps for _ in range(6000) if len(steps := moved(THREE, mutate(THREE, rng))) == 2]
    sizes = Counter(SPACE.layers[min(steps)].weights for steps in singles)
    shares = [sizes[size] / len(singles) for size in sorted(sizes)]
    assert shares == pytest.approx([2 / 7, 2 / 7, 3 / 7], abs=0.03)


def test_a_layer_at_an_end_moves_one_way_only():
    parent = THREE.swap(0, LEVELS[0]).swap(3, LEVELS[2]).swap(7, LEVELS[4])
    mutate = EqualSwitch.of(toy_problem(SPACE, [exactly(parent)]))
    rng = np.random.default_rng(0)
    steps = [moved(parent, child) for _ in range(2000) if (child := mutate(parent, rng))]
    assert {it[0] > 0 for it in steps if 0 in it} == {True}
    assert {it[7] < 0 for it in steps if 7 in it} == {True}


def test_a_generation_scores_as_many_tokens_as_theirs():
    problem = toy_problem(SPACE, [exactly(THREE)], tokens=524_288)
    theirs = 128 * 2048 + 16 * 16_384 + 5 * 131_072
    assert EvoPress()._tokens_of_a_generation(problem) == theirs == 1_179_648
    memory = Memory(SPACE, COSTS)
    problem = toy_problem(SPACE, [exactly(THREE)], COSTS, memory, tokens=524_288)
    run(EvoPress(generations=1, start=RoundedUp(tokens=16)), problem)
    assert sum(t.fidelity.tokens for t in memory.trials if t.fidelity.tokens > 16) == theirs


def test_every_stage_draws_windows_of_its_own_and_the_last_scores_the_parent():
    memory = Memory(SPACE, COSTS)
    problem = toy_problem(SPACE, [exactly(THREE)], COSTS, memory)
    plan = EvoPress(generations=4, offspring=9, stages=((4, 32), (2, 64), (1, 128)))
    first, *incumbents = run(plan, problem)
    assert first.allocation == THREE
    assert len({t.fidelity.seed for t in memory.trials}) == 1 + 3 * 4
    parent = first.allocation
    for generation, winner in enumerate(incumbents, start=1):
        stages = [
            [t for t in memory.trials if t.fidelity == Fidelity(tokens, 3 * generation + stage)]
            for stage, tokens in enumerate((32, 64, 128))
        ]
        assert [len(trials) for trials in stages] == [9, 4, 3]
        offspring = {t.allocation for t in stages[0]}
        assert len(offspring) == 9
        assert parent not in offspring
        for before, after in itertools.pairwise(stages):
            best = sorted(before, key=lambda t: t.loss)[: len(after) - (after is stages[2])]
            assert {t.allocation for t in after} - {parent} == {t.allocation for t in best}
        assert parent in {t.allocation for t in stages[2]}
        assert winner == min(stages[2], key=lambda t: t.loss)
        parent = winner.allocation


def test_between_two_levels_the_start_is_the_best_of_random_ones():
    memory = Memory(SPACE, COSTS)
    problem = toy_problem(SPACE, [parse_budget("3.8bits", SPACE)], COSTS, memory)
    (start,) = run(EvoPress(generations=0), problem)
    assert len({t.allocation for t in memory.trials}) == 16
    assert start.loss == min(t.loss for t in memory.trials)
    for trial in memory.trials:
        assert problem.fits(trial.allocation)
        assert set(trial.allocation.levels) <= {LEVELS[0], LEVELS[1], LEVELS[2]}
        assert Counter(trial.allocation.levels)[LEVELS[2]] > 5, "from the level above, downwards"


def test_where_nothing_can_be_rounded_up_the_start_is_uniform():
    for budgets in ([exactly(THREE)], [parse_budget("16bits", SPACE)], []):
        problem = toy_problem(SPACE, budgets)
        (start,) = run(RoundedUp(), problem)
        assert start.allocation == nearest_uniform(problem)
    with pytest.raises(ConfigError, match="candidates must be at least 1"):
        RoundedUp(candidates=0)


def test_unequal_steps_never_exceed_a_budget():
    space = toy_space(blocks=6, keys=("w2g64", "w3g64", "w6g64"))
    parent = space.uniform(space.levels[0][1])
    problem = toy_problem(space, [exactly(parent, space)])
    mutate, rng = EqualSwitch.of(problem), np.random.default_rng(0)
    drawn = [mutate(parent, rng) for _ in range(200)]
    assert None in drawn, "3 -> 6 bits costs more than 3 -> 2 frees"
    assert all(problem.fits(child) for child in drawn if child is not None)
