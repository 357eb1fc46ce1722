import itertools
from dataclasses import replace

import numpy as np
import pytest
from toys import TOKENS, WINDOW, Memory, toy_estimate, toy_problem, toy_space

from autocompress.core import GRADIENT
from autocompress.cost import parse_budget, size_tables
from autocompress.effort import EFFORTS, effort_tokens, plan
from autocompress.errors import ConfigError
from autocompress.strategies.auto import Auto
from autocompress.strategies.metering import metered
from autocompress.strategies.uniform import nearest_uniform

SPACE = toy_space(blocks=10)
COSTS = size_tables(SPACE, 1000)


def problem_of(limit="3.0", **changes):
    return replace(toy_problem(SPACE, [parse_budget(f"{limit}bits", SPACE)]), **changes)


def run(problem, tokens=EFFORTS["quick"]):
    strategy = Auto(plan(tokens, WINDOW, TOKENS))
    return list(strategy(problem, np.random.default_rng(0)))


@pytest.mark.parametrize("tokens", [4608, 10_000, *EFFORTS.values()])
def test_a_plan_is_whole_windows_within_its_tokens(tokens):
    spending = plan(tokens, 512, 24_576)
    sizes = (spending.sensitivities, spending.batch, spending.compare)
    assert all(size >= 512 and size % 512 == 0 for size in sizes)
    assert max(sizes) <= 24_576
    gradients = spending.sensitivities + spending.steps * spending.batch
    uniform = min(spending.compare, 4 * 512)
    scored = uniform + (1 + spending.contenders) * spending.compare
    assert GRADIENT * gradients + scored <= tokens


def test_a_batch_is_no_larger_than_what_there_is():
    assert plan(300_000, 64, 512).batch == 512


def test_more_tokens_buy_more_of_everything():
    plans = [plan(tokens, 512, 24_576) for tokens in EFFORTS.values()]
    for less, more in itertools.pairwise(plans):
        assert less.sensitivities <= more.sensitivities
        assert less.steps * less.batch < more.steps * more.batch
        assert less.compare <= more.compare


def test_an_effort_that_affords_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"at least 4608 tokens.*Got 4607.*Raise --tokens"):
        plan(4607, 512, 24_576)


def test_an_unknown_effort_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"one of quick, normal, thorough. Got 'qiuck'.*quick"):
        effort_tokens("qiuck")


def test_auto_starts_from_the_ilp_and_every_phase_beats_the_last():
    origins = set()
    for limit in ("2.6", "3.0", "3.5", "4.0"):
        incumbents = run(problem_of(limit))
        assert incumbents[0].origin == "ilp"
        losses = [trial.loss for trial in incumbents]
        assert losses == sorted(losses, reverse=True)
        origins |= {trial.origin for trial in incumbents}
    assert origins >= {"ilp", "refinement"}


def test_few_tokens_go_to_evolution_and_not_to_refinement():
    def refused(*arguments):
        raise AssertionError("no gradients at an incumbent")

    spending = plan(1200, WINDOW, TOKENS)
    assert spending.steps == 0 and plan(4800, WINDOW, TOKENS).steps > 0
    memory = Memory(SPACE, COSTS)
    problem = toy_problem(SPACE, [parse_budget("3.0bits", SPACE)], COSTS, memory)
    run(replace(problem, linearize=refused), 1200)
    assert [trial.origin for trial in memory.trials].count("surrogate") > 6


@pytest.mark.parametrize("tokens", [300, 600, 1000])
def test_auto_spends_no_more_than_it_may(tokens):
    problem = metered(problem_of())
    run(problem, tokens)
    assert 0.5 * tokens <= problem.spent() <= tokens


def test_sensitivities_that_mislead_leave_uniform_the_incumbent():
    def misled(tokens):
        estimate = toy_estimate(SPACE)
        return estimate._replace(mean=tuple({k: -v for k, v in r.items()} for r in estimate.mean))

    memory = Memory(SPACE, COSTS)
    problem = problem_of("3.3", sensitivities=misled, evaluate=memory)
    first, *_ = run(problem)
    assert first.allocation == nearest_uniform(problem)
    assert first.origin == "uniform w3g64"


def test_uniform_is_scored_before_gradients_are_asked_for():
    memory = Memory(SPACE, COSTS)
    scored = []

    def asked(tokens):
        scored.append(len(memory.trials))
        return toy_estimate(SPACE)

    run(problem_of(evaluate=memory, sensitivities=asked))
    first, *_ = scored
    assert [trial.origin for trial in memory.trials[:first]] == ["uniform w2g64"]


def test_what_exchanges_leave_is_spent_on_evolution():
    memory = Memory(SPACE, COSTS)
    problem = metered(toy_problem(SPACE, [parse_budget("3.0bits", SPACE)], COSTS, memory))
    spending = plan(3000, WINDOW, TOKENS)
    assert spending.steps > 0
    run(problem, 3000)
    assert memory.trials[-1].origin == "surrogate"
    generation = (6 + 1) * (spending.compare // 4) + spending.compare
    assert 3000 - problem.spent() < generation
