"""What every level family must keep; a new one is tested by joining `LEVELS` and `EXAMPLES`."""

import pytest
import torch

from autocompress.errors import LevelError
from autocompress.levels import LEVELS, Dense, Quantize, parse_level
from autocompress.operators import Solver, Statistics, solve
from autocompress.packed import tensor_shapes

QUANTIZED = [
    Quantize(bits, group, symmetric)
    for bits in Quantize.WIDTHS
    for group in (None, 32, 64, 128)
    for symmetric in (False, True)
]
OTHERS = (
    *("s10", "s50", "s62.5", "s99", "1:2", "2:4", "1:4", "4:8", "7:8"),
    *("r1", "r64", "r12.5%", "r25%", "r100%", "r8w4g64", "r50%w8sym", "r150%w2g32"),
    *("s50+w4g64", "2:4+w4g64", "4:8+w8sym", "s90+w2", "o1%+w3g64", "o0.05%+w4sym", "o10%+w2g32"),
    *("r8+w3g64", "r8+s50", "r25%+2:4", "r2w8+w3g64", "r8+2:4+w4g64", "r3w4+o1%+w3g64"),
    *("drop", "unread", "width75%", "width12.5%of2", "width50%+w4g64", "width75%of2+w2sym"),
    *("rows75%", "rows50%of2+w8sym", "rows12.5%+w4g64"),
)
GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ3_S")
EXAMPLES = [Dense(), *QUANTIZED, *map(parse_level, (*OTHERS, *GGUF))]
SHAPES = [(1, 1), (3, 100), (64, 64), (48, 200), (2, 256)]
RISING = (  # keys of one family, from the smallest
    ("s99", "s90", "s62.5", "s50", "s10", "dense"),
    ("1:8", "1:4", "2:4", "6:8", "dense"),
    ("r1", "r2", "r25%", "r50%", "r99%", "dense"),
    ("r25%w4g64", "r50%w4g64", "r50%w8g64", "r50%"),
    ("s90+w4g64", "s50+w4g64", "s50+w6g64", "s10+w8g64"),
    ("2:4+w2g64", "2:4+w4g64", "6:8+w4g64", "6:8+w4g32"),
    ("w3g64", "o0.5%+w3g64", "o1%+w3g64", "o1%+w4g64", "r4+o1%+w4g64"),
    ("w3g64", "r2w4+w3g64", "r2+w3g64", "r6+w3g64", "r6+w4g64"),
    ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "dense"),
    ("width10%", "width50%", "width75%", "dense"),
    ("width25%+w4g64", "width75%+w4g64", "width75%+w8g64", "width75%"),
)


def test_every_family_has_examples():
    assert {type(level) for level in EXAMPLES} == set(LEVELS)


@pytest.mark.parametrize("level", EXAMPLES, ids=str)
def test_key_round_trip_hash_and_equality(level):
    again = parse_level(str(level))
    assert again == level
    assert hash(again) == hash(level)
    assert [other for other in EXAMPLES if other == level] == [level]


@pytest.mark.parametrize("key", [*OTHERS, *GGUF])
def test_a_key_is_written_in_one_way(key):
    assert str(parse_level(key)) == key
    assert parse_level("+".join(reversed(key.split("+")))) == parse_level(key)


@pytest.mark.parametrize("level", EXAMPLES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_storage_is_what_is_stored(level, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        bits = level.storage_bits(shape)
    except LevelError as error:  # a rank above full, n:m that does not divide: everywhere the same
        assert "Got" in str(error)
        with pytest.raises(LevelError):
            level.parameters(shape)
        with pytest.raises(LevelError):
            tensor_shapes(level, shape)
        with pytest.raises(LevelError):
            solve([weight], Statistics(None, 0), [level], Solver())
        return
    ((solution,),) = solve([weight], Statistics(None, 0), [level], Solver())
    packed = solution.packed
    assert packed.bits == bits
    assert bits % 8 == 0
    assert (level.parameters(shape) > 0) == (bits > 0)
    stored = {name: (t.dtype, tuple(t.shape)) for name, t in packed.tensors.items()}
    assert stored == tensor_shapes(level, shape)


@pytest.mark.parametrize("keys", RISING, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (48, 256)], ids=str)
def test_storage_rises_with_what_is_kept(keys, shape):
    bits = [parse_level(key).storage_bits(shape) for key in keys]
    assert bits == sorted(set(bits))


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
    "key",
    [
        *("", "w", "w7", "w1g64", "w3g", "w3g7", "w3g12", "w3g64asym", "dense2", "W3G64", "w03x"),
        *("s", "s50%", "s50.125", "2:", ":4", "24", "r", "r%", "r8g64", "r8dense", "o1%", "o1"),
        *("Q4", "Q4_2", "q4_k", "Q4_K_M", "Q4_K+r8", "BF16"),
        *("width0%", "width100%", "width75", "width%", "width50.125%", "width75%of0", "wide75%"),
        *("width75%+s50", "width75%+w4+w8", "width75%+width50%", "rows100%", "width75%+dense"),
        *("+", "w3g64+", "+w3g64", "r8++w3g64", "dense+w3g64", "r8+dense", "r8+x"),
    ],
)
def test_other_keys_are_refused(key):
    with pytest.raises(LevelError, match="must"):
        parse_level(key)
