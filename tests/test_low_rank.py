"""Low-rank levels and low-rank parts beside others, against brute force."""

import pytest
import torch
from test_quantize import WIDTH, random_hessian, random_weight, solve_one, weighted_error

from autocompress.levels import parse_level
from autocompress.operators import Solver, Statistics, solve
from autocompress.operators.columns import Plan
from autocompress.operators.low_rank import best_factors
from autocompress.operators.outliers import choose_outliers
from autocompress.operators.sweep import damped
from autocompress.packed.low_rank import factors
from autocompress.packed.outliers import placed_outliers

SHAPES = [(24, 64), (64, 24), (40, 40)]
SEQUENTIAL = Solver(alternations=0)


def make(shape, seed=0):
    return random_weight(*shape, seed=seed), damped(random_hessian(shape[1], seed=seed + 1), 0.01)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_whitened_factors_are_the_best_there_are(shape, rank):
    """Eckart-Young in the Hessian's norm: what is left are the smaller singular values of W S."""
    weight, hessian = make(shape)
    left, right = best_factors(weight, hessian, rank)
    error = weighted_error(left @ right - weight, hessian)
    root = torch.linalg.cholesky(hessian.double())
    sizes = torch.linalg.svdvals(weight.double() @ root)
    assert error == pytest.approx(float(sizes[rank:].square().sum()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_other_factors_are_better(shape):
    weight, hessian = make(shape)
    left, right = best_factors(weight, hessian, 4)
    best = weighted_error(left @ right - weight, hessian)
    generator = torch.Generator().manual_seed(2)
    plain = best_factors(weight, None, 4)
    assert best < weighted_error(plain[0] @ plain[1] - weight, hessian)
    for size in (1e-3, 1e-2, 1e-1, 1):
        moved = left + size * torch.randn(left.shape, generator=generator) * left.std()
        inner = (moved.T @ moved).inverse() @ moved.T @ weight  # the best right factor beside it
        assert best <= weighted_error(moved @ inner - weight, hessian) * (1 + 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_factors_are_the_truncated_svd(shape):
    weight, _ = make(shape)
    left, right = best_factors(weight, None, 6)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(
        (left @ right).double(), u[:, :6] * s[:6] @ v[:6], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_rank_is_the_weight(shape):
    weight, hessian = make(shape)
    left, right = best_factors(weight, hessian, min(shape))
    torch.testing.assert_close(left @ right, weight, rtol=1e-4, atol=1e-5)


def test_a_weight_of_low_rank_is_found_and_the_rest_of_the_factors_is_finite():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 3, generator=generator) @ torch.randn(3, 24, generator=generator)
    left, right = best_factors(weight, damped(random_hessian(24), 0.01), 10)
    assert left.isfinite().all() and right.isfinite().all()
    torch.testing.assert_close(left[:, :3] @ right[:3], weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key", ["r50%w2g32", "r50%w4g64", "r8w3sym"])
def test_the_left_factor_makes_up_for_the_rounding_of_the_right_one(key):
    weight, hessian = random_weight(64, 96), random_hessian(96)
    level, assumed = parse_level(key), damped(hessian, 0.01)
    found = solve_one(weight, hessian, level, Solver())
    rank = level.rank_of((64, 96))
    _, right = factors(level, (64, 96), found.packed.tensors)
    left, _ = best_factors(weight, assumed, rank)
    within = Statistics(right @ assumed @ right.T, 1)
    [[rounded]] = solve([left.contiguous()], within, [level.factors], Solver())
    total = weighted_error(weight, hessian)
    as_it_was = weighted_error(rounded.packed.dense() @ right - weight, assumed) / total
    exact = solve_one(weight, hessian, parse_level(f"r{rank}"), Solver()).error
    assert 0 < found.error - exact < 0.98 * (as_it_was - exact)


@pytest.mark.parametrize("base", ["w2g64", "w3g64", "s70", "2:4+w3g64", "o1%+w2g64"])
def test_a_low_rank_part_is_the_best_correction_of_what_is_beside_it(base):
    weight, hessian = random_weight(32), random_hessian()
    alone = solve_one(weight, hessian, parse_level(base), Solver())
    both = solve_one(weight, hessian, parse_level(f"r6+{base}"), SEQUENTIAL)
    rest = (weight - alone.packed.dense()).double()
    root = torch.linalg.cholesky(damped(hessian, 0.01).double())
    least = float(torch.linalg.svdvals(rest @ root)[6:].square().sum())
    assert both.error == pytest.approx(least / weighted_error(weight, hessian), rel=5e-3)
    assert both.error < alone.error
    for name, tensor in alone.packed.tensors.items():
        assert torch.equal(tensor, both.packed.tensors[name])


@pytest.mark.parametrize("base", ["w2g64", "w3g64", "s70", "2:4+w3g64", "o1%+w2g64"])
@pytest.mark.parametrize("seed", range(3))
def test_alternation_is_never_worse_than_one_after_the_other(base, seed):
    weight, hessian = random_weight(32, seed=seed), random_hessian(seed=seed + 5)
    level = parse_level(f"r6+{base}")
    sequential, alternating, longer = (
        solve_one(weight, hessian, level, Solver(alternations=turns)).error for turns in (0, 2, 5)
    )
    assert longer <= alternating <= sequential
    assert longer < 0.995 * sequential


def test_the_eigenspace_of_the_inputs_beats_the_plain_residual():
    weight, hessian = random_weight(32), random_hessian()
    level = parse_level("r6+w2g64")
    eora = solve_one(weight, hessian, level, SEQUENTIAL).error
    plain = solve_one(weight, hessian, level, Solver(alternations=0, low_rank="svd")).error
    assert eora < 0.97 * plain


def test_levels_that_share_a_base_are_what_they_are_alone():
    weight, hessian = random_weight(32), random_hessian()
    keys = ("r2+w3g64", "r6+w3g64", "r6+w2g64")
    levels = [parse_level(key) for key in keys]
    [together] = solve([weight], Statistics(hessian, 1), levels, Solver())
    for level, solution in zip(levels, together, strict=True):
        assert solution.packed.level == level
        assert solution.error == pytest.approx(solve_one(weight, hessian, level, Solver()).error)


# --- outliers ---------------------------------------------------------------------------------


def with_spikes():
    """A weight with eight entries ten times as large as the others."""
    weight = random_weight(16)
    generator = torch.Generator().manual_seed(9)
    places = torch.randperm(weight.numel(), generator=generator)[:8]
    weight.view(-1)[places] *= 10 * weight.std() / weight.view(-1)[places].abs().clamp_min(1e-3)
    return weight, places


def test_outliers_are_the_weights_that_spoil_their_groups():
    weight, places = with_spikes()
    level = parse_level("o0.5%+w3g64")  # 25 of 5120
    plan = choose_outliers(Plan(level, weight), None, Solver())
    assert int(plan.exact.sum()) == 25
    assert plan.exact.view(-1)[places].all()


@pytest.mark.parametrize("solver", [Solver(), Solver(refit=0), Solver(method="rtn")], ids=str)
def test_outliers_are_kept_exactly_and_the_rest_gets_finer(solver):
    weight, _ = with_spikes()
    hessian = random_hessian()
    plain = solve_one(weight, hessian, parse_level("w3g64"), solver)
    found = solve_one(weight, hessian, parse_level("o0.5%+w3g64"), solver)
    assert found.error < 0.9 * plain.error
    rows, columns, values = placed_outliers((16, WIDTH), found.packed.tensors)
    assert len(values) == 25
    assert torch.equal(found.packed.dense()[rows, columns], values.float())
    if solver.method == "rtn":
        assert torch.equal(values, weight[rows, columns].bfloat16())


def test_refitted_outliers_make_up_for_the_rounding_of_the_others():
    weight, hessian = random_weight(32), random_hessian()
    level = parse_level("o2%+w2g64")
    assert (
        solve_one(weight, hessian, level, Solver()).error
        < 0.99 * solve_one(weight, hessian, level, Solver(refit=0)).error
    )
