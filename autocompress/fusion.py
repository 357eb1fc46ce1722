"""Packed modules that read one input compute in one kernel call: q, k and v; gate and up.

The first of them that a model calls computes all of them, the others take what was kept for them.
A module that gets another tensor than the first one did, or the same one after it was changed in
place, or whose output was taken before, computes alone: in whatever order modules are called, and
on however many threads, outputs are those of separate calls to the last bit.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.backends import BACKENDS, Together
from autocompress.tracing import input_groups


class _Slot(threading.local):
    """What the last call of a thread computed for others, until all of it is taken."""

    fused: Fused | None = None
    x: weakref.ref[Tensor] | None = None
    held: dict[Any, Tensor] | None = None  # module -> its output; None -> a copy of x


_slot = _Slot()


class Fused:
    """Packed modules that a model calls with one tensor object, one after the other.

    Args:
        modules: two or more; prepared by one backend, the first is called first.
        together: computes all of them.
    """

    def __init__(self, modules: Sequence[Any], together: Together) -> None:
        self.first, self.others, self.together = modules[0], tuple(modules[1:]), together

    def __call__(self, module: Any, x: Tensor) -> Tensor | None:
        """The module's output, or None where it must compute alone.

        Under `torch.compile` modules always compute alone: a graph cannot ask at run time whether
        its input is the tensor of the call before.
        """
        if torch.compiler.is_compiling():
            return None
        return self._lead(x) if module is self.first else self._take(module, x)

    def _lead(self, x: Tensor) -> Tensor | None:
        if not self.together.fits(x):
            return None
        biases = [self.first.bias, *(module.bias for module in self.others)]
        first, *rest = self.together(x, biases)
        held = dict(zip((*self.others, None), (*rest, x.clone()), strict=True))
        _slot.fused, _slot.held = self, held
        _slot.x = weakref.ref(x, lambda _: held.clear())  # nothing outlives the input
        return first

    def _take(self, module: Any, x: Tensor) -> Tensor | None:
        if _slot.fused is not self or _slot.x is None or _slot.x() is not x:
            return None
        held = _slot.held
        if not held or not self.together.same(x, held[None]):
            return None
        found = held.pop(module, None)  # once: whoever gets it may write into it
        if len(held) == 1:
            _slot.fused = _slot.x = _slot.held = None
        return found

    def dissolve(self) -> None:
        """Let every module compute alone from now on."""
        for module in (self.first, *self.others):
            module.fused = None


def fuse(model: Any, modules: dict[str, Any]) -> None:
    """Find which prepared modules of a model can compute together: it is run once, on a few tokens.

    Args:
        modules: name -> packed linear, placed in memory.
    """
    for one in modules.values():
        if one.fused is not None:
            one.fused.dissolve()
    if not any(BACKENDS[one.backend].together([one.op, one.op]) for one in modules.values()):
        return
    for names in input_groups(model, list(modules), operator.is_):
        for group in _alike([modules[name] for name in names]):
            together = BACKENDS[group[0].backend].together([one.op for one in group])
            if len(group) > 1 and together is not None:
                fused = Fused(group, together)
                for one in group:
                    one.fused = fused


def _alike(modules: list[nn.Module]) -> Iterator[list[Any]]:
    """Modules of one group that are not fused yet, by backend, width and mode."""
    kinds: dict[tuple[str, int, str], list[Any]] = {}
    one: Any
    for one in modules:
        if one.fused is None:
            kinds.setdefault((one.backend, one.shape[1], one.mode), []).append(one)
    yield from kinds.values()
