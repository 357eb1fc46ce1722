"""What every level family must keep; a new one is tested by joining `LEVELS` and `EXAMPLES`."""

import pytest
import torch

from autocompress.errors import LevelError
from autocompress.levels import LEVELS, Dense, Quantize, parse_level
from autocompress.operators import Solver, Statistics, solve

EXAMPLES = [Dense()] + [
    Quantize(bits, group, symmetric)
    for bits in Quantize.WIDTHS
    for group in (None, 32, 64, 128)
    for symmetric in (False, True)
]
SHAPES = [(1, 1), (3, 100), (64, 64), (48, 200)]


def test_every_family_has_examples():
    assert {type(level) for level in EXAMPLES} == set(LEVELS)


@pytest.mark.parametrize("level", EXAMPLES, ids=str)
def test_key_round_trip_hash_and_equality(level):
    again = parse_level(str(level))
    assert again == level
    assert hash(again) == hash(level)
    assert [other for other in EXAMPLES if other == level] == [level]


@pytest.mark.parametrize("level", EXAMPLES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_storage_is_what_is_stored(level, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ((solution,),) = solve([weight], Statistics(None, 0), [level], Solver())
    assert solution.packed.bits == level.storage_bits(shape)
    assert level.storage_bits(shape) % 8 == 0


@pytest.mark.parametrize("shape", [(64, 64), (48, 256)], ids=str)
def test_storage_grows_with_bits_and_falls_with_the_group(shape):
    for group in (32, 64, None):
        for symmetric in (False, True):
            bits = [Quantize(b, group, symmetric).storage_bits(shape) for b in Quantize.WIDTHS]
            assert bits == sorted(set(bits))
            assert bits[-1] < Dense().storage_bits(shape)
    for bits in Quantize.WIDTHS:
        sizes = [Quantize(bits, group).storage_bits(shape) for group in (None, 64, 32)]
        assert sizes == sorted(sizes)
        assert Quantize(bits, 32, True).storage_bits(shape) < sizes[-1]


@pytest.mark.parametrize(
    "key", ["", "w", "w7", "w1g64", "w3g", "w3g7", "w3g12", "w3g64asym", "dense2", "W3G64", "w03x"]
)
def test_other_keys_are_refused(key):
    with pytest.raises(LevelError, match="must"):
        parse_level(key)
