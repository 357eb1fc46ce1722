"""The column sweep that GPTQ and SparseGPT share: fix a column, let the later ones make up for it.

The rows of every (weight, level) are stacked: they share the Hessian, so one sweep over the columns
solves them all. The stack is kept transposed, (in, rows), so that a column is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autocompress.errors import ModelError
from autocompress.operators import Solver, Statistics

INNER, OUTER = 32, 256  # columns per rank-1 block and per lazy update: both fit the caches
Step = Callable[[int, Tensor, float, Tensor], None]
Begin = Callable[[int, int], None]


def no_preparation(first: int, end: int) -> None:
    """A sweep's block needs none."""


def damped(hessian: Tensor, damping: float) -> Tensor:  # (in, in)
    """The Hessian with a fraction `damping` of its diagonal's mean added to the diagonal.

    An input that was never active has a zero diagonal: it gets the mean, so its weights are
    simply rounded (never set to zero: the channel may be active on other text).
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    return hessian.diagonal_scatter(diagonal + damping * diagonal.mean())


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:  # (in, in), upper
    """Upper Cholesky factor of the damped inverse Hessian.

    Raises:
        ModelError: there is none at any damping up to 1.
    """
    while damping <= 1.0:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping))
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


def column_order(diagonal: Tensor, of: int | None, solver: Solver) -> Tensor:  # (in,), int64
    """By falling Hessian diagonal if the solver says so; the groups of n:m stay together."""
    if not solver.activation_order:
        return torch.arange(len(diagonal))
    if of is None:
        return torch.argsort(diagonal, descending=True, stable=True)
    groups = torch.argsort(diagonal.view(-1, of).sum(1), descending=True, stable=True)
    return (groups.unsqueeze(1) * of + torch.arange(of)).flatten()


def ordered_factor(
    statistics: Statistics, of: int | None, solver: Solver
) -> tuple[Tensor, Tensor]:  # (in,) and (in, in)
    """The order that columns are solved in, and the factor of the inverse Hessian in that order.

    Args:
        statistics: not empty.
        of: m of n:m, None for any weights.

    Raises:
        ModelError: there is none at any damping up to 1.
    """
    hessian = statistics.known
    assert hessian is not None
    key = (of if solver.activation_order else None, solver.activation_order, solver.damping)
    if key not in statistics.factors:
        order = column_order(hessian.diagonal(), of, solver)
        factor = inverse_factor(hessian[order][:, order], solver.damping)
        statistics.factors[key] = order, factor
    return statistics.factors[key]


def sweep(
    stack: Tensor,  # (in, rows): weights in, what `step` leaves out
    factor: Tensor,  # (in, in), upper
    step: Step,
    begin: Begin = no_preparation,
    block: int = OUTER,
) -> Tensor:  # (rows,), damped Hessian error
    """Solve column after column, pushing each column's error onto the columns still to come.

    Within `INNER` columns errors are pushed one by one, within a block together, then to the rest.

    Args:
        step: (column number, column (rows,), the factor's diagonal entry, gap (rows,)): writes the
            solution into the column and (solution - weight) / entry into the gap.
        begin: (first, end) columns of a block, called when all columns before it are solved.
        block: columns per lazy update, a multiple of `INNER`.
    """
    width, rows = stack.shape
    error = torch.zeros(rows)
    pushed = torch.empty(block, rows)
    for outer in range(0, width, block):
        outer_end = min(outer + block, width)
        begin(outer, outer_end)
        for inner in range(outer, outer_end, INNER):
            inner_end = min(inner + INNER, outer_end)
            for j in range(inner, inner_end):
                gap = pushed[j - outer]
                step(j, stack[j], float(factor[j, j]), gap)
                error.addcmul_(gap, gap)
                if j + 1 < inner_end:
                    stack[j + 1 : inner_end].addr_(factor[j, j + 1 : inner_end], gap)
            late = factor[inner:inner_end, inner_end:outer_end]
            stack[inner_end:outer_end].addmm_(late.T, pushed[inner - outer : inner_end - outer])
        stack[outer_end:].addmm_(factor[outer:outer_end, outer_end:].T, pushed[: outer_end - outer])
    return error
