"""What every registered operator must keep. A new one enters its levels in `FAMILIES`."""

from functools import cache
from typing import NamedTuple

import pytest
import torch

from autocompress.levels import Dense, parse_level
from autocompress.operators import OPERATORS, Solution, Solver, Statistics, solve

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
    "Width": ("width25%", "width50%", "width75%"),
    "Width, channels of three": ("width25%of3", "width50%of3", "width75%of3"),
    "Width, codes": ("width25%+w2g32", "width50%+w4g32", "width75%+w4g32"),
    "Rows": ("rows50%",),
    "Rows, codes": ("rows50%+w2g32", "rows50%+w4g32", "rows50%+w8g32"),
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
# Family -> solvers whose bytes or errors differ, with statistics and without. The others would test
# nothing new, which `test_other_settings_change_nothing` checks. Of other families all are tested.
CODES = (("gptq", "gptq, in order", "rtn"), ("gptq", "gptq, in order"))
MASKS = (tuple(SOLVERS), ("gptq",))
BOTH = (tuple(SOLVERS), ("gptq", "gptq, in order"))
DIFFERENT = {
    "Dense": (("gptq",), ("gptq",)),
    "Quantize": CODES,
    "Quantize, per channel": CODES,
    "Quantize, symmetric": CODES,
    "Prune": MASKS,
    "Prune, n:m": MASKS,
    "LowRank": (("gptq", "rtn", "wanda"), ("gptq",)),
    "LowRank, quantized": ((*CODES[0], "wanda"), ("gptq",)),
    "Joint, any": BOTH,
    "Joint, n:m": BOTH,
    "Joint, outliers": ((*CODES[0], "as published"), CODES[1]),
    "Joint, low rank and codes": (
        (*CODES[0], "as published", "wanda"),
        (*CODES[0], "as published"),
    ),
    "Joint, low rank and sparse": (MASKS[0], ("gptq", "as published")),
    "Joint, three parts": (tuple(SOLVERS), (*CODES[1], "as published")),
    "Width": (("gptq", "rtn"), ("gptq",)),
    "Width, channels of three": (("gptq", "rtn"), ("gptq",)),
    "Width, codes": CODES,
    "Rows": (("gptq",), ("gptq",)),
    "Rows, codes": CODES,
    "GgufType": (CODES[0], ("gptq",)),
    "GgufType, with a minimum": (CODES[0], ("gptq",)),
}
WIDTH = 96  # 64 does not divide it


class Case(NamedTuple):
    family: str
    solver: str
    known: bool  # whether there are statistics

    def __str__(self):
        return f"{self.family}-{self.solver}-{'statistics' if self.known else 'no statistics'}"

    @property
    def levels(self):
        return [parse_level(key) for key in FAMILIES[self.family]]


def cases():
    for family in FAMILIES:
        for known, names in zip(
            (True, False), DIFFERENT.get(family, (SOLVERS, SOLVERS)), strict=True
        ):
            yield from (Case(family, name, known) for name in names)


def make_weights():
    """Of three modules that read the same input, as q, k and v do."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, WIDTH, generator=generator) for rows in (32, 7, 16)]


def make_statistics(known):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, WIDTH, generator=generator)
    x[:, 1:] += x[:, :-1]
    x *= torch.linspace(0.1, 3, WIDTH)
    x[:, 7] = 0  # never active
    return Statistics(x.T @ x / 500 if known else None, 500)


@cache
def solved(case: Case) -> list[list[Solution]]:
    """Solved once for all tests, which only read it."""
    return solve(make_weights(), make_statistics(case.known), case.levels, SOLVERS[case.solver])


def stored(rows):
    """All bytes of solutions."""
    return [
        (solution.error, name, bytes(tensor.flatten().view(torch.uint8).numpy()))
        for row in rows
        for solution in row
        for name, tensor in sorted(solution.packed.tensors.items())
    ]


@pytest.fixture(params=cases(), ids=str)
def case(request):
    return request.param


@pytest.fixture
def weights():
    return make_weights()


@pytest.fixture
def statistics(case):
    return make_statistics(case.known)


def test_every_registered_operator_is_tested():
    solve(make_weights(), make_statistics(False), [Dense()], Solver())  # registers them
    tested = {type(parse_level(key)) for keys in FAMILIES.values() for key in keys}
    assert tested == set(OPERATORS), "enter the levels of the new operator in FAMILIES"


@pytest.mark.parametrize("family", DIFFERENT)
@pytest.mark.parametrize("known", [True, False], ids=["statistics", "no statistics"])
def test_other_settings_change_nothing(family, known):
    different = [stored(solved(it)) for it in cases() if (it.family, it.known) == (family, known)]
    for name in set(SOLVERS) - set(DIFFERENT[family][not known]):
        found = stored(solved(Case(family, name, known)))
        assert found in different, f"enter '{name}' in DIFFERENT for '{family}'"


def test_weights_keep_shape_dtype_and_stored_bits(weights, case):
    found = solved(case)
    assert [len(row) for row in found] == [len(case.levels)] * len(weights)
    for weight, row in zip(weights, found, strict=True):
        for level, solution in zip(case.levels, row, strict=True):
            dense = solution.packed.dense()
            assert (dense.shape, dense.dtype) == (weight.shape, torch.float32)
            assert solution.packed.level == level
            assert solution.packed.shape == tuple(weight.shape)
            assert solution.packed.bits == level.storage_bits(tuple(weight.shape))


def test_the_same_input_gives_the_same_bytes_and_is_left_alone(weights, statistics, case):
    again = solve(weights, statistics, case.levels, SOLVERS[case.solver])
    assert stored(again) == stored(solved(case))
    assert all(map(torch.equal, weights, make_weights()))
    hessian = make_statistics(case.known).hessian
    assert hessian is None or torch.equal(hessian, statistics.hessian)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_dense_is_the_identity_in_16_bits(weights, solver):
    found = solve(weights, make_statistics(True), [Dense()], solver)
    for weight, [solution] in zip(weights, found, strict=True):
        assert torch.equal(solution.packed.dense(), weight.bfloat16().float())
        assert solution.error == 0


def test_error_falls_as_storage_rises(weights, statistics, case):
    """By what is reported and by what is stored: the reported error may not be the only witness."""
    hessian = torch.eye(WIDTH) if statistics.hessian is None else statistics.hessian
    for weight, row in zip(weights, solved(case), strict=True):
        bits = [solution.packed.bits for solution in row]
        errors = [solution.error for solution in row]
        changes = [solution.packed.dense() - weight for solution in row]
        recomputed = [float(((change @ hessian) * change).sum()) for change in changes]
        assert bits == sorted(set(bits))
        assert errors == sorted(set(errors), reverse=True)
        assert recomputed == sorted(set(recomputed), reverse=True)


def test_together_is_as_good_as_apart(weights, statistics, case):
    """Modules of one input, and all levels of a family, are solved in one pass."""
    for weight, row in zip(weights, solved(case), strict=True):
        for level, solution in zip(case.levels, row, strict=True):
            [[alone]] = solve([weight], statistics, [level], SOLVERS[case.solver])
            assert solution.error == pytest.approx(alone.error, rel=0.02)
            if getattr(level, "low_rank", None) is not None:
                continue  # a low-rank part depends on all rows, so one changes all
            # A matrix product of other shape rounds otherwise: a tie may change the rest of a row.
            same = (solution.packed.dense() == alone.packed.dense()).all(1)
            assert int(same.sum()) >= len(weight) - 1


@pytest.mark.parametrize("known", [True, False], ids=["statistics", "no statistics"])
def test_levels_of_several_families_come_back_in_order(weights, known):
    mixed = [parse_level(key) for key in ("w4g64", "dense", "w2", "w3g32sym")]
    for row in solve(weights, make_statistics(known), mixed, Solver()):
        assert [solution.packed.level for solution in row] == mixed
