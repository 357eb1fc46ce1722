"""Dequantizing matrix products: y = x W^T + bias for packed W. Never measured on a GPU.

`gemv_quantized` is for one row of x: products stay in the lanes that unpacked the codes until the
end. `gemm_quantized` is for more rows and feeds tensor cores, for which 2 rows cost what 16 do.
Both multiply x by `code - zero`, an integer that bfloat16, float16 and float32 all hold exactly,
and sum in float32: a weight is never rounded to a narrower type.

The inputs are divided among `parts` programs, each writing its own slice of `y`; summing the slices
afterwards, rather than with atomics, gives the same result every time.
"""

from __future__ import annotations

# Triton's compiler reads the annotations of a kernel itself, and it has no type information.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

# A float32 with this bit pattern is 2**23, and the code in its lowest bits adds to it: no
# conversion instruction, which would run at a quarter of the rate, and subtraction is exact.
MAGIC_BITS = tl.constexpr(0x4B000000)
MAGIC = tl.constexpr(8388608.0)


@triton.jit
def centre(zeros, at, inside, BITS: tl.constexpr):
    """MAGIC + zero, to be subtracted from codes in MAGIC_BITS."""
    if zeros is None:
        return MAGIC + (1 << (BITS - 1))
    else:
        return MAGIC + tl.load(zeros + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def store(y, bias, acc, m, n, part, M, N):
    """Write the sums of one part, the first with the bias."""
    if bias is not None:
        extra = tl.load(bias + n, mask=n < tl.where(part == 0, N, 0), other=0.0).to(tl.float32)
        acc += extra[None, :]
    at = (part.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def plane(words, first, n, blocks, stride, BITS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Codes (32 * BLOCK_S, BLOCK_N) of one plane, of superblock `first` and those after it."""
    row = first * BITS + tl.arange(0, BLOCK_S * BITS)
    # Up to the padded outputs, so that the mask does not break wide loads.
    inside = (row < blocks * BITS)[:, None] & (n < stride)[None, :]
    loaded = tl.load(words + row[:, None] * stride + n[None, :], mask=inside, other=0)
    shifts = tl.arange(0, 32 // BITS) * BITS
    codes = (loaded[:, None, :] >> shifts[None, :, None]) & ((1 << BITS) - 1)
    return tl.reshape(codes, (32 * BLOCK_S, n.shape[0]))


@triton.jit
def gemv_quantized(
    x,  # (K,)
    low,  # int32 (LOW * superblocks, stride)
    high,  # int32 (HIGH * superblocks, stride), or None
    scales,  # fp16 (groups, stride)
    zeros,  # uint8 (groups, stride), or None
    bias,  # (N,), or None
    y,  # (parts, N)
    N,
    K,
    stride,
    group,
    parts,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_S: tl.constexpr,  # superblocks at a time
    BLOCK_N: tl.constexpr,
):
    """Programs (1, outputs / BLOCK_N, parts), for one row of x."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    blocks = tl.cdiv(K, 32)
    acc = tl.zeros((BLOCK_S, 32, BLOCK_N), dtype=tl.float32)
    for first in range(part * BLOCK_S, blocks, parts * BLOCK_S):
        codes = plane(low, first, n, blocks, stride, LOW, BLOCK_S)
        if HIGH > 0:
            codes |= plane(high, first, n, blocks, stride, HIGH, BLOCK_S) << LOW
        codes = tl.reshape(codes, (BLOCK_S, 32, BLOCK_N))
        block = first + tl.arange(0, BLOCK_S)
        inside = ((block < blocks)[:, None] & (n < stride)[None, :])[:, None, :]
        at = (block * 32 // group)[:, None, None] * stride + n[None, None, :]
        zero = centre(zeros, at, inside, LOW + HIGH)
        w = (codes | MAGIC_BITS).to(tl.float32, bitcast=True) - zero
        scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
        k = block[:, None] * 32 + tl.arange(0, 32)[None, :]
        xs = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        acc += xs[:, :, None] * (w * scale)
    store(y, bias, tl.sum(tl.sum(acc, 1), 0)[None, :], tl.zeros((1,), tl.int64), n, part, 1, N)


@triton.jit
def gemm_quantized(
    x,  # (M, K)
    low,  # int32 (LOW * superblocks, stride)
    high,  # int32 (HIGH * superblocks, stride), or None
    scales,  # fp16 (groups, stride)
    zeros,  # uint8 (groups, stride), or None
    bias,  # (N,), or None
    y,  # (parts, M, N)
    M,
    N,
    K,
    stride,
    group,
    parts,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,  # superblocks at a time, all in one group
    BLOCK_N: tl.constexpr,
):
    """Programs (rows of x / BLOCK_M, outputs / BLOCK_N, parts).

    Rows of x vary fastest, so that programs that read the same weights run at the same time.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    blocks = tl.cdiv(K, 32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(part * BLOCK_S, blocks, parts * BLOCK_S):
        codes = plane(low, first, n, blocks, stride, LOW, BLOCK_S)
        if HIGH > 0:
            codes |= plane(high, first, n, blocks, stride, HIGH, BLOCK_S) << LOW
        at = (first * 32 // group) * stride + n[None, :]
        inside = (n < stride)[None, :]
        zero = centre(zeros, at, inside, LOW + HIGH)
        w = (codes | MAGIC_BITS).to(tl.float32, bitcast=True) - zero
        k = first * 32 + tl.arange(0, 32 * BLOCK_S)
        there = (m < M)[:, None] & (k < K)[None, :]
        xs = tl.load(x + m[:, None] * K + k[None, :], mask=there, other=0.0)
        scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
        acc += tl.dot(xs, w.to(xs.dtype), input_precision="ieee") * scale
    store(y, bias, acc, m, n, part, M, N)
