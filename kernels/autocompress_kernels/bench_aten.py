"""PyTorch's own kernels as cases: rivals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress_kernels.bench_cases import (
    BANK,
    RIVAL_LIMIT,
    Case,
    Copies,
    Label,
    Shape,
    Turn,
    Weight,
    bank_rows,
    error,
    generator,
    is_cold,
    random_input,
)
from autocompress_kernels.bench_native import LOOKUPS, TABLE
from autocompress_kernels.memory import arena

GROUP = 64  # inputs per scale of the 4-bit kernel
BF16, F32 = torch.bfloat16, torch.float32
Parts = tuple[object, ...]  # of one copy of a weight, in the order of the arguments behind x


class AtenWeight:
    """One weight in many copies.

    Args:
        kernel, bits: of its label.
        dtype: of x.
        function: called with x and the parts of a copy.
        copies: the parts of each.
        size: bytes of one.
        dense: (rows of the bank, width), what it stands for.
        rows: of the whole weight.
    """

    def __init__(
        self,
        kernel: str,
        bits: int,
        dtype: torch.dtype,
        function: Callable[..., Tensor],
        copies: Sequence[Parts],
        size: int,
        dense: Tensor,
        rows: int,
    ) -> None:
        self.kernel, self.bits, self.dtype, self.function = kernel, bits, dtype, function
        self.copies, self.size, self.dense, self.rows = copies, size, dense, rows
        self.turn = Turn(len(copies))

    def cases(self, m: int, threads: int) -> list[Case]:
        x = random_input(m, self.dense.shape[1]).to(self.dtype)
        calls = [[(x, *parts)] for parts in self.copies]

        def check() -> tuple[float, float]:
            wanted = (x.double() @ self.dense.double().T)[:, bank_rows(self.rows)]
            return error(self.function(*calls[-1][0]), wanted), 0.0

        mode = "bf16" if self.dtype == BF16 else "fp32"
        return [
            Case(
                label=Label("aten", self.kernel, self.bits, mode),
                bytes=self.size,
                function=self.function,
                copies=calls,
                turn=self.turn,
                check=check,
                limits=(RIVAL_LIMIT, 0.0),
                cold=is_cold(self.size),
                threads=threads,
            )
        ]


class PrepackedWeight:
    """A bf16 weight in the order that oneDNN likes best for a number of rows of x."""

    def __init__(self, shape: Shape, copies: Copies) -> None:
        self.bank, self.copies = _bank(shape).to(BF16), copies
        self.rows = shape[0]
        self._packed: tuple[int, AtenWeight] | None = None

    def cases(self, m: int, threads: int) -> list[Case]:
        if self._packed is None or self._packed[0] != m:
            self._packed = None  # frees the copies for the last one
            self._packed = m, self._pack(m)
        return self._packed[1].cases(m, threads)

    def _pack(self, m: int) -> AtenWeight:
        whole = self.bank[bank_rows(self.rows)]
        pack = torch.ops.mkldnn._reorder_linear_weight
        rest: Parts = (None, "none", [], "")  # no bias, no operation behind
        copies = [(pack(whole, m), *rest) for _ in range(self.copies(whole.nbytes))]
        function = torch.ops.mkldnn._linear_pointwise.default
        return AtenWeight(
            "mkldnn prepacked", 16, BF16, function, copies, whole.nbytes, self.bank, self.rows
        )


class TableWeight:
    """Look-ups in a bf16 table."""

    def __init__(self, shape: Shape, copies: Copies) -> None:
        self.bank, self.rows = _bank(shape).to(BF16), shape[0]
        whole = self.bank[bank_rows(self.rows)]
        self.copies = arena([whole] * copies(whole.nbytes))

    def cases(self, m: int, threads: int) -> list[Case]:
        size = m * self.bank[0].nbytes
        rows = torch.randint(self.rows, (LOOKUPS, m), generator=generator(m))
        calls = [[(self.copies[i % len(self.copies)], line)] for i, line in enumerate(rows)]

        def check() -> tuple[float, float]:
            wanted = self.bank[rows[-1] % BANK].double()
            return error(torch.embedding(*calls[-1][0]), wanted), 0.0

        return [
            Case(
                label=Label("aten", "embedding", 16, "bf16", task="rows"),
                bytes=size,
                function=torch.embedding,
                copies=calls,
                turn=Turn(LOOKUPS),
                check=check,
                limits=(RIVAL_LIMIT, 0.0),
                cold=is_cold(self.copies[0].nbytes),
                threads=threads,
            )
        ]


def aten_weights(shape: Shape, copies: Copies) -> Iterator[tuple[str, Callable[[], Weight]]]:
    """Name and maker of every rival that PyTorch has; a maker may raise where it does not run."""
    yield "aten linear fp32", partial(_linear, shape, copies, F32)
    yield "aten linear bf16", partial(_linear, shape, copies, BF16)
    yield "aten mkldnn prepacked", partial(PrepackedWeight, shape, copies)
    yield "aten int4pack", partial(_int4, shape, copies)
    yield "aten int8pack", partial(_int8, shape, copies)
    yield "aten linear_dynamic int8", partial(_dynamic, shape, copies)
    if shape[0] >= TABLE * shape[1]:
        yield "aten embedding", partial(TableWeight, shape, copies)


def _bank(shape: Shape) -> Tensor:  # (rows of the bank, width), float32
    rows = min(shape[0], BANK)
    return torch.randn((rows, shape[1]), generator=generator(*shape))


def _linear(shape: Shape, copies: Copies, dtype: torch.dtype) -> AtenWeight:
    bank = _bank(shape).to(dtype)
    whole = bank[bank_rows(shape[0])]
    every = [(one,) for one in arena([whole] * copies(whole.nbytes))]
    bits, name = (16, "linear bf16") if dtype == BF16 else (32, "linear fp32")
    return AtenWeight(name, bits, dtype, F.linear, every, whole.nbytes, bank, shape[0])


def _int4(shape: Shape, copies: Copies) -> AtenWeight:
    rows, width = shape
    if width % GROUP or rows % 16:
        raise ValueError(f"it needs a multiple of 16 outputs and of {GROUP} inputs")
    seed = generator(*shape, 4)
    index = bank_rows(rows)
    codes = torch.randint(16, (int(index.max()) + 1, width), dtype=torch.uint8, generator=seed)
    scales = (torch.rand((len(codes), width // GROUP), generator=seed) * 0.9 + 0.1).to(BF16)
    dense = (codes.float() - 8) * scales.float().repeat_interleave(GROUP, 1)
    values = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes[index].int(), 1)
    pairs = torch.stack([scales, torch.zeros_like(scales)], 2)[index].transpose(0, 1).contiguous()
    size = values.nbytes + pairs.nbytes
    views = arena([values, pairs] * copies(size))
    parts = [(views[i], GROUP, views[i + 1]) for i in range(0, len(views), 2)]
    function = torch.ops.aten._weight_int4pack_mm_for_cpu.default
    return AtenWeight("int4pack", 4, BF16, function, parts, size, dense, rows)


def _int8(shape: Shape, copies: Copies) -> AtenWeight:
    rows, width = shape
    if width % 16:
        raise ValueError("it needs a multiple of 16 inputs: it reads past the end otherwise")
    seed = generator(*shape, 8)
    index = bank_rows(rows)
    size = int(index.max()) + 1, width
    codes = torch.randint(-127, 128, size, dtype=torch.int8, generator=seed)
    scales = (torch.rand(size[0], generator=seed) * 0.9 + 0.1).to(BF16)
    whole, every = codes[index], scales[index]
    stored = whole.nbytes + every.nbytes
    views = arena([whole, every] * copies(stored))
    parts = [(views[i], views[i + 1]) for i in range(0, len(views), 2)]
    dense = codes.float() * scales.float().unsqueeze(1)
    function = torch.ops.aten._weight_int8pack_mm.default
    return AtenWeight("int8pack", 8, BF16, function, parts, stored, dense, rows)


def _dynamic(shape: Shape, copies: Copies) -> AtenWeight:
    bank = _bank(shape)
    scales, zeros = bank.abs().amax(1) / 127, torch.zeros(len(bank), dtype=torch.int64)
    index = bank_rows(shape[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, which makes it no slower
        dense, whole = (
            torch.quantize_per_channel(bank[i], scales[i], zeros[i], 0, torch.qint8)
            for i in (slice(None), index)
        )
    size = shape[0] * (shape[1] + 4)  # codes and a scale per row
    pack = torch.ops.quantized.linear_prepack
    parts = [(pack(whole, None),) for _ in range(copies(size))]
    function = torch.ops.quantized.linear_dynamic.default
    name, exact = "linear_dynamic int8", dense.dequantize()
    return AtenWeight(name, 8, F32, function, parts, size, exact, shape[0])
