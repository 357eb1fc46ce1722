"""Round-to-nearest and GPTQ for all levels of all weights that share one input, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autocompress.levels import Level, Quantize
from autocompress.operators import TINY, Solution, Solver, Statistics, operator, output_energy
from autocompress.operators.scales import group_scales
from autocompress.operators.sweep import ordered_factor, sweep
from autocompress.packed import pack_quantized

Grid = tuple[Tensor, Tensor]  # scales and zeros


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
    hessian = statistics.known
    importance = torch.ones(weight.shape[1]) if hessian is None else hessian.diagonal().clone()
    settings = solver.search_scales, solver.scale_bits
    grids = [group_scales(weight, importance, level, *settings) for level in wanted]
    if hessian is None or solver.method == "rtn":
        codes = [_round(weight, level, *grid) for level, grid in zip(wanted, grids, strict=True)]
        errors = [
            output_energy(_dense(c, level, *grid) - weight, hessian)
            for c, level, grid in zip(codes, wanted, grids, strict=True)
        ]
    else:
        codes, errors = _gptq(weight, statistics, wanted, grids, solver)
    return _split(weights, wanted, grids, codes, errors, output_energy(weight, hessian))


def _split(
    weights: Sequence[Tensor],
    levels: Sequence[Quantize],
    grids: Sequence[Grid],
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
                    float(error[part].sum() / energy[part].sum().clamp_min(TINY)),
                    error[part].clone(),
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


def _gptq(
    weight: Tensor,
    statistics: Statistics,
    levels: Sequence[Quantize],
    grids: Sequence[Grid],
    solver: Solver,
) -> tuple[list[Tensor], list[Tensor]]:  # codes (rows, in) and errors (rows,) per level
    rows, width = weight.shape
    order, factor = ordered_factor(statistics, None, solver)
    stack = weight.T[order].repeat(1, len(levels)).contiguous()  # (in, levels * rows)
    top = torch.cat([torch.full((rows,), (1 << level.bits) - 1.0) for level in levels])
    grid, code = _column_grid(levels, grids, order, width), torch.empty(len(top))

    def step(j: int, column: Tensor, pivot: float, gap: Tensor) -> None:
        _round_column(column, *grid(j), top, pivot, code, gap)

    error = sweep(stack, factor, step)
    inverse_order = torch.argsort(order)
    codes = stack.to(torch.uint8)[inverse_order]  # (in, levels * rows)
    parts = codes.split(rows, 1)
    return [part.T.contiguous() for part in parts], list(error.split(rows))


def _column_grid(
    levels: Sequence[Quantize], grids: Sequence[Grid], order: Tensor, width: int
) -> Callable[[int], Grid]:
    """Scale and zero of every row at the j-th solved column; one look-up when all groups agree."""
    index = [group_index(width, level)[order].tolist() for level in levels]
    scales = [scale.T.contiguous() for scale, _ in grids]  # (groups, rows)
    zeros = [zero.T.contiguous() for _, zero in grids]
    if all(i == index[0] for i in index):
        scale, zero = torch.cat(scales, 1), torch.cat(zeros, 1)
        return lambda j: (scale[index[0][j]], zero[index[0][j]])

    def look_up(j: int) -> Grid:
        rows = [i[j] for i in index]
        return (
            torch.cat([s[g] for s, g in zip(scales, rows, strict=True)]),
            torch.cat([z[g] for z, g in zip(zeros, rows, strict=True)]),
        )

    return look_up


def _round_column(
    column: Tensor,  # (rows,): weights in, codes out
    scale: Tensor,
    zero: Tensor,
    top: Tensor,
    pivot: float,  # the factor's diagonal entry
    code: Tensor,  # (rows,), scratch
    gap: Tensor,  # (rows,): (rounded - weight) / pivot out
) -> None:
    torch.div(column, scale, out=code)
    code.add_(zero).round_().clamp_min_(0)
    torch.minimum(code, top, out=code)
    torch.sub(code, zero, out=gap)
    gap.mul_(scale).sub_(column).mul_(1.0 / pivot)
    column.copy_(code)
