"""What the profiler times: packed layers on their kernels, weights cold in the caches."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from autocompress.backends import BACKENDS, Backend, Op
from autocompress.backends.native_ops import NativeOp
from autocompress.errors import LatencyError
from autocompress.latency_store import Point
from autocompress.levels import Dense, Joint, Level, LowRank, Quantize, Shape, Width
from autocompress.machine import last_level_cache
from autocompress.operators import Solver, Statistics, solve
from autocompress.packed import Packed, pack, tensor_shapes
from autocompress.targets import MOST_ROWS, Target

COLD = 3  # times the last-level cache: what copies of one weight take together
MEMORY = 1_500_000_000  # bytes of all copies that are alive at once, at most
REFERENCE = "reference"  # in place of a level


def find_backend(level: Level, shape: Shape, target: Target) -> Backend | str:
    """What runs a level of a shape at a target, or the reasons why nothing does."""
    if in_parts(level):  # see `lean.in_parts`: it would be timed in one way and run in another
        return (
            f"the decoder of one native call per token has one matrix for a layer, '{level}' more"
        )
    if isinstance(level, Width):  # its matrices are of other sizes than the layer's
        return f"nothing prices narrower sublayers, such as '{level}', in time yet"
    reasons = []
    for name in target.runtime:
        reason = BACKENDS[name].supports(level, shape, target.mode)
        if reason is None:
            return BACKENDS[name]
        reasons.append(f"{name}: {reason}")
    return "; ".join(reasons)


def in_parts(level: Level) -> bool:
    """Whether a product takes more than one matrix: low-rank parts and outliers."""
    if isinstance(level, Joint):
        return level.low_rank is not None or level.outliers is not None
    return isinstance(level, LowRank)


def available_versions(runtime: Sequence[str]) -> dict[str, str]:
    """Backend -> version of those that can be used here."""
    return {name: BACKENDS[name].version() for name in runtime}


def room_for() -> int:
    """Cases that are timed together: as many as keep cold copies within `MEMORY`, 3 at least."""
    return max(3, MEMORY // (COLD * last_level_cache()) - 1)


def random_packed(level: Level, shape: Shape, seed: int = 0) -> Packed:
    """A random weight in the level's true format, whose outputs are about as large as its inputs.

    Quantized ones are random codes around the middle zero; other levels are rounded the quick way.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, width = shape
    if not isinstance(level, Quantize):
        weight = torch.randn(shape, generator=generator) / math.sqrt(width)
        solver = Solver(method="rtn", search_scales=False, alternations=0)
        ((solution,),) = solve([weight], Statistics(None, 0), [level], solver)
        return solution.packed
    sizes = {name: size for name, (_, size) in tensor_shapes(level, shape).items()}
    spread = 2**level.bits / math.sqrt(12)  # of codes that are all as likely
    tensors = {
        "codes": torch.randint(256, sizes["codes"], generator=generator, dtype=torch.uint8),
        "scales": torch.full(sizes["scales"], 1 / (spread * math.sqrt(width)), dtype=torch.float16),
    }
    if not level.symmetric:
        middle = torch.full((rows * level.groups(width),), 1 << (level.bits - 1))
        tensors["zeros"] = pack(middle, level.bits)
    return Packed(level, shape, tensors)


@dataclass
class KernelCase:
    """One packed weight in many copies, multiplied with the same input.

    Args:
        point: what is timed.
        ops: the copies.
        x: (rows, in).
    """

    point: Point
    ops: Sequence[Op]
    x: Tensor

    def __post_init__(self) -> None:
        self.bytes = self.ops[0].bytes
        self.y = self.x.new_empty(len(self.x), self.point.shape[0])  # where kernels write
        self._turn = itertools.cycle([_bound(op, self.x, self.y) for op in self.ops])

    def run(self, calls: int) -> None:
        """Multiply with that many copies, going on where the last call ended."""
        for call in itertools.islice(self._turn, calls):
            call()


def _bound(op: Op, x: Tensor, y: Tensor) -> Callable[[], object]:
    """One multiplication with as little Python as possible: what Python costs is not a kernel's."""
    if not isinstance(op, NativeOp) or len(x) > MOST_ROWS:
        return partial(op, x)
    from autocompress_kernels.calls import TYPES, matrix
    from autocompress_kernels.formats import MODES
    from autocompress_kernels.library import load

    library, kind = load(), TYPES[x.dtype]
    call = partial(
        library.linear,
        matrix(*op.packed.parts, *op.packed.numbers),
        *(MODES[op.mode], len(x), x.data_ptr(), kind, x.shape[1], None),
        *(y.data_ptr(), kind, op.shape[0], 0, library.parallel, torch.get_num_threads()),
    )
    if code := call():
        raise LatencyError(f"a kernel must run what it supports. Got code {code} for {op.level}.")
    return call


def make_case(
    backend: Backend,
    level: Level,
    shape: Shape,
    rows: int,
    target: Target,
    dtype: torch.dtype,
    room: int = MEMORY,  # bytes for all copies
) -> KernelCase:
    """A case whose copies take three times the last-level cache, or `room` if that is less.

    A model that is smaller than the caches runs from them, and so should the copies: `room` is
    then the model's size.
    """
    packed = random_packed(level, shape)
    op = backend.prepare(packed, dtype, target.mode)
    wanted = min(COLD * last_level_cache(), room)
    copies = max(2, math.ceil(wanted / max(1, op.bytes)))
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    point = Point(backend.name, str(level), shape, rows, target.mode)
    return KernelCase(point, _copies(backend, op, copies), x)


def _copies(backend: Backend, op: Op, count: int) -> list[Op]:
    """The op so many times, each with its own memory, placed as the backend places a model's."""
    copies = [copy.copy(op) for _ in range(count)]
    backend.place(copies)
    first, last = (next(iter(it.tensors.values())).data_ptr() for it in (copies[0], copies[-1]))
    if first == last:  # the backend leaves tensors where they are
        copies = [copy.deepcopy(op) for _ in range(count)]
    return copies


def reference_case(shape: Shape, rows: int, target: Target, room: int) -> KernelCase:
    """The dense weight in bfloat16, through `F.linear`: what every timing is a ratio to."""
    backend = find_backend(Dense(), shape, target)
    if isinstance(backend, str):
        raise LatencyError(f"a target must run dense layers. Got '{target.name}': {backend}")
    case = make_case(backend, Dense(), shape, rows, target, torch.bfloat16, room)
    return replace(case, point=replace(case.point, level=REFERENCE))


@contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """Let torch use `count` threads inside; yields how many it uses."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        with torch.inference_mode():
            yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
