"""ggml's kernels as cases: rivals.

Weights get huge pages as ours do, although llama.cpp itself gives them small ones: the harder
rival. A timed call evaluates a graph of several multiplications, each with another copy of the
weight, so that what a graph costs is shared by them, as in a model.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
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
from autocompress_kernels.bench_ggml_library import PLAIN, Ggml, find_ggml, view

TYPES = {  # name -> number in `enum ggml_type`, bits
    "Q2_K": (10, 2),
    "Q3_K": (11, 3),
    "Q4_0": (2, 4),
    "Q4_1": (3, 4),
    "Q4_K": (12, 4),
    "Q5_0": (6, 5),
    "Q5_K": (13, 5),
    "Q6_K": (14, 6),
    "Q8_0": (8, 8),
}
F32, I32 = 0, 26  # of `enum ggml_type`
WEIGHTS = 1  # of `enum ggml_backend_buffer_usage`
GRAPH = 32 << 20  # bytes of weights that a graph reads, for up to 4 rows of x; fewer for more
ROOM = 64  # bytes between tensors, at least


class GgmlWeight:
    """One quantized weight in many copies.

    Args:
        ggml: the library.
        kind: of the weight, a name in `TYPES`.
        place: name of the buffer type.
        shape: (rows, width).
        copies: how many are made.

    Raises:
        ValueError: there is no kernel for this type, buffer type and shape.
    """

    def __init__(self, ggml: Ggml, kind: str, place: str, shape: Shape, copies: Copies) -> None:
        self.ggml, self.kind, self.place, self.shape = ggml, kind, place, shape
        self.type, self.bits = TYPES[kind]
        block = ggml.call["blck_size"](self.type)
        if shape[1] % block:
            raise ValueError(f"it needs a multiple of {block} inputs")
        self.size = shape[0] * ggml.call["row_size"](self.type, shape[1])
        self._count = copies(self.size)
        self._owned = ExitStack()  # everything that must be freed
        weakref.finalize(self, self._owned.close)
        try:
            self.copies = self._allocate()
        except Exception:
            self._owned.close()
            raise
        self.dense = self._fill()

    def _allocate(self) -> list[int]:
        """Tensors of all copies, without their data."""
        call, (rows, width) = self.ggml.call, self.shape
        place = self.ggml.buffer_types()[self.place]
        context = self._owned.enter_context(self.ggml.context(self._count + 2, 0))
        copies = [
            call["new_tensor_2d"](context, self.type, width, rows) for _ in range(self._count)
        ]
        step = _rounded(call["backend_buft_get_alloc_size"](place, copies[0]))
        buffer = self._owned.enter_context(self.ggml.memory(place, step * self._count + ROOM))
        call["backend_buffer_set_usage"](buffer, WEIGHTS)
        base = _rounded(call["backend_buffer_get_base"](buffer))
        for number, copy in enumerate(copies):
            call["backend_tensor_alloc"](buffer, copy, base + number * step)
        x = call["new_tensor_2d"](context, F32, width, 1)
        if not call["backend_dev_supports_op"](
            self.ggml.device, call["mul_mat"](context, copies[0], x)
        ):
            raise ValueError(f"ggml has no kernel for buffer type '{self.place}' on this CPU")
        return copies

    def _fill(self) -> Tensor:  # (rows of the bank, width), float32
        """Quantize a bank of rows into all copies; what it stands for."""
        call, (rows, width) = self.ggml.call, self.shape
        seed = generator(*self.shape)
        bank = torch.randn((min(rows, BANK), width), generator=seed)
        stored = torch.empty((len(bank), self.size // rows), dtype=torch.uint8)
        call["quantize_chunk"](
            self.type, bank.data_ptr(), stored.data_ptr(), 0, len(bank), width, None
        )
        whole = stored[bank_rows(rows)]
        for copy in self.copies:
            call["backend_tensor_set"](copy, whole.data_ptr(), 0, whole.nbytes)
        return self._dequantized(stored, width)

    def _dequantized(self, stored: Tensor, width: int) -> Tensor:  # (len(stored), width), float32
        """Quantized rows as numbers, by looking them up."""
        call, count = self.ggml.call, len(stored)
        index = torch.arange(count, dtype=torch.int32)
        with ExitStack() as owned:
            context = owned.enter_context(self.ggml.context(4, 4))
            table = call["new_tensor_2d"](context, self.type, width, count)
            wanted = call["new_tensor_2d"](context, I32, count, 1)
            found = call["get_rows"](context, table, wanted)
            sizes = (stored.nbytes, index.nbytes, 4 * count * width)
            buffer, addresses = _memory(owned, self.ggml, sizes)
            for tensor, address in zip((table, wanted, found), addresses, strict=True):
                call["backend_tensor_alloc"](buffer, tensor, address)
            for tensor, data in ((table, stored), (wanted, index)):
                call["backend_tensor_set"](tensor, data.data_ptr(), 0, data.nbytes)
            graph = call["new_graph_custom"](context, 4, False)
            call["build_forward_expand"](graph, found)
            call["backend_graph_compute"](self.ggml.backend, graph)
            dense = view(addresses[2], sizes[2]).view(torch.float32)
            return dense.view(count, width).clone()

    def cases(self, m: int, threads: int) -> list[Case]:
        self.ggml.set_threads(threads)
        nodes = min(self._count, math.ceil(GRAPH / max(1, m / 4) / self.size))
        graphs = _Graphs(self, m, nodes)
        compute = self.ggml.call["backend_graph_compute"]
        calls = [[(self.ggml.backend, graph)] for graph in graphs.graphs]

        def check() -> tuple[float, float]:
            if compute(*calls[-1][0]):
                raise ValueError(f"ggml must compute a graph of {self.kind}. Got an error.")
            wanted = (graphs.x.double() @ self.dense.double().T)[:, bank_rows(self.shape[0])]
            return error(graphs.y, wanted), 0.0

        return [
            Case(
                label=Label("ggml", f"{self.kind} {self.place}", self.bits, "fp32"),
                bytes=self.size,
                function=compute,
                copies=calls,
                turn=Turn(len(calls)),
                check=check,
                limits=(RIVAL_LIMIT, 0.0),
                cold=is_cold(self.size),
                threads=threads,
                each=nodes,
                keep=(self, graphs),
            )
        ]


class _Graphs:
    """Graphs of `nodes` multiplications each, over all copies of a weight.

    All of them read the same x (m, width) and write the same y (m, rows), as memory is reused in
    a model.
    """

    def __init__(self, weight: GgmlWeight, m: int, nodes: int) -> None:
        call, copies = weight.ggml.call, weight.copies
        rows, width = weight.shape
        count = math.ceil(len(copies) / nodes)
        self._owned = ExitStack()
        weakref.finalize(self, self._owned.close)
        self.x, self.graphs = random_input(m, width), []
        buffer, (source, target) = _memory(self._owned, weight.ggml, (4 * m * width, 4 * m * rows))
        for number in range(count):
            context = self._owned.enter_context(weight.ggml.context(nodes + 1, nodes + 1))
            graph = call["new_graph_custom"](context, nodes + 1, False)
            x = call["new_tensor_2d"](context, F32, width, m)
            call["backend_tensor_alloc"](buffer, x, source)
            for i in range(number * nodes, (number + 1) * nodes):
                product = call["mul_mat"](context, copies[i % len(copies)], x)
                call["backend_tensor_alloc"](buffer, product, target)
                call["build_forward_expand"](graph, product)
            self.graphs.append(graph)
        view(source, 4 * m * width).copy_(self.x.view(-1).view(torch.uint8))
        self.y = view(target, 4 * m * rows).view(torch.float32).view(m, rows)


def _memory(owned: ExitStack, ggml: Ggml, sizes: tuple[int, ...]) -> tuple[int, list[int]]:
    """A plain buffer for tensors of these bytes, and their addresses in it."""
    kind = ggml.buffer_types()[PLAIN]
    steps = [_rounded(size) for size in sizes]
    buffer = owned.enter_context(ggml.memory(kind, sum(steps) + ROOM))
    base = _rounded(ggml.call["backend_buffer_get_base"](buffer))
    return buffer, [base + sum(steps[:number]) for number in range(len(steps))]


def _rounded(size: int) -> int:
    """Up to a multiple of `ROOM`."""
    return -(-size // ROOM) * ROOM


def ggml_weights(shape: Shape, copies: Copies) -> Iterator[tuple[str, Callable[[], Weight]]]:
    """Name and maker of every kind of weight; a maker may raise where it does not run."""
    ggml = find_ggml()
    if isinstance(ggml, str):
        return
    for place in ggml.buffer_types():
        for kind in TYPES:
            yield f"ggml {kind} {place}", partial(GgmlWeight, ggml, kind, place, shape, copies)
