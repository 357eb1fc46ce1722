"""Round-to-nearest and GPTQ for all levels of all weights that share one input, in one pass.

The rows of every (weight, level) are stacked: they share the Hessian, so one sweep over the columns
solves them all. The stack is kept transposed, (in, rows), so that a column is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.errors import ModelError
from autocompress.levels import Level, Quantize
from autocompress.operators import Solution, Solver, Statistics, operator, output_energy
from autocompress.operators.scales import group_scales
from autocompress.packed import pack_quantized

INNER, OUTER = 32, 256  # columns per rank-1 block and per lazy update: both fit the caches


@dataclass(frozen=True, slots=True)
class _Stack:
    """All rows of all (level, weight), transposed: rows run along the last axis."""

    weight: Tensor  # (in, rows), float32, overwritten by the sweep
    scale: Tensor  # (in, rows) view by group: scale[group_of[j]]
    zero: Tensor
    group: list[Tensor]  # per distinct group size
    top: Tensor  # (rows,), largest code


@operator(Quantize)
def quantize(
    weights: Sequence[Tensor], statistics: Statistics, levels: Sequence[Level], solver: Solver
) -> list[list[Solution]]:
    """Every weight at every quantized level.

    Args:
        weights: each (out_i, in), float32; they share one input.
        statistics: of that input.
        levels: all `Quantize`.
        solver: settings.

    Returns:
        [weight][level] solutions.

    Raises:
        ModelError: the Hessian cannot be factorised at any damping up to 1.

    References:
        Frantar et al., GPTQ, arXiv:2210.17323, algorithm 1.
    """
    wanted = [level for level in levels if isinstance(level, Quantize)]
    weight = torch.cat(list(weights)).float()
    hessian = statistics.hessian
    importance = torch.ones(weight.shape[1]) if hessian is None else hessian.diagonal().clone()
    grids = [group_scales(weight, importance, level, solver.search_scales) for level in wanted]
    if hessian is None or solver.method == "rtn":
        codes = [_round(weight, level, *grid) for level, grid in zip(wanted, grids, strict=True)]
        errors = [
            output_energy(_dense(c, level, *grid) - weight, hessian)
            for c, level, grid in zip(codes, wanted, grids, strict=True)
        ]
    else:
        codes, errors = _gptq(weight, hessian, wanted, grids, solver)
    return _split(weights, wanted, grids, codes, errors, output_energy(weight, hessian))


def _split(
    weights: Sequence[Tensor],
    levels: Sequence[Quantize],
    grids: Sequence[tuple[Tensor, Tensor]],
    codes: Sequence[Tensor],
    errors: Sequence[Tensor],
    energy: Tensor,
) -> list[list[Solution]]:
    """Cut the stacked rows back into weights."""
    found: list[list[Solution]] = []
    start = 0
    for weight in weights:
        part = slice(start, start + weight.shape[0])
        start = part.stop
        found.append(
            [
                Solution(
                    pack_quantized(level, code[part], scale[part], zero[part]),
                    float(error[part].sum() / energy[part].sum()),
                )
                for level, (scale, zero), code, error in zip(
                    levels, grids, codes, errors, strict=True
                )
            ]
        )
    return found


def group_index(width: int, level: Quantize) -> Tensor:  # (in,), int64
    """Which group each input belongs to."""
    return torch.arange(width) // (level.group_size or width)


def _round(weight: Tensor, level: Quantize, scale: Tensor, zero: Tensor) -> Tensor:
    index = group_index(weight.shape[1], level)
    code = (weight / scale[:, index] + zero[:, index]).round_()
    return code.clamp_(0, (1 << level.bits) - 1).to(torch.uint8)


def _dense(codes: Tensor, level: Quantize, scale: Tensor, zero: Tensor) -> Tensor:
    index = group_index(codes.shape[1], level)
    return (codes - zero[:, index]) * scale[:, index]


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:  # (in, in), upper
    """Upper Cholesky factor of the damped inverse Hessian.

    An input that was never active has a zero diagonal: it gets the mean, so its weights are
    simply rounded (never set to zero: the channel may be active on other text).
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    while damping <= 1.0:
        damped = hessian.clone()
        damped.diagonal().add_(damping * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping *= 10
    raise ModelError(
        "a layer's input statistics must be positive definite after damping. Got a matrix that "
        "is not at damping 1. The calibration activations overflow: use float32."
    )


def _gptq(
    weight: Tensor,
    hessian: Tensor,
    levels: Sequence[Quantize],
    grids: Sequence[tuple[Tensor, Tensor]],
    solver: Solver,
) -> tuple[list[Tensor], list[Tensor]]:  # codes (rows, in) and errors (rows,) per level
    rows, width = weight.shape
    diagonal = hessian.diagonal()
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if solver.activation_order
        else torch.arange(width)
    )
    factor = inverse_factor(hessian[order][:, order], solver.damping)
    stack = weight.T[order].repeat(1, len(levels)).contiguous()  # (in, levels * rows)
    scales = [scale.T.contiguous() for scale, _ in grids]  # (groups, rows)
    zeros = [zero.T.contiguous() for _, zero in grids]
    index = [group_index(width, level)[order].tolist() for level in levels]
    top = torch.cat([torch.full((rows,), (1 << level.bits) - 1.0) for level in levels])
    same = all(i == index[0] for i in index)
    if same:
        scales, zeros, index = [torch.cat(scales, 1)], [torch.cat(zeros, 1)], index[:1]
    error = _sweep(stack, factor, scales, zeros, index, top)
    inverse_order = torch.argsort(order)
    codes = stack.to(torch.uint8)[inverse_order]  # (in, levels * rows)
    parts = codes.split(rows, 1)
    return [part.T.contiguous() for part in parts], list(error.split(rows))


def _sweep(
    stack: Tensor,  # (in, rows): weights in, codes out
    factor: Tensor,  # (in, in), upper
    scales: list[Tensor],
    zeros: list[Tensor],
    index: list[list[int]],
    top: Tensor,  # (rows,)
) -> Tensor:  # (rows,), damped Hessian error
    """Solve column after column, pushing each rounding error onto the columns still to come."""
    width, rows = stack.shape
    error = torch.zeros(rows)
    pushed = torch.empty(OUTER, rows)
    step = torch.empty(rows)
    for outer in range(0, width, OUTER):
        outer_end = min(outer + OUTER, width)
        for inner in range(outer, outer_end, INNER):
            inner_end = min(inner + INNER, outer_end)
            for j in range(inner, inner_end):
                column = stack[j]
                if len(scales) == 1:
                    scale, zero = scales[0][index[0][j]], zeros[0][index[0][j]]
                else:
                    scale = torch.cat([s[i[j]] for s, i in zip(scales, index, strict=True)])
                    zero = torch.cat([z[i[j]] for z, i in zip(zeros, index, strict=True)])
                torch.div(column, scale, out=step)
                step.add_(zero).round_().clamp_min_(0)
                torch.minimum(step, top, out=step)
                gap = pushed[j - outer]
                torch.sub(step, zero, out=gap)
                gap.mul_(scale).sub_(column).mul_(1.0 / float(factor[j, j]))
                error.addcmul_(gap, gap)
                column.copy_(step)
                if j + 1 < inner_end:
                    stack[j + 1 : inner_end].addr_(factor[j, j + 1 : inner_end], gap)
            if inner_end < outer_end:
                stack[inner_end:outer_end].addmm_(
                    factor[inner:inner_end, inner_end:outer_end].T,
                    pushed[inner - outer : inner_end - outer],
                )
        if outer_end < width:
            stack[outer_end:].addmm_(
                factor[outer:outer_end, outer_end:].T, pushed[: outer_end - outer]
            )
    return error
