"""What Triton's interpreter lacks for a check: a product of bfloat16 matrices, and bounds."""

from __future__ import annotations

# mypy: disable-error-code="import-untyped"
from collections.abc import Callable
from typing import Any

from torch import Tensor


def widen_dot() -> None:
    """Give the interpreter a product of bfloat16 matrices: its own multiplies bit patterns."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    narrow = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            assert b.dtype.scalar == tl.bfloat16
            a, b = (self.cast_impl(operand, tl.float32) for operand in (a, b))
        return narrow(self, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot


def watch_memory() -> Callable[[list[Tensor], Tensor], None]:
    """Make the interpreter check every address; returns what sets which may be used.

    Its own loads would quietly read whatever lies behind a buffer.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    readable: list[Tensor] = []
    writable: list[Tensor] = []

    def check(tensors: list[Tensor], pointers: Any, mask: Any) -> None:
        used = pointers.data[mask.data]
        within = used != used
        for tensor in tensors:
            begin = tensor.data_ptr()
            within |= (used >= begin) & (used < begin + tensor.nbytes)
        assert within.all(), f"{len(used) - within.sum()} elements outside every buffer"

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(readable, pointers, mask)
        return load(self, pointers, mask, *rest)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(writable, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store

    def allow(read: list[Tensor], write: Tensor) -> None:
        readable[:], writable[:] = read, [write]

    return allow
