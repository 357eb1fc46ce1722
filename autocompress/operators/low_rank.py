"""Low-rank weights: the best product of two thin factors for a layer's outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autocompress.levels import Dense, Level, LowRank
from autocompress.operators import Solution, Solver, Statistics, operator, solve
from autocompress.operators.measure import Measure
from autocompress.packed import Packed
from autocompress.packed.low_rank import factor_tensors

RIDGE = 1e-6  # of the mean diagonal: of least squares on factors that may repeat themselves


@operator(LowRank)
def low_rank(
    weights: Sequence[Tensor], statistics: Statistics, levels: Sequence[Level], solver: Solver
) -> list[list[Solution]]:
    """Every weight at every low-rank level.

    Args:
        weights: each (out_i, in), float32; they share one input.
        statistics: of that input.
        levels: all `LowRank`.
        solver: settings.

    Returns:
        [weight][level] solutions.

    References:
        Wang et al., SVD-LLM, arXiv:2403.07378, section 3.1: whitened by the Cholesky factor of the
        Hessian. Plain: the SVD of the weight.
    """
    measure = Measure.of(statistics, solver)
    return [
        [
            measure(weight, packed)
            for packed in pack_low_rank(
                weight, measure, [lv for lv in levels if isinstance(lv, LowRank)], solver
            )
        ]
        for weight in weights
    ]


def pack_low_rank(
    weight: Tensor,  # (out, in), float32
    measure: Measure,
    levels: Sequence[LowRank],
    solver: Solver,
) -> list[Packed]:
    """One weight at several levels, from one decomposition."""
    metric = measure.assumed if solver.low_rank == "whitened" else None
    shape = (weight.shape[0], weight.shape[1])
    ranks = [level.rank_of(shape) for level in levels]
    left, right = best_factors(weight, metric, max(ranks, default=0))
    return [
        _packed(level, weight, left[:, :rank], right[:rank], measure, solver)
        for level, rank in zip(levels, ranks, strict=True)
    ]


def best_factors(
    weight: Tensor,  # (out, in)
    hessian: Tensor | None,  # (in, in), positive definite; None is the identity
    rank: int,
) -> tuple[Tensor, Tensor]:  # (out, rank) and (rank, in), float32
    """Factors whose first r columns and rows are the best of rank r, for every r.

    With H = S S^T, the best product is U_r U_r^T W, U the left singular vectors of W S. They are
    eigenvectors of the smaller of the two Gram matrices of W S, in float64.
    """
    exact = weight.double()
    if weight.shape[0] <= weight.shape[1]:
        gram = (weight if hessian is None else weight @ hessian).double() @ exact.T
        left = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    else:
        seen = exact if hessian is None else exact @ torch.linalg.cholesky(hessian.double())
        energy, vectors = torch.linalg.eigh(seen.T @ seen)
        sizes = energy.clamp_min(0).sqrt().flip(0)[:rank]
        left = (seen @ vectors.flip(1)[:, :rank]) / sizes.clamp_min(1e-12 * sizes[:1])
    return left.float(), (left.T @ exact).float()


def _packed(
    level: LowRank,
    weight: Tensor,
    left: Tensor,  # (out, rank)
    right: Tensor,  # (rank, in)
    measure: Measure,
    solver: Solver,
) -> Packed:
    """Factors in their stored form; quantized ones one after the other, the left one refitted.

    Columns of the left factor are orthonormal, so errors of the right one's rows reach the output
    as they are: GPTQ's objective. The left factor then makes up for them.
    """
    shape = (weight.shape[0], weight.shape[1])
    if level.factors is None:
        return Packed(level, shape, factor_tensors(level, _dense(left), _dense(right)))
    stored_right = _quantized(right, measure.statistics, level.factors, solver)
    inner = stored_right.dense()
    seen = inner if measure.assumed is None else inner @ measure.assumed  # (rank, in)
    within = seen @ inner.T
    within.diagonal().add_(RIDGE * within.diagonal().mean())
    left = torch.linalg.solve(within, seen @ weight.T).T
    stored_left = _quantized(left, Statistics(within, 1), level.factors, solver)
    return Packed(level, shape, factor_tensors(level, stored_left, stored_right))


def _quantized(factor: Tensor, inputs: Statistics, level: Level, solver: Solver) -> Packed:
    ((solution,),) = solve([factor.contiguous()], inputs, [level], solver)
    return solution.packed


def _dense(factor: Tensor) -> Packed:
    shape = (factor.shape[0], factor.shape[1])
    return Packed(Dense(), shape, {"weight": factor.to(torch.bfloat16).contiguous()})
