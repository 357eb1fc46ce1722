"""Sparse levels, quantized or not, against brute force: elimination, GPTQ, sequences."""

from dataclasses import replace

import pytest
import torch
from test_quantize import damp, random_hessian, random_weight, weighted_error

from autocompress.levels import parse_level
from autocompress.operators import Solver, Statistics, solve
from autocompress.operators.columns import BLOCK, Plan, sweep_plans
from autocompress.operators.masks import keep_largest
from autocompress.operators.measure import Measure, refit
from autocompress.operators.scales import group_scales
from autocompress.operators.sparse import sparse_plans
from autocompress.operators.sweep import damped
from autocompress.packed.sparse import unpack_mask

PUBLISHED = Solver(refit=0, alternations=0)
IN_ORDER = replace(PUBLISHED, activation_order=False)
PATTERNS = ("s50", "s70", "s90", "2:4", "1:4", "4:8")
WIDTH = BLOCK  # one block: the mask is chosen at once


def solve_one(weight, hessian, key, solver):
    return solve([weight], Statistics(hessian, 1), [parse_level(key)], solver)[0][0]


def kept(solution):
    level = solution.packed.level
    prune = getattr(level, "prune", level)
    return unpack_mask(prune, solution.packed.shape, solution.packed.tensors["mask"])


def eliminate(weight, hessian, order, keep, rounded=None):
    """OBS one column after the other: what is dropped, or rounded, moves all later columns."""
    weight, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    solved = torch.zeros_like(weight)
    for j in order:
        target = weight[:, j] if rounded is None else rounded(j, weight[:, j])
        solved[:, j] = torch.where(keep[:, j], target, 0)
        weight -= ((weight[:, j] - solved[:, j]) / inverse[j, j])[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j] / inverse[j, j]
        inverse[j], inverse[:, j] = 0, 0
    return solved


@pytest.mark.parametrize("key", PATTERNS)
@pytest.mark.parametrize("ordered", [False, True], ids=["stored order", "activation order"])
def test_sparsegpt_is_obs_by_elimination(key, ordered):
    weight, hessian = random_weight(16, 160), random_hessian(160)
    solver = replace(PUBLISHED, activation_order=ordered)
    solution = solve_one(weight, hessian, key, solver)
    diagonal, of = hessian.diagonal(), parse_level(key).of
    order = torch.arange(160)
    if ordered:
        groups = diagonal.view(-1, of or 1).sum(1).argsort(descending=True)
        order = (groups[:, None] * (of or 1) + torch.arange(of or 1)).flatten()
    expected = eliminate(weight, damp(hessian, solver), order.tolist(), kept(solution))
    torch.testing.assert_close(
        solution.packed.dense().double(), expected, rtol=2e-2, atol=2e-3
    )  # bf16 at every column


def test_the_mask_of_one_block_is_the_one_of_least_obs_error():
    """In one block weights are not yet moved, and the error of dropping is w^2 / U_jj^2."""
    weight, hessian = random_weight(16, WIDTH), random_hessian(WIDTH)
    solution = solve_one(weight, hessian, "s60", IN_ORDER)
    inverse = torch.linalg.inv(damp(hessian, IN_ORDER))
    pivots = torch.linalg.cholesky(inverse, upper=True).diagonal()
    expected = keep_largest((weight.double() / pivots).square(), parse_level("s60"))
    assert torch.equal(kept(solution), expected)


def test_nothing_dropped_is_the_weight():
    weight, hessian = random_weight().bfloat16().float(), random_hessian()
    keep = torch.ones(weight.shape, dtype=torch.bool)
    plan = Plan(parse_level("s50"), weight, keep=keep)
    [solved] = sweep_plans([plan], Statistics(hessian, 1), PUBLISHED)
    assert torch.equal(solved.weight, weight)
    assert torch.equal(refit(weight, weight, keep, damped(hessian, 0.01), 8), weight)


@pytest.mark.parametrize("codes", ["w4g64", "w3g64sym"])
def test_nothing_dropped_and_quantized_is_gptq(codes):
    weight, hessian = random_weight(), random_hessian()
    gptq = solve_one(weight, hessian, codes, PUBLISHED)
    level = parse_level(f"s50+{codes}")
    grid = group_scales(weight, hessian.diagonal().clone(), level.quantize, True)
    keep = torch.ones(weight.shape, dtype=torch.bool)
    [solved] = sweep_plans(
        [Plan(level, weight, keep=keep, grid=grid)], Statistics(hessian, 1), PUBLISHED
    )
    # One tie that is rounded the other way changes the rest of its row.
    same = torch.isclose(solved.weight, gptq.packed.dense(), rtol=1e-5, atol=1e-7).all(1)
    assert int(same.sum()) >= len(weight) - 1


@pytest.mark.parametrize("key", ["s50+w4g64", "2:4+w3g64", "4:8+w4g32sym"])
def test_mask_and_codes_in_one_pass_are_obs_by_elimination(key):
    weight, hessian = random_weight(16, 160), random_hessian(160)
    solution = solve_one(weight, hessian, key, IN_ORDER)
    level, tensors = solution.packed.level, solution.packed.tensors
    scales = tensors["scales"].double()
    from autocompress.packed.quantized import spread, stored_zeros

    scale = spread(scales, level.quantize, 160)
    zero = spread(stored_zeros(level.quantize, (16, 160), tensors).double(), level.quantize, 160)
    top = (1 << level.quantize.bits) - 1

    def rounded(j, column):
        code = (column / scale[:, j] + zero[:, j]).round().clamp(0, top)
        return (code - zero[:, j]) * scale[:, j]

    hessian = damp(hessian, IN_ORDER)
    expected = eliminate(weight, hessian, range(160), kept(solution), rounded)
    same = torch.isclose(solution.packed.dense().double(), expected, rtol=1e-4, atol=1e-6).all(1)
    assert int(same.sum()) >= len(weight) - 1


@pytest.mark.parametrize("key", ["s50+w4g64", "s70+w3g64", "2:4+w4g64", "4:8+w8g64sym"])
@pytest.mark.parametrize("seed", range(3))
def test_joint_is_never_worse_than_one_after_the_other(key, seed):
    """SparseGPT, then GPTQ on what it left, beside one pass, beside refitted masks."""
    weight, hessian = random_weight(32, seed=seed), random_hessian(seed=seed + 7)
    level = parse_level(key)
    measure = Measure.of(Statistics(hessian, 1), PUBLISHED)
    [sparse] = sparse_plans([weight], measure, [level.prune], PUBLISHED)[level.prune]
    grid = group_scales(sparse.weight, hessian.diagonal().clone(), level.quantize, True)
    plan = replace(sparse, level=level, grid=grid)
    [sequence] = sweep_plans([plan], Statistics(hessian, 1), PUBLISHED)
    after = measure(weight, sequence.packed()).error
    one_pass = solve_one(weight, hessian, key, PUBLISHED).error
    refitted = solve_one(weight, hessian, key, Solver()).error
    assert one_pass <= after * 1.03  # about equal: here inputs are hardly correlated
    assert refitted < 0.97 * min(after, one_pass)


@pytest.mark.parametrize("key", PATTERNS)
def test_each_rule_is_better_than_the_one_before(key):
    weight, hessian = random_weight(32), random_hessian()
    errors = [
        solve_one(weight, hessian, key, solver).error
        for solver in (
            Solver(pruning="magnitude", refit=0),
            Solver(pruning="wanda", refit=0),
            PUBLISHED,
            Solver(),
        )
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.97 * errors[2] < errors[1]


def test_wanda_keeps_as_many_in_every_output_and_leaves_them_as_they_are():
    weight, hessian = random_weight(16), random_hessian()
    solution = solve_one(weight, hessian, "s70", Solver(pruning="wanda", refit=0))
    keep = kept(solution)
    assert set(keep.sum(1).tolist()) == {96}
    score = weight.abs() * hessian.diagonal().sqrt()
    assert (score.masked_fill(~keep, torch.inf).amin(1) >= score.masked_fill(keep, 0).amax(1)).all()
    assert torch.equal(solution.packed.dense(), (weight * keep).bfloat16().float())


def test_magnitude_keeps_the_largest_of_all():
    weight = random_weight(16)
    keep = kept(solve_one(weight, None, "s70", Solver()))
    assert weight.abs()[keep].min() >= weight.abs()[~keep].max()


@pytest.mark.parametrize("key", PATTERNS)
def test_exactly_as_many_are_kept_as_are_stored(key):
    weight, hessian = random_weight(7, 104), random_hessian(104)
    level = parse_level(key)
    keep = kept(solve_one(weight, hessian, key, Solver()))
    assert int(keep.sum()) == level.kept((7, 104))
    if level.of is not None:
        assert set(keep.view(-1, level.of).sum(1).tolist()) == {level.kept_of}


def test_a_refit_is_least_squares_on_the_mask():
    weight, hessian = random_weight(4, 48), damped(random_hessian(48), 0.01)
    keep = torch.rand(4, 48, generator=torch.Generator().manual_seed(3)) < 0.5
    found = refit(weight, weight * keep, keep, hessian, 60)
    exact = torch.zeros(4, 48, dtype=torch.float64)
    double = hessian.double()
    for i, row in enumerate(keep):
        inside = double[row][:, row]
        exact[i, row] = torch.linalg.solve(inside, double[row] @ weight[i].double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-4)
    errors = [
        weighted_error(refit(weight, weight * keep, keep, hessian, steps) - weight, hessian)
        for steps in (0, 1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("key", ["s50", "2:4", "s50+w4g64"])
@pytest.mark.parametrize("solver", [Solver(), PUBLISHED], ids=["refitted", "published"])
def test_inputs_that_were_never_active_do_not_move_the_others(key, solver):
    dead = [0, 5, 300]
    weight = random_weight()
    alive, hessian = weight.clone(), random_hessian(dead=dead)
    alive[:, dead] = 0
    solution = solve_one(weight, hessian, key, solver)
    assert solution.packed.dense().isfinite().all()
    assert 0 < solution.error < 1
    change = solution.packed.dense()[:, dead] - weight[:, dead]
    assert change.abs().max() <= weight[:, dead].abs().max() * 1.01  # dropped or kept, not moved
