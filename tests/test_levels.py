"""Levels counted by hand, and the levels that cannot be."""

import pytest

from autocompress.errors import LevelError
from autocompress.levels import Joint, LowRank, Outliers, Prune, Quantize, parse_level

SHAPE = (48, 200)  # 9600 weights


@pytest.mark.parametrize(
    ("key", "level"),
    [
        ("s62.5", Prune(62.5)),
        ("2:4", Prune(50, 4)),
        ("1:8", Prune(87.5, 8)),
        ("r64", LowRank(64)),
        ("r12.5%", LowRank(percent=12.5)),
        ("r8w4g64sym", LowRank(8, factors=Quantize(4, 64, True))),
        ("2:4+w4g64", Joint((Prune(50, 4), Quantize(4, 64)))),
        ("w3g64+o1%", Joint((Outliers(1), Quantize(3, 64)))),
        ("w3g64 + r8w8", Joint((LowRank(8, factors=Quantize(8)), Quantize(3, 64)))),
    ],
)
def test_keys_mean_what_the_documentation_says(key, level):
    assert parse_level(key) == level


@pytest.mark.parametrize(
    ("key", "bits"),
    [
        ("s50", 9600 + 4800 * 16),
        ("s62.5", 9600 + 3600 * 16),
        ("s33.33", 9600 + (9600 - 3199) * 16),  # 3199.68 dropped, rounded down
        ("2:4", 2400 * 3 + 4800 * 16),  # six combinations
        ("1:4", 2400 * 2 + 2400 * 16),
        ("4:8", 1200 * 7 + 4800 * 16),  # seventy
        ("7:8", 1200 * 3 + 8400 * 16),
        ("1:2", 4800 * 1 + 4800 * 16),
        ("r10", 10 * (48 + 200) * 16),
        ("r25%", 9 * (48 + 200) * 16),  # 9600 / 248 = 38.7; a quarter is 9.7
        # The zeros of ten rows are padded to sixteen.
        ("r10w4", 10 * 48 * 4 + 48 * (16 + 4) + 10 * 200 * 4 + 10 * 16 + 16 * 4),
        ("s50+w4", 9600 + 4800 * 4 + 48 * (16 + 4)),
        ("2:4+w4g64sym", 2400 * 3 + 4800 * 4 + 48 * 4 * 16),
        ("o1%+w4", 96 * (16 + 8) + 48 * 8 + 9600 * 4 + 48 * (16 + 4)),
        ("r10+s50", 10 * (48 + 200) * 16 + 9600 + 4800 * 16),
        ("r10+s50+w4", 10 * (48 + 200) * 16 + 9600 + 4800 * 4 + 48 * (16 + 4)),
    ],
)
def test_storage_by_hand(key, bits):
    assert parse_level(key).storage_bits(SHAPE) == bits


def test_at_the_break_even_rank_factors_are_as_large_as_the_weight():
    assert LowRank(percent=100).storage_bits((64, 64)) == 64 * 64 * 16
    assert LowRank(percent=0.01).rank_of((64, 64)) == 1


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("s0", r"above 0 % and below 100 %\. Got 0 %\. Write 'dense'"),
        ("s100", r"above 0 % and below 100 %\. Got 100 %"),
        ("3:2", r"n of each m inputs, m one of \(2, 4, 8\) and 0 < n < m\. Got '3:2'"),
        ("0:4", "Got '0:4'"),
        ("4:4", "Got '4:4'"),
        ("3:6", "Got '3:6'"),
        ("r0", r"rank must be above 0\. Got 'r0'"),
        ("r0%", "rank must be above 0"),
        ("o0%+w3g64", r"above 0 % and at most 10 %\. Got 0 %"),
        ("o11%+w3g64", r"at most 10 %\. Got 11 %"),
        ("w3g64+w4g64", r"not repeat a part\. Got 'w3g64\+w4g64'"),
        ("s50+2:4", "not repeat a part"),
        ("r8+r4+w3g64", "not repeat a part"),
        ("o1%", r"outliers and a quantized part.*Got 'o1%'"),
        ("o1%+s50", "outliers and a quantized part"),
        ("o1%+s50+w3g64", "outliers and a quantized part"),
        ("r8+o1%", "outliers and a quantized part"),
        ("r8w7", "bits must be one of"),
    ],
)
def test_impossible_levels_say_why(key, message):
    with pytest.raises(LevelError, match=message):
        parse_level(key)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("2:4", (8, 30), r"inputs of a layer at 2:4 must be a multiple of 4\. Got 30"),
        ("r8+4:8+w4g64", (16, 12), r"at 4:8 must be a multiple of 8\. Got 12"),
        ("r9", (8, 30), r"at r9 must be at most 8, the full rank of 8 x 30\. Got 9"),
        ("r200%w4", (8, 30), r"must be at most 8, the full rank of 8 x 30\. Got 12"),
        ("r9+w3g64", (8, 30), "must be at most 8"),
    ],
)
def test_a_weight_that_cannot_take_a_level_says_why(key, shape, message):
    with pytest.raises(LevelError, match=message):
        parse_level(key).storage_bits(shape)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Prune(50, 3),
        lambda: Prune(60, 4),
        lambda: LowRank(),
        lambda: LowRank(4, 25),
        lambda: Joint((Quantize(4),)),
        lambda: Joint((LowRank(4), LowRank(4))),
    ],
)
def test_levels_made_without_a_key_are_checked_too(make):
    with pytest.raises(LevelError, match="must"):
        make()
