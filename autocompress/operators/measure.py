"""The error of a stored weight, measured against the dense one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from autocompress.operators import TINY, Solution, Solver, Statistics, output_energy
from autocompress.operators.sweep import damped
from autocompress.packed import Packed


@dataclass(frozen=True)
class Measure:
    """Output errors of layers that share an input.

    Args:
        statistics: of that input.
        hessian: (in, in) as it was measured; None without statistics.
        assumed: (in, in), damped: what is minimised.
        judged: (in, in), what errors are told in: as assumed, but where codes are only rounded.
    """

    statistics: Statistics
    hessian: Tensor | None
    assumed: Tensor | None
    judged: Tensor | None

    @classmethod
    def of(cls, statistics: Statistics, solver: Solver) -> Measure:
        """The measure that all levels of a database share."""
        known = statistics.known
        if known is None:
            return cls(statistics, None, None, None)
        assumed = damped(known, solver.damping)
        return cls(statistics, known, assumed, known if solver.method == "rtn" else assumed)

    def __call__(self, weight: Tensor, packed: Packed) -> Solution:
        """A stored weight and its error beside `weight`, (out, in)."""
        rows = output_energy(packed.dense() - weight, self.judged)
        energy = output_energy(weight, self.hessian).sum().clamp_min(TINY)
        return Solution(packed, float(rows.sum() / energy), rows)


def refit(
    weight: Tensor,  # (out, in), dense
    solution: Tensor,  # (out, in), where to begin
    free: Tensor,  # (out, in), bool: entries that may move
    hessian: Tensor,  # (in, in), positive definite
    steps: int,
) -> Tensor:  # (out, in), float32
    """The free entries of a solution moved to the least output error, the others as they are.

    A sweep lets a column make up only for those before it; `steps` conjugate gradients, every
    output for itself, preconditioned by the diagonal, let all make up for all. The error never
    rises.

    References:
        Meng et al., ALPS, arXiv:2406.07831: least squares on a mask by preconditioned conjugate
        gradients.
    """
    solution, diagonal = solution.clone(), hessian.diagonal()
    residual = ((weight - solution) @ hessian) * free
    towards = residual / diagonal
    direction, size = towards.clone(), (residual * towards).sum(1, keepdim=True)
    for _ in range(steps):
        moved = (direction @ hessian) * free
        length = size / (direction * moved).sum(1, keepdim=True).clamp_min(TINY)
        solution += length * direction
        residual -= length * moved
        towards = residual / diagonal
        before, size = size, (residual * towards).sum(1, keepdim=True)
        direction = towards + size / before.clamp_min(TINY) * direction
    return solution
