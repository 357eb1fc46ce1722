"""Budgets in % of parameters, and the baselines that allocate by a rule."""

import numpy as np
import pytest
import torch
from runs import TOKENS, command, write_config
from toys import toy_problem, toy_space

from autocompress.core import Layer, SearchSpace
from autocompress.cost import check_budgets, parse_budget, size_tables
from autocompress.errors import BudgetError, ConfigError
from autocompress.levels import parse_level
from autocompress.outlier_scores import outlier_shares
from autocompress.parameters import parameter_costs, parameter_table
from autocompress.strategies.ratios import (
    Arithmetic,
    OutlierWeighed,
    RandomRatios,
    nearest,
)
from autocompress.strategies.uniform import nearest_uniform
from autocompress.summary import block_of

KEYS = ("s20", "s30", "s40", "s50", "s60", "s70", "s80", "s90", "dense")
UGLY = {"a": (33, 57), "b": (7, 190), "c": (64, 65)}


def costs_of(space, *budgets):
    return (*size_tables(space, 0), *parameter_costs(space, budgets))


def problem_of(budget, blocks=8, keys=KEYS, **more):
    space = toy_space(blocks, keys, **more)
    costs = costs_of(space, budget)
    return toy_problem(space, [parse_budget(budget, space)], costs)


def kept(problem, allocation):
    """Parameters kept, in percent of each block's."""
    table, found = problem.table("parameters"), {}
    for i, (layer, level) in enumerate(zip(problem.space.layers, allocation.levels, strict=True)):
        have, of = found.get(block_of(layer), (0, 0))
        found[block_of(layer)] = have + table.entries[i][level], of + layer.weights
    return [100 * have / of for have, of in found.values()]


@pytest.mark.parametrize(
    ("key", "parameters"),
    [
        *(("dense", 6000), ("w3g64", 6000), ("o1%+w3g64", 6000), ("s70", 1800), ("2:4", 3000)),
        *(("s99.99", 1), ("2:4+w4g64", 3000), ("r8", 8 * 160), ("r8w4", 8 * 160)),
        *(("r8+w3g64", 6000 + 8 * 160), ("r8+2:4+w4g64", 3000 + 8 * 160)),
    ],
)
def test_codes_count_dropped_weights_do_not_and_factors_add(key, parameters):
    assert parse_level(key).parameters((60, 100)) == parameters


@pytest.mark.parametrize("sparsity", [20, 30, 70])
def test_a_share_admits_the_uniform_sparsity_whatever_the_shapes(sparsity):
    problem = problem_of(f"{100 - sparsity}%", shapes=UGLY)
    uniform = problem.space.uniform(parse_level(f"s{sparsity}"))
    assert nearest_uniform(problem) == uniform
    assert problem.table("parameters").total(uniform) == problem.budgets[0].limit


def test_parameters_are_a_cost_only_where_a_budget_limits_them():
    space = toy_space()
    assert parameter_costs(space, ["3bits", "7ms"]) == ()
    assert parameter_costs(space, ["3bits", "50%"]) == (parameter_table(space),)
    with pytest.raises(BudgetError, match="positive number and one of the units"):
        parameter_costs(space, ["50 percent"])


@pytest.mark.parametrize(
    ("keys", "text", "message"),
    [
        (("w4g64", "w2g64"), "50%", r"at least 100\.00 %, the cheapest .* Got 50%"),
        (KEYS, "5%", r"at least 10\.\d\d %, the cheapest .* Got 5%"),
        (KEYS, "101%", r"at most 100\.00 %, the dense .* Got 101%"),
        (KEYS, "0%", "positive number"),
    ],
)
def test_impossible_shares(keys, text, message):
    space = toy_space(1, keys)
    with pytest.raises(BudgetError, match=message):
        check_budgets(space, costs_of(space, text), [parse_budget(text, space)])


def test_a_search_keeps_a_share_of_the_parameters(tiny_folder, tmp_path):
    toml = tmp_path / "space.toml"
    toml.write_text('name = "sparse"\nlevels = ["s30", "s50", "s70", "dense"]\n')
    config = write_config(tmp_path / "config.toml", tiny_folder, TOKENS, prefix="s50")
    out = tmp_path / "result"
    asked = ("--config", config, "--space", toml, "--strategy", "ilp", "--budget", "50%")
    facts = command("search", *asked, "--out", out, "--json").json()
    [budget] = facts["budgets"]
    assert (budget["text"], budget["cost"]) == ("50%", "parameters")
    assert 0.49 * facts["space"]["weights"] < budget["reached"] <= budget["limit"]
    report = (out / "report.md").read_text()
    assert "parameters of the layers in scope, the same share of their FLOPs" in report


# Ratios


def test_an_arithmetic_progression_over_depth():
    problem = problem_of("40%")
    [trial] = Arithmetic(spread=0.2)(problem, np.random.default_rng(0))
    shares = kept(problem, trial.allocation)
    assert shares == pytest.approx(np.linspace(60, 20, 8).tolist(), abs=4)  # half a level
    assert problem.fits(trial.allocation)
    turned = Arithmetic(spread=-0.2)(problem, np.random.default_rng(0))
    assert kept(problem, next(turned).allocation) == pytest.approx(shares[::-1], abs=8)


def test_owl_keeps_more_of_blocks_with_outliers():
    problem = problem_of("30%", blocks=3)
    outliers = [{0: 0.02, 1: 0.01, 2: 0.05}[block_of(it)] for it in problem.space.layers]
    [trial] = OutlierWeighed(outliers)(problem, np.random.default_rng(0))
    # By the paper's formula, scaled to a range of 2 lambda and moved to the mean:
    scaled = 0.16 * (np.array([0.02, 0.01, 0.05]) - 0.01) / 0.04
    expected = 100 * (scaled - scaled.mean() + 0.3)
    assert kept(problem, trial.allocation) == pytest.approx(expected.tolist(), abs=4)
    assert trial.origin == "owl"


def test_equal_outliers_are_uniform_and_more_candidates_are_no_worse():
    problem = problem_of("30%")
    flat = nearest(problem, [0.0] * len(problem.space.layers))
    assert flat == problem.space.uniform(parse_level("s70"))
    one, many = (
        list(RandomRatios(candidates=n)(problem, np.random.default_rng(3))) for n in (1, 6)
    )
    assert many[0].allocation == one[0].allocation
    assert many[-1].loss <= one[0].loss
    spread = [share - 30 for share in kept(problem, one[0].allocation)]
    assert max(map(abs, spread)) < 100 * 0.08


def test_layers_without_a_block_stand_in_the_middle():
    layers = tuple(Layer(name, (name,), ((10, 100),)) for name in ("x.0.a", "head", "x.2.a"))
    levels = tuple(map(parse_level, ("s10", "s30", "s50", "s70", "s90")))
    space = SearchSpace("three", layers, (levels,) * 3)
    problem = toy_problem(space, [parse_budget("50%", space)], costs_of(space, "50%"))
    [trial] = Arithmetic(spread=0.4)(problem, np.random.default_rng(0))
    assert list(map(str, trial.allocation.levels)) == ["s10", "s50", "s90"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Arithmetic(spread=1.5),
        lambda: RandomRatios(candidates=0),
        lambda: OutlierWeighed([1.0], spread=-0.1),
        lambda: RandomRatios(tokens=0),
    ],
)
def test_settings_out_of_range(make):
    with pytest.raises(ConfigError, match="must be"):
        make()


def test_outlier_shares_by_hand(tiny, tiny_windows):
    """Scores recomputed from the inputs that hooks of this test see."""
    layers = [
        Layer(name, (name,), (tuple(tiny.model.get_submodule(name).weight.shape),))
        for name in (
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.mlp.down_proj",
            "model.layers.2.mlp.up_proj",
        )
    ]
    space = SearchSpace("some", tuple(layers), ((parse_level("s50"),),) * 3)
    found = outlier_shares(tiny.model, space, tiny_windows.calibrate[:2], multiple=3.0)
    inputs = {}
    handles = [
        tiny.model.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, args, name=layer.name: inputs.update({name: args[0].flatten(0, -2)})
        )
        for layer in layers
    ]
    with torch.inference_mode():
        tiny.model(input_ids=torch.from_numpy(tiny_windows.calibrate[:2]))
    for handle in handles:
        handle.remove()
    scores = [
        (tiny.model.get_submodule(it.name).weight.abs() * inputs[it.name].norm(dim=0)).flatten()
        for it in layers
    ]
    first, second = torch.cat(scores[:2]), scores[2]
    shares = [float((part > 3 * part.mean()).float().mean()) for part in (first, second)]
    assert found == pytest.approx([shares[0], shares[0], shares[1]], rel=1e-6)
    assert 0 < shares[0] != shares[1]
    with pytest.raises(ConfigError, match="multiple must be above 0"):
        outlier_shares(tiny.model, space, tiny_windows.calibrate[:2], multiple=0)
