"""Backends: what computes with a packed weight. To add one, write a file and a line here.

A mode is the least precision that activations have inside: 'a8' int8, 'a16' bf16, 'a32' exact.
A backend may be more precise than the mode asks, never less; of the exact product, outputs keep
6e-3, 3e-3 and 1e-5 (relative, Frobenius, before they are rounded to the model's type), half as
much again where two matrices of a low-rank weight round activations twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from autocompress.backends.aten import Aten
from autocompress.backends.dense import DenseLinear
from autocompress.backends.dequantize import Dequantize
from autocompress.backends.native import Native
from autocompress.errors import BackendError
from autocompress.levels import Level, Shape
from autocompress.packed import Packed
from autocompress.tables import did_you_mean


class Op(Protocol):
    """A weight, ready to be multiplied with.

    `tensors` are what a multiplication reads, `bytes` their size; looked-up rows have the type
    that the weight was prepared for.
    """

    @property
    def tensors(self) -> dict[str, Tensor]: ...

    @property
    def bytes(self) -> int: ...

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x W^T + bias` for x (..., in): (..., out), of x's type."""

    def rows(self, indices: Tensor) -> Tensor:
        """Rows of the weight at `indices` of any shape: (*indices.shape, in)."""

    def dense(self) -> Tensor:
        """The (out, in) weight, float32, exactly as stored."""

    def stored(self) -> Packed:
        """The weight in the form of files, exactly."""


class Together(Protocol):
    """Several ops that read one input, in one call."""

    def fits(self, x: Tensor) -> bool:
        """Whether it can be called with x here and now."""

    def same(self, x: Tensor, copy: Tensor) -> bool:
        """Whether x still is what a copy of it holds, to the last bit."""

    def __call__(self, x: Tensor, biases: Sequence[Tensor | None]) -> list[Tensor]:
        """Each op's own output, to the last bit."""


class Backend(Protocol):
    """An implementation of multiplication with packed weights."""

    name: str

    def version(self) -> str:
        """Name, version and what else its speed depends on, such as 'native 1 avx512bf16'."""

    def supports(self, level: Level, shape: Shape, mode: str) -> str | None:
        """Why it cannot run a (out, in) weight at a level in a mode here; None where it can."""

    def prepare(self, packed: Packed, dtype: torch.dtype, mode: str) -> Op:
        """The op of a supported weight; `dtype` is what the model computes in."""

    def place(self, ops: Sequence[Any]) -> None:  # of Op
        """Put the tensors of a model's ops where they are read fastest."""

    def together(self, ops: Sequence[Any]) -> Together | None:  # of Op
        """One call for placed ops of one width and mode; None where it has no such call."""


BACKENDS: dict[str, Backend] = {  # in the order they are tried
    backend.name: backend for backend in (Native(), Aten(), DenseLinear(), Dequantize())
}


def find_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        BackendError: there is none.
    """
    if name not in BACKENDS:
        raise BackendError(
            f"a backend must be one of {', '.join(BACKENDS)}. Got '{name}'."
            f"{did_you_mean(name, BACKENDS)}"
        )
    return BACKENDS[name]


def choose_backend(level: Level, shape: Shape, mode: str, name: str | None = None) -> Backend:
    """The backend called `name`, or the first that supports the weight.

    Args:
        level, shape: of the (out, in) weight.
        mode: 'a8', 'a16' or 'a32'.

    Raises:
        BackendError: no such backend, or it does not support the weight; says why.
    """
    tried = [find_backend(name)] if name is not None else list(BACKENDS.values())
    reasons = []
    for backend in tried:
        reason = backend.supports(level, shape, mode)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    rows, width = shape
    raise BackendError(
        f"a backend must run {level} of {rows} x {width} in mode {mode}. Got {'; '.join(reasons)}."
    )
