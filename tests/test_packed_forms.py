"""Stored forms of sparse weights, outliers and factors: by hand, read back, and damaged."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import DatabaseError
from autocompress.levels import parse_level
from autocompress.packed import Packed, dense_weight, pack, tensor_shapes
from autocompress.packed.outliers import pack_outliers
from autocompress.packed.sparse import (
    full_codes,
    pack_mask,
    pack_sparse,
    pack_sparse_codes,
    unpack_mask,
)


def bits(*values):
    return torch.tensor(values, dtype=torch.uint8)


def bf16(*values):
    return torch.tensor(values, dtype=torch.bfloat16)


def test_a_mask_has_one_bit_for_each_weight_the_lowest_first():
    tensors = {"mask": bits(0b10001, 0b10), "values": bf16(1, 2, 3)}
    expected = [[1, 0, 0, 0, 2], [0, 0, 0, 0, 3]]
    dense = dense_weight(parse_level("s70"), (2, 5), tensors)
    assert dense.tolist() == expected


@pytest.mark.parametrize("key", ["1:2", "1:4", "2:4", "3:4", "2:8", "4:8", "7:8"])
def test_a_group_is_the_place_of_its_kept_inputs_among_all_combinations(key):
    level = parse_level(key)
    ways = list(combinations(range(level.of), level.kept_of))
    keep = torch.zeros(len(ways), level.of, dtype=torch.bool)
    for row, places in zip(keep, ways, strict=True):
        row[list(places)] = True
    stream = pack_mask(level, keep)
    assert torch.equal(stream, pack(torch.arange(len(ways)), level.index_bits))
    assert torch.equal(unpack_mask(level, tuple(keep.shape), stream), keep)


@st.composite
def sparse_weights(draw):
    level = parse_level(draw(st.sampled_from(["s10", "s50", "s90", "2:4", "1:8", "4:8", "1:2"])))
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 6)) * 8
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    score = torch.rand(rows, width, generator=generator)
    from autocompress.operators.masks import keep_largest

    return level, score.bfloat16().float(), keep_largest(score, level)


@given(sparse_weights())
def test_kept_weights_come_back_and_the_others_are_zero(drawn):
    level, weight, keep = drawn
    packed = pack_sparse(level, weight, keep)
    assert torch.equal(packed.dense(), weight * keep)
    assert torch.equal(unpack_mask(level, packed.shape, packed.tensors["mask"]), keep)
    assert packed.bits == level.storage_bits(packed.shape)


@given(sparse_weights(), st.sampled_from(["w2g8", "w3", "w4g16", "w8g8sym", "w5g24"]))
def test_kept_codes_come_back_and_dropped_ones_stand_for_zero(drawn, codes_key):
    prune, score, keep = drawn
    level = parse_level(f"{prune}+{codes_key}")
    quantize, shape = level.quantize, tuple(score.shape)
    grid = (shape[0], quantize.groups(shape[1]))
    codes = (score * 997).to(torch.int64) % (1 << quantize.bits)
    scales = torch.full(grid, 0.5)
    zeros = torch.arange(grid[0] * grid[1]).view(grid) % (1 << quantize.bits)
    packed = pack_sparse_codes(level, codes, scales, zeros, keep)
    before = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    if quantize.symmetric:
        zeros = torch.full(grid, 1 << (quantize.bits - 1))
    index = torch.arange(shape[1]) // (quantize.group_size or shape[1])
    expected = torch.where(keep, (codes - zeros[:, index]) * 0.5, 0.0)
    assert torch.equal(packed.dense(), expected)
    full = full_codes(level, shape, packed.tensors).long()
    assert torch.equal(full, torch.where(keep, codes, zeros[:, index]))
    assert packed.bits == level.storage_bits(shape)
    assert all(torch.equal(before[name], tensor) for name, tensor in packed.tensors.items())


def test_reading_a_weight_of_one_input_leaves_its_tensors_alone():
    """A group of one weight: its zero is where its code belongs."""
    level, keep = parse_level("s50+w8"), torch.tensor([[True], [False], [True]])
    codes, zeros = torch.tensor([[7], [8], [9]]), torch.tensor([[1], [2], [3]])
    packed = pack_sparse_codes(level, codes, torch.ones(3, 1), zeros, keep)
    for _ in range(2):
        assert packed.dense().tolist() == [[6], [0], [6]]


def test_outliers_stand_in_their_places_and_their_codes_for_zero():
    level = parse_level("o10%+w2sym")
    codes, weight = torch.tensor([[0, 1, 2, 3, 0], [3, 3, 3, 3, 3]]), torch.zeros(2, 5)
    weight[1, 3] = 7.5
    scales = torch.tensor([[1.0], [0.5]])
    packed = pack_outliers(level, codes, scales, scales, weight, weight != 0)
    assert packed.dense().tolist() == [[-2, -1, 0, 1, -2], [0.5, 0.5, 0.5, 7.5, 0.5]]
    assert packed.tensors["counts"].tolist() == [[0], [1]]
    assert packed.tensors["places"].tolist() == [3]
    alone = dense_weight(parse_level("w2sym"), (2, 5), packed.tensors)
    assert alone[1].tolist() == [0.5, 0.5, 0.5, 0, 0.5]  # a product may add both parts
    assert packed.bits == level.storage_bits((2, 5))


@given(st.integers(1, 5), st.integers(1, 700), st.integers(0, 99))
def test_outliers_may_stand_anywhere(rows, width, seed):
    level = parse_level("o10%+w3sym")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator).bfloat16().float()
    chosen = torch.zeros(rows * width, dtype=torch.bool)
    spots = torch.randperm(rows * width, generator=generator)
    chosen[spots[: level.outliers.count((rows, width))].sort().values] = True
    chosen = chosen.view(rows, width)
    scales = torch.ones(rows, 1)
    codes = torch.full((rows, width), 7)
    packed = pack_outliers(level, codes, scales, scales, weight, chosen)
    assert torch.equal(packed.dense(), torch.where(chosen, weight, 3.0))
    assert packed.bits == level.storage_bits((rows, width))


def test_a_stretch_full_of_outliers_and_one_out_of_place():
    level = parse_level("o10%+w3sym")
    chosen = torch.zeros(1, 2550, dtype=torch.bool)
    chosen[0, 510:765] = True  # the whole third stretch
    weight = torch.arange(2550.0).view(1, -1)
    codes = torch.full((1, 2550), 4)
    packed = pack_outliers(level, codes, torch.ones(1, 1), torch.ones(1, 1), weight, chosen)
    assert packed.tensors["counts"].tolist() == [[0, 0, 255, *[0] * 7]]
    assert torch.equal(packed.dense(), torch.where(chosen, weight.bfloat16().float(), 0.0))
    counts = torch.zeros(1, 10, dtype=torch.uint8)
    counts[0, 9] = 255
    places = torch.full((255,), 255, dtype=torch.uint8)
    damaged = {**packed.tensors, "counts": counts, "places": places}
    with pytest.raises(DatabaseError, match=r"in 1 x 2550 weights\. Got 255 up to column 2550"):
        dense_weight(level, (1, 2550), damaged)


def test_a_low_rank_part_is_added():
    level = parse_level("r1+s50")
    tensors = {
        "left": bf16(1, 2).view(2, 1),
        "right": bf16(10, 20).view(1, 2),
        "mask": bits(0b0110),
        "values": bf16(0.5, 0.25),
    }
    assert Packed(level, (2, 2), tensors).dense().tolist() == [[10, 20.5], [20.25, 40]]


@pytest.mark.parametrize(
    "key", ["s50", "2:4", "r2", "r2w4", "s50+w4", "2:4+w8sym", "o5%+w3", "r2+o5%+w3", "r2w8+s50"]
)
def test_before_a_file_is_read_a_weight_is_zeros(key):
    """Transformers may look at a weight of a module that is still empty."""
    sizes = tensor_shapes(parse_level(key), (8, 16))
    empty = {name: torch.zeros(size, dtype=kind) for name, (kind, size) in sizes.items()}
    dense = dense_weight(parse_level(key), (8, 16), empty)
    assert dense.shape == (8, 16) and not dense.any()


@pytest.mark.parametrize(
    ("key", "name", "value", "message"),
    [
        ("s50", "mask", 255, r"s50 must keep at most 64 weights\. Got 128.*write it again"),
        ("2:4", "mask", 255, r"2:4 must keep one of 6 combinations\. Got number 7"),
        ("s50+w4", "mask", 255, "must keep at most 64 weights"),
        ("o5%+w3", "counts", 1, r"6 outliers must lie in 8 x 16 weights\. Got 8 up to column 0"),
    ],
)
def test_damaged_parts_are_named(key, name, value, message):
    sizes = tensor_shapes(parse_level(key), (8, 16))
    tensors = {name: torch.zeros(size, dtype=kind) for name, (kind, size) in sizes.items()}
    tensors[name] = torch.full(tensors[name].shape, value).to(tensors[name].dtype)
    with pytest.raises(DatabaseError, match=message):
        dense_weight(parse_level(key), (8, 16), tensors)
