"""Weights that are sparse, quantized or both, and quantized weights with outliers, on their way
through one sweep: each column's error, of dropping and of rounding, is pushed onto later columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autocompress.levels import Joint, Prune, Quantize
from autocompress.operators import Solver, Statistics
from autocompress.operators.masks import AdaptiveMask
from autocompress.operators.sweep import ordered_factor, sweep
from autocompress.packed import Packed
from autocompress.packed.outliers import pack_outliers
from autocompress.packed.quantized import spread
from autocompress.packed.sparse import pack_sparse, pack_sparse_codes

BLOCK = 64  # columns per choice of a mask
ELEMENTS = 1 << 26  # of a stack, at most, unless one plan takes more
Grid = tuple[Tensor, Tensor]  # scales and zeros, (out, groups)


@dataclass(frozen=True)
class Plan:
    """One weight at one level.

    Args:
        level: sparse, sparse and quantized, or quantized with outliers.
        weight: (out, in), float32: dense, later solved.
        keep: (out, in), bool: all but the dropped ones; None until a sweep chooses, or for all.
        exact: (out, in), bool: the outliers; None without.
        grid: scales and zeros; None without codes.
    """

    level: Prune | Joint
    weight: Tensor
    keep: Tensor | None = None
    exact: Tensor | None = None
    grid: Grid | None = None

    @property
    def prune(self) -> Prune | None:
        """The sparse part."""
        return self.level if isinstance(self.level, Prune) else self.level.prune

    @property
    def quantize(self) -> Quantize | None:
        """The quantized part."""
        return None if isinstance(self.level, Prune) else self.level.quantize

    @property
    def kind(self) -> tuple[int | None, bool, bool, bool]:
        """Plans of one kind can share a sweep: their columns have one order."""
        of = None if self.prune is None else self.prune.of
        return of, self.prune is None, self.quantize is None, self.keep is None

    def spread(self) -> Grid:
        """Scale and zero of every weight, (out, in)."""
        assert self.grid is not None and self.quantize is not None
        scales, zeros = self.grid
        width = self.weight.shape[1]
        return spread(scales, self.quantize, width), spread(zeros, self.quantize, width)

    def packed(self) -> Packed:
        """The stored form of a solved weight: what is stored as codes goes to the nearest one."""
        if self.quantize is None:
            assert isinstance(self.level, Prune) and self.keep is not None
            return pack_sparse(self.level, self.weight, self.keep)
        assert isinstance(self.level, Joint) and self.grid is not None
        scale, zero = self.spread()
        codes = (self.weight / scale + zero).round_().clamp_(0, (1 << self.quantize.bits) - 1)
        if self.exact is not None:
            return pack_outliers(self.level, codes, *self.grid, self.weight, self.exact)
        assert self.keep is not None
        return pack_sparse_codes(self.level, codes, *self.grid, self.keep)


def round_to(weight: Tensor, scale: Tensor, zero: Tensor, top: Tensor | float) -> Tensor:
    """The nearest weights that codes from 0 to `top` stand for."""
    code = torch.addcdiv(zero, weight, scale).round_().clamp_min_(0)
    code = torch.minimum(code, torch.as_tensor(top, dtype=code.dtype))
    return code.sub_(zero).mul_(scale)


def sweep_plans(plans: Sequence[Plan], statistics: Statistics, solver: Solver) -> list[Plan]:
    """Solve plans of any kind, those of one kind together: choose masks, round what is kept.

    Args:
        plans: weights share the input of `statistics`, which are not empty.

    Raises:
        ModelError: the Hessian cannot be factorised at any damping up to 1.

    References:
        Frantar, Alistarh, SparseGPT, arXiv:2301.00774, algorithm 1 and section 3.5.
    """
    solved: dict[int, Plan] = {}
    kinds: dict[object, list[int]] = {}
    for number, plan in enumerate(plans):
        kinds.setdefault(plan.kind, []).append(number)
    for numbers in kinds.values():
        most = max(1, ELEMENTS // max(plans[number].weight.numel() for number in numbers))
        for start in range(0, len(numbers), most):
            alike = numbers[start : start + most]
            found = _sweep_alike([plans[number] for number in alike], statistics, solver)
            solved.update(zip(alike, found, strict=True))
    return [solved[number] for number in range(len(plans))]


def _sweep_alike(plans: Sequence[Plan], statistics: Statistics, solver: Solver) -> list[Plan]:
    prune = plans[0].prune
    order, factor = ordered_factor(statistics, prune.of if prune else None, solver)
    stack = _stacked([plan.weight for plan in plans], order)
    columns = _Columns(plans, stack, order, factor)
    sweep(stack, factor, columns.step, columns.begin, BLOCK)
    back, rows = torch.argsort(order), [len(plan.weight) for plan in plans]
    weights, masks = (part[back].T.split(rows) for part in (stack, columns.keep))
    return [
        replace(plan, weight=weight.contiguous(), keep=mask.contiguous() if plan.prune else None)
        for plan, weight, mask in zip(plans, weights, masks, strict=True)
    ]


class _Columns:
    """What the sweep does with a column of stacked plans."""

    def __init__(self, plans: Sequence[Plan], stack: Tensor, order: Tensor, factor: Tensor) -> None:
        self.keep = torch.ones(stack.shape, dtype=torch.bool)
        self._stack, self._grid = stack, _stacked_grid(plans, order)
        exact = [plan.exact for plan in plans if plan.exact is not None]
        self._exact = _stacked(exact, order) if exact else None
        fixed = [plan.keep for plan in plans if plan.keep is not None]
        self._mask: AdaptiveMask | None = None
        if fixed:
            self.keep = _stacked(fixed, order)
        elif plans[0].prune is not None:
            gap: Callable[[int, int], Tensor] | None = self._gap if self._grid else None
            self._mask = AdaptiveMask(stack, _segments(plans), factor, BLOCK, gap)
            self.keep = self._mask.keep

    def begin(self, first: int, end: int) -> None:
        """Choose the mask of a block."""
        if self._mask is not None:
            self._mask.begin(first, end)

    def step(self, j: int, column: Tensor, pivot: float, gap: Tensor) -> None:
        """Drop and round one column."""
        if self._mask is not None:
            self._mask.reach(j)
        solved = self._round(slice(j, j + 1))[0]
        if self._exact is not None:
            solved = torch.where(self._exact[j], column.bfloat16().float(), solved)
        solved = solved * self.keep[j]
        torch.sub(solved, column, out=gap).mul_(1.0 / pivot)
        column.copy_(solved)

    def _round(self, columns: slice) -> Tensor:  # (columns, rows)
        """Weights as they would be stored."""
        weight = self._stack[columns]
        if self._grid is None:
            return weight.bfloat16().float()
        scale, zero, top = self._grid
        return round_to(weight, scale[columns], zero[columns], top)

    def _gap(self, first: int, end: int) -> Tensor:
        return self._round(slice(first, end)) - self._stack[first:end]


def _stacked_grid(plans: Sequence[Plan], order: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Scale and zero, (in, rows), and largest code, (rows,), of all weights."""
    if plans[0].quantize is None:
        return None
    scales, zeros = zip(*(plan.spread() for plan in plans), strict=True)
    tops = torch.tensor([(1 << plan.quantize.bits) - 1.0 for plan in plans if plan.quantize])
    rows = torch.tensor([len(plan.weight) for plan in plans])
    return _stacked(scales, order), _stacked(zeros, order), tops.repeat_interleave(rows)


def _stacked(parts: Sequence[Tensor], order: Tensor) -> Tensor:  # (in, rows)
    """(out, in) tensors as the stack holds them."""
    return torch.cat(list(parts)).T[order].contiguous()


def _segments(plans: Sequence[Plan]) -> list[tuple[slice, Prune]]:
    """Rows of the stack that each plan has."""
    found, start = [], 0
    for plan in plans:
        assert plan.prune is not None
        found.append((slice(start, start + len(plan.weight)), plan.prune))
        start += len(plan.weight)
    return found
