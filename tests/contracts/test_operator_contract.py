"""What every registered operator must keep. A new one enters its levels in `FAMILIES`."""

import pytest
import torch

from autocompress.levels import Dense, parse_level
from autocompress.operators import OPERATORS, Solver, Statistics, solve

# Level type -> keys of rising storage.
FAMILIES = {
    "Dense": ("dense",),
    "Drop": ("drop",),
    "Unread": ("unread",),
    "Quantize": ("w2g64", "w3g64", "w4g64", "w5g64", "w6g64", "w8g64"),
    "Quantize, per channel": ("w2", "w3", "w4", "w5", "w6", "w8"),
    "Quantize, symmetric": ("w2g32sym", "w3g32sym", "w4g32sym", "w5g32sym", "w6g32sym", "w8g32sym"),
    "Prune": ("s90", "s70", "s50", "s30", "s10"),
    "Prune, n:m": ("1:8", "1:4", "2:4", "6:8"),
    "LowRank": ("r25%", "r50%", "r75%"),
    "LowRank, quantized": ("r25%w8g32", "r50%w8g32", "r100%w8g32"),
    "Joint, any": ("s70+w4g32", "s50+w4g32", "s30+w4g32", "s10+w8g32sym"),
    "Joint, n:m": ("2:4+w3g32", "2:4+w4g32", "6:8+w4g32", "6:8+w6g32"),
    "Joint, outliers": ("o1%+w2g64", "o1%+w3g64", "o1%+w4g64", "o1%+w6g64sym"),
    "Joint, low rank and codes": ("r20%+w2g64", "r40%+w2g64", "r80%w8+w3g64"),
    "Joint, low rank and sparse": ("r20%+s80", "r20%+s60", "r40%+s40"),
    "GgufType": ("Q4_0", "Q5_0", "Q8_0"),
    "GgufType, with a minimum": ("Q4_1", "Q5_1", "Q8_0"),
    "Joint, three parts": ("r20%+2:4+w3g64", "r20%+s50+w4g64", "r20%+o1%+w4g64"),
}
SOLVERS = {
    "gptq": Solver(),
    "gptq, in order": Solver(activation_order=False, search_scales=False),
    "rtn": Solver(method="rtn"),
    "as published": Solver(refit=0, alternations=0),
    "wanda": Solver(pruning="wanda", low_rank="svd"),
    "magnitude": Solver(pruning="magnitude", refit=0),
}
WIDTH = 96  # 64 does not divide it


@pytest.fixture(params=FAMILIES)
def levels(request):
    return [parse_level(key) for key in FAMILIES[request.param]]


@pytest.fixture(params=SOLVERS)
def solver(request):
    return SOLVERS[request.param]


@pytest.fixture
def weights():
    """Of three modules that read the same input, as q, k and v do."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, WIDTH, generator=generator) for rows in (32, 7, 16)]


@pytest.fixture(params=["statistics", "no statistics"])
def statistics(request):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, WIDTH, generator=generator)
    x[:, 1:] += x[:, :-1]
    x *= torch.linspace(0.1, 3, WIDTH)
    x[:, 7] = 0  # never active
    return Statistics(x.T @ x / 500 if request.param == "statistics" else None, 500)


def test_every_registered_operator_is_tested(weights, statistics):
    solve(weights, statistics, [Dense()], Solver())  # registers them
    tested = {type(parse_level(key)) for keys in FAMILIES.values() for key in keys}
    assert tested == set(OPERATORS), "enter the levels of the new operator in FAMILIES"


def test_weights_keep_shape_dtype_and_stored_bits(weights, statistics, levels, solver):
    found = solve(weights, statistics, levels, solver)
    assert [len(row) for row in found] == [len(levels)] * len(weights)
    for weight, row in zip(weights, found, strict=True):
        for level, solution in zip(levels, row, strict=True):
            dense = solution.packed.dense()
            assert (dense.shape, dense.dtype) == (weight.shape, torch.float32)
            assert solution.packed.level == level
            assert solution.packed.shape == tuple(weight.shape)
            assert solution.packed.bits == level.storage_bits(tuple(weight.shape))


def test_inputs_are_left_alone(weights, statistics, levels, solver):
    before = [weight.clone() for weight in weights]
    hessian = None if statistics.hessian is None else statistics.hessian.clone()
    solve(weights, statistics, levels, solver)
    assert all(map(torch.equal, weights, before))
    assert hessian is None or torch.equal(hessian, statistics.hessian)


def test_dense_is_the_identity_in_16_bits(weights, statistics, solver):
    for weight, [solution] in zip(
        weights, solve(weights, statistics, [Dense()], solver), strict=True
    ):
        assert torch.equal(solution.packed.dense(), weight.bfloat16().float())
        assert solution.error == 0


def test_error_falls_as_storage_rises(weights, statistics, levels, solver):
    for row in solve(weights, statistics, levels, solver):
        bits = [solution.packed.bits for solution in row]
        errors = [solution.error for solution in row]
        assert bits == sorted(set(bits))
        assert errors == sorted(set(errors), reverse=True)


def test_a_higher_level_is_nearer_to_the_weight(weights, statistics, levels, solver):
    """The reported error may not be the only witness."""
    hessian = torch.eye(WIDTH) if statistics.hessian is None else statistics.hessian
    for weight, row in zip(weights, solve(weights, statistics, levels, solver), strict=True):
        changes = [solution.packed.dense() - weight for solution in row]
        errors = [float(((change @ hessian) * change).sum()) for change in changes]
        assert errors == sorted(set(errors), reverse=True)


def test_the_same_input_gives_the_same_bytes(weights, statistics, levels, solver):
    once, again = (
        [solution for row in solve(weights, statistics, levels, solver) for solution in row]
        for _ in range(2)
    )
    for one, two in zip(once, again, strict=True):
        assert one.error == two.error
        assert one.packed.tensors.keys() == two.packed.tensors.keys()
        for name, tensor in one.packed.tensors.items():
            assert torch.equal(tensor, two.packed.tensors[name])


def test_together_is_as_good_as_apart(weights, statistics, levels, solver):
    """Modules of one input, and all levels of a family, are solved in one pass."""
    together = solve(weights, statistics, levels, solver)
    for weight, row in zip(weights, together, strict=True):
        for level, solution in zip(levels, row, strict=True):
            [[alone]] = solve([weight], statistics, [level], solver)
            assert solution.error == pytest.approx(alone.error, rel=0.02)
            if getattr(level, "low_rank", None) is not None:
                continue  # a low-rank part depends on all rows, so one changes all
            # A matrix product of other shape rounds otherwise: a tie may change the rest of a row.
            same = (solution.packed.dense() == alone.packed.dense()).all(1)
            assert int(same.sum()) >= len(weight) - 1


def test_levels_of_several_families_come_back_in_order(weights, statistics):
    mixed = [parse_level(key) for key in ("w4g64", "dense", "w2", "w3g32sym")]
    for row in solve(weights, statistics, mixed, Solver()):
        assert [solution.packed.level for solution in row] == mixed
