"""Products with unstructured sparse weights: kept values and one bit per element.

Never measured on a GPU. It saves memory; nothing says that it is faster than a dense product.
A kept element's place among the values is its block's offset, the bits set for the inputs before
it, and the bits below it in its own word; nothing else needs to be stored.
"""

from __future__ import annotations

# Triton's compiler reads the annotations of a kernel itself, and it has no type information.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

from autocompress_kernels.triton_kernels.gemm import store


@triton.jit
def bit_count(word):
    """Bits set in a uint32, as int32: no popcount instruction is reachable in the interpreter."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 63).to(tl.int32)


@triton.jit
def unpack(
    masks, offsets, values, first, blocks, columns, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Weights (32 * BLOCK_S, BLOCK_N) of superblock `first` and those after it."""
    block = first + tl.arange(0, BLOCK_S)
    k = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    column = tl.program_id(1) * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    inside = (block < blocks)[:, None, None] & (column < columns)[None, None, :]
    at = k[:, :, None] * columns + column[None, None, :]
    count = bit_count(tl.load(masks + at, mask=inside, other=0).to(tl.uint32, bitcast=True))
    at = block[:, None, None] * columns + column[None, None, :]
    place = tl.load(offsets + at, mask=inside, other=0) + tl.cumsum(count, 1) - count
    place = tl.reshape(place, (32 * BLOCK_S, BLOCK_N // 32, 1))
    place = tl.broadcast_to(place, (32 * BLOCK_S, BLOCK_N // 32, 32))
    place = tl.reshape(place, (32 * BLOCK_S, BLOCK_N))

    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = (n % 32).to(tl.uint32)[None, :]
    below = (tl.full((1, BLOCK_N), 1, tl.uint32) << lane) - 1
    k = first * 32 + tl.arange(0, 32 * BLOCK_S)
    inside = (k < blocks * 32)[:, None] & (n // 32 < columns)[None, :]
    at = k[:, None] * columns + (n // 32)[None, :]
    # Loaded again, from cache, in the shape of the result: spreading the words that were counted
    # would send four bytes per element through shared memory.
    word = tl.load(masks + at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    kept = ((word >> lane) & 1) != 0
    return tl.load(values + place + bit_count(word & below), mask=kept, other=0.0)


@triton.jit
def gemv_bitmask(
    x,  # (K,)
    masks,  # int32 (32 * superblocks, columns)
    offsets,  # int32 (superblocks, columns)
    values,  # bf16 or fp16 (kept,)
    bias,  # (N,), or None
    y,  # (parts, N)
    N,
    K,
    columns,  # blocks of 32 outputs
    parts,
    BLOCK_S: tl.constexpr,  # superblocks at a time
    BLOCK_N: tl.constexpr,  # a multiple of 32
):
    """Programs (1, outputs / BLOCK_N, parts), for one row of x."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    blocks = tl.cdiv(K, 32)
    acc = tl.zeros((32 * BLOCK_S, BLOCK_N), dtype=tl.float32)
    for first in range(part * BLOCK_S, blocks, parts * BLOCK_S):
        w = unpack(masks, offsets, values, first, blocks, columns, BLOCK_S, BLOCK_N)
        k = first * 32 + tl.arange(0, 32 * BLOCK_S)
        xs = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        acc += xs[:, None] * w.to(tl.float32)
    store(y, bias, tl.sum(acc, 0)[None, :], tl.zeros((1,), tl.int64), n, part, 1, N)


@triton.jit
def gemm_bitmask(
    x,  # (M, K)
    masks,  # int32 (32 * superblocks, columns)
    offsets,  # int32 (superblocks, columns)
    values,  # bf16 or fp16 (kept,)
    bias,  # (N,), or None
    y,  # (parts, M, N)
    M,
    N,
    K,
    columns,  # blocks of 32 outputs
    parts,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,  # superblocks at a time
    BLOCK_N: tl.constexpr,  # a multiple of 32
):
    """Programs (rows of x / BLOCK_M, outputs / BLOCK_N, parts)."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    blocks = tl.cdiv(K, 32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(part * BLOCK_S, blocks, parts * BLOCK_S):
        w = unpack(masks, offsets, values, first, blocks, columns, BLOCK_S, BLOCK_N)
        k = first * 32 + tl.arange(0, 32 * BLOCK_S)
        there = (m < M)[:, None] & (k < K)[None, :]
        xs = tl.load(x + m[:, None] * K + k[None, :], mask=there, other=0.0)
        acc = tl.dot(xs, w.to(xs.dtype), acc, input_precision="ieee")
    store(y, bias, acc, m, n, part, M, N)
