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


class _Kept:
    """What one call computed for others.

    Args:
        fused: whose call it was.
        x: its input; everything is let go as soon as it is.
        outputs: by the place of their module.
    """

    def __init__(self, fused: Fused, x: Tensor, outputs: dict[int, Tensor]) -> None:
        self.fused, self.outputs, self.copies = fused, outputs, [x.clone()]
        copies = self.copies  # not self: the callback must not keep what it empties

        def forget(_: object) -> None:
            outputs.clear()
            copies.clear()

        self.x = weakref.ref(x, forget)


class _Slot(threading.local):
    """The last call of a thread, until all of it is taken."""

    kept: _Kept | None = None


_slot = _Slot()


class Fused:
    """Packed modules that a model calls with one tensor object, one after the other.

    Args:
        modules: two or more; prepared by one backend, the first is called first.
        together: computes all of them.
    """

    def __init__(self, modules: Sequence[Any], together: Together) -> None:
        self.modules, self.together = tuple(modules), together

    def __call__(self, module: Any, x: Tensor) -> Tensor | None:
        """The module's output, or None where it must compute alone.

        Under `torch.compile` modules always compute alone: a graph cannot ask at run time whether
        its input is the tensor of the call before.
        """
        if torch.compiler.is_compiling() or not self.together.fits(x):
            return None
        if module is self.modules[0]:
            return self._lead(x)
        return self._take(module, x)

    def _lead(self, x: Tensor) -> Tensor:
        outputs = self.together(x, [module.bias for module in self.modules])
        _slot.kept = _Kept(self, x, dict(enumerate(outputs[1:], start=1)))
        return outputs[0]

    def _take(self, module: Any, x: Tensor) -> Tensor | None:
        kept = _slot.kept
        if kept is None or kept.fused is not self or kept.x() is not x:
            return None
        if not self.together.same(x, kept.copies[0]):
            return None
        place = next(i for i, one in enumerate(self.modules) if one is module)
        found = kept.outputs.pop(place, None)
        if not kept.outputs:
            _slot.kept = None
        return found

    def dissolve(self) -> None:
        """Let every module compute alone from now on."""
        for module in self.modules:
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
