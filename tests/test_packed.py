"""Packed weights: the bit stream is what its documentation says, and reads back exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autocompress.levels import Dense, Quantize, packed_bytes
from autocompress.packed import Packed, dequantize, pack, pack_quantized, tensor_shapes, unpack

SHAPES = [(1, 1), (1, 8), (3, 7), (5, 64), (2, 65), (7, 63), (4, 160), (9, 129), (64, 24)]
SIZES = (None, 8, 32, 64, 128)
LEVELS = [
    Quantize(bits, size, symmetric)
    for bits in Quantize.WIDTHS
    for size in SIZES
    for symmetric in (False, True)
]


@st.composite
def streams(draw):
    bits = draw(st.sampled_from(Quantize.WIDTHS))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))


def random_weight(level, shape, seed=0):
    """Any codes, scales and zeros, and their packed form."""
    generator = torch.Generator().manual_seed(seed)
    grid = (shape[0], level.groups(shape[1]))
    codes = torch.randint(1 << level.bits, shape, generator=generator)
    scales = (torch.rand(grid, generator=generator) + 0.01).half()
    zeros = torch.randint(1 << level.bits, grid, generator=generator)
    return codes, scales, zeros, pack_quantized(level, codes, scales, zeros)


@given(streams())
def test_unpack_undoes_pack(stream):
    bits, codes = stream
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert unpack(packed, bits, len(codes)).tolist() == codes


@given(streams())
def test_bits_are_in_the_documented_order(stream):
    bits, codes = stream
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    expected = number.to_bytes(packed_bytes(len(codes), bits), "little")
    assert bytes(pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist()) == expected


def test_codes_may_have_any_shape_and_integer_type():
    codes = torch.arange(24).view(2, 3, 4) % 8
    assert torch.equal(pack(codes, 3), pack(codes.flatten().to(torch.uint8), 3))


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_stored_bits_are_what_the_level_says(level):
    for shape in SHAPES:
        _, _, _, packed = random_weight(level, shape)
        assert packed.bits == level.storage_bits(shape), shape
        stored = {name: (t.dtype, tuple(t.shape)) for name, t in packed.tensors.items()}
        assert stored == tensor_shapes(level, shape), shape


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_weights_are_stored_in_16_bits(shape):
    packed = Packed(Dense(), shape, {"weight": torch.randn(shape, dtype=torch.bfloat16)})
    assert packed.bits == Dense().storage_bits(shape)
    assert packed.dense().dtype == torch.float32
    assert torch.equal(packed.dense(), packed.tensors["weight"].float())


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_dense_weight_is_scale_times_code_minus_zero(level):
    for shape in SHAPES:
        codes, scales, zeros, packed = random_weight(level, shape)
        if level.symmetric:
            zeros = torch.full_like(zeros, 2 ** (level.bits - 1))
        size = level.group_size or shape[1]
        per_code = [
            grid.double().repeat_interleave(size, 1)[:, : shape[1]] for grid in (scales, zeros)
        ]
        found = packed.dense()
        assert found.dtype == torch.float32
        expected = (per_code[0] * (codes - per_code[1])).float()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_the_highest_code_survives_in_every_place():
    for bits in Quantize.WIDTHS:
        for count in range(1, 18):
            codes = torch.full((count,), (1 << bits) - 1)
            assert torch.equal(unpack(pack(codes, bits), bits, count).long(), codes)


def test_dequantize_reads_a_file_as_it_was_written():
    """A weight by hand: two groups, the second one short."""
    level = Quantize(2, 8)
    tensors = {
        "codes": torch.tensor([0b11100100, 0b00000000, 0b00001110, 0], dtype=torch.uint8),
        "scales": torch.tensor([[0.5, 2.0]], dtype=torch.float16),
        "zeros": torch.tensor([0b1001, 0], dtype=torch.uint8),  # 1, then 2
    }
    expected = [-0.5, 0.0, 0.5, 1.0, -0.5, -0.5, -0.5, -0.5, 0.0, 2.0]
    assert dequantize(level, (1, 10), tensors).tolist() == [expected]
