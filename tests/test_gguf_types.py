"""GGUF types: codes and scales are where the format has them, and GPTQ solves on their grid."""

import sys

import numpy as np
import pytest
import torch

from autocompress.database import LevelDatabase, database_identity
from autocompress.errors import ConfigError, DatabaseError, LevelError
from autocompress.levels import GgufType, parse_level
from autocompress.levels.gguf import BLOCKS
from autocompress.operators import Solver, Statistics, solve
from autocompress.operators.gguf import column_importance, encode, solved_importance
from autocompress.packed.gguf import LAYOUTS, as_blocks, gguf_dense

ROWS, WIDTH = 24, 512
LATTICES = [name for name in BLOCKS if name not in LAYOUTS]


@pytest.fixture(scope="module")
def weight():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, WIDTH, generator=generator)
    weight[3] = 0  # scales of zero
    return weight * torch.rand(ROWS, 1, generator=generator)


@pytest.fixture(scope="module")
def statistics():
    x = torch.randn(2000, WIDTH, generator=torch.Generator().manual_seed(1))
    x[:, 1:] += x[:, :-1]
    x *= torch.linspace(0.1, 3, WIDTH)
    x[:, 7] = 0  # never active
    return Statistics(x.T @ x / 2000, 2000)


def output_error(dense, weight, statistics):
    change = dense - weight
    return float(((change @ statistics.hessian) * change).sum())


@pytest.mark.parametrize("name", BLOCKS)
def test_sizes_are_those_of_the_gguf_package(name):
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    assert BLOCKS[name] == GGML_QUANT_SIZES[GGMLQuantizationType[name]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_codes_and_scales_are_what_the_gguf_package_reads(name, weight, statistics):
    level, layout = GgufType(name), LAYOUTS[name]
    encoded = encode(weight, level, column_importance(statistics))
    blocks, length = as_blocks(level, encoded), BLOCKS[name][0]
    codes = layout.codes(blocks, length)
    assert codes.min() >= layout.low
    assert codes.max() <= layout.high
    scale, offset = (np.repeat(g, length // g.shape[1], 1) for g in layout.grid(blocks))
    values = codes if layout.values is None else np.array(layout.values)[codes]
    ours = (scale * values + offset).reshape(ROWS, WIDTH)
    theirs = gguf_dense(level, {"blocks": torch.from_numpy(encoded)}).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_codes_are_written_where_they_are_read(name, weight):
    level, layout, length = GgufType(name), LAYOUTS[name], BLOCKS[name][0]
    blocks = as_blocks(level, encode(weight, level, None))
    assert np.array_equal(layout.with_codes(blocks, layout.codes(blocks, length)), blocks)
    rng = np.random.default_rng(0)
    codes = rng.integers(layout.low, layout.high + 1, (len(blocks), length)).astype(np.uint8)
    written = layout.with_codes(blocks, codes)
    assert np.array_equal(layout.codes(written, length), codes)
    for before, after in zip(layout.grid(blocks), layout.grid(written), strict=True):
        assert np.array_equal(before, after)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gptq_keeps_the_scales_and_lowers_the_error(name, weight, statistics):
    level, layout = GgufType(name), LAYOUTS[name]
    [[solved]] = solve([weight], statistics, [level], Solver())
    [[encoded]] = solve([weight], statistics, [level], Solver(method="rtn"))
    solved_bytes, encoded_bytes = (s.packed.tensors["blocks"].numpy() for s in (solved, encoded))
    importance = column_importance(statistics)
    assert np.array_equal(encoded_bytes, encode(weight, level, importance))
    scaled = encode(weight, level, solved_importance(statistics, Solver()))
    grids = (layout.grid(as_blocks(level, part)) for part in (solved_bytes, scaled))
    for before, after in zip(*grids, strict=True):
        assert np.array_equal(before, after)
    errors = [output_error(s.packed.dense(), weight, statistics) for s in (solved, encoded)]
    assert errors[0] < 0.9 * errors[1]
    assert not solved.packed.dense()[3].any()


def test_importance_is_the_mean_of_what_is_lost_with_and_without_repair(statistics):
    """Of independent inputs nothing is repaired: the Hessian's diagonal stays."""
    alone = Statistics(torch.diag(torch.arange(1.0, 65)), tokens=1)
    found = solved_importance(alone, Solver(damping=1e-9))
    torch.testing.assert_close(found / found[0], torch.arange(1.0, 65), rtol=1e-4, atol=0)
    plain, solved = column_importance(statistics), solved_importance(statistics, Solver())
    assert not torch.allclose(solved / solved.mean(), plain / plain.mean(), rtol=0.1)


@pytest.mark.parametrize("name", LATTICES)
def test_lattices_are_as_the_encoder_writes_them(name, weight, statistics):
    level = GgufType(name)
    [[solved]] = solve([weight], statistics, [level], Solver())
    expected = encode(weight, level, column_importance(statistics))
    assert np.array_equal(solved.packed.tensors["blocks"].numpy(), expected)
    assert 0 < solved.error < 0.5


def test_levels_are_solved_together_as_alone(weight, statistics, monkeypatch):
    from autocompress.operators import gguf

    levels = [parse_level(name) for name in ("Q3_K", "IQ4_XS", "Q8_0")]
    [together] = solve([weight], statistics, levels, Solver())
    monkeypatch.setattr(gguf, "ELEMENTS", 1)  # one level at a time
    [apart] = solve([weight], statistics, levels, Solver())
    for one, other in zip(together, apart, strict=True):
        assert one.error == pytest.approx(other.error, rel=0.02)


def test_importance_counts(weight, statistics):
    level = GgufType("Q3_K")
    importance = column_importance(statistics)
    errors = [
        output_error(
            gguf_dense(level, {"blocks": torch.from_numpy(encode(weight, level, given))}),
            weight,
            statistics,
        )
        for given in (importance, None)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("name", "width", "advice"), [("Q4_K", 576, "Q4_0"), ("Q4_0", 48, "dense")]
)
def test_a_width_that_blocks_do_not_divide_is_refused(name, width, advice):
    with pytest.raises(LevelError, match=rf"multiple of {BLOCKS[name][0]}. Got {width}.*{advice}"):
        GgufType(name).storage_bits((8, width))


def test_without_the_encoder_it_says_what_to_install(weight, monkeypatch):
    monkeypatch.setitem(sys.modules, "libgguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'autocompress\[gguf\]'"):
        solve([weight], Statistics(None, 0), [GgufType("Q4_K")], Solver())


def test_a_database_of_an_earlier_rule_for_scales_is_refused(tmp_path):
    levels = {parse_level("Q4_K"), parse_level("w4g64")}
    shared = ("model", np.zeros((1, 4)), parse_level("Q4_K"))
    of = lambda solver, levels: database_identity(*shared, solver, "float32", levels)  # noqa: E731
    now = of(Solver(), levels)
    assert of(Solver(), levels - {parse_level("Q4_K")}) == database_identity(
        *shared, Solver(), "float32"
    )  # others stay the same database
    assert of(Solver(method="rtn"), levels)["solver"] == Solver(method="rtn").identity()
    LevelDatabase(tmp_path, {**now, "solver": Solver().identity()})._save()
    with pytest.raises(DatabaseError, match=r"another solver GgufType\."):
        LevelDatabase.open(tmp_path, now)
    LevelDatabase(tmp_path, now)._save()
    assert LevelDatabase.open(tmp_path, now).identity == now
    old = {**now, "versions": {**now["versions"], "libgguf": "0.1"}}
    with pytest.raises(DatabaseError, match=r"another versions libgguf\."):
        LevelDatabase.open(tmp_path, old)
