"""Joint levels: sparse and quantized, outliers and codes, low-rank parts beside any of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from autocompress.levels import Joint, Level, LowRank, Prune, Quantize
from autocompress.operators import Solution, Solver, Statistics, operator, solve
from autocompress.operators.low_rank import pack_low_rank
from autocompress.operators.measure import Measure
from autocompress.operators.outliers import outlier_plans
from autocompress.operators.sparse import sparse_code_plans
from autocompress.packed import Packed


@operator(Joint)
def joint(
    weights: Sequence[Tensor], statistics: Statistics, levels: Sequence[Level], solver: Solver
) -> list[list[Solution]]:
    """Every weight at every joint level.

    Args:
        weights: each (out_i, in), float32; they share one input.
        statistics: of that input.
        levels: all `Joint`.
        solver: settings.

    Returns:
        [weight][level] solutions.

    Raises:
        ModelError: the Hessian cannot be factorised at any damping up to 1.
    """
    measure = Measure.of(statistics, solver)
    wanted = [level for level in levels if isinstance(level, Joint)]
    found: dict[Joint, list[Solution]] = {}
    for make, chosen in (
        (sparse_code_plans, [lv for lv in wanted if lv.low_rank is None and lv.prune]),
        (outlier_plans, [lv for lv in wanted if lv.low_rank is None and lv.outliers]),
    ):
        plans = iter(make(weights, measure, chosen, solver))
        for level in chosen:
            found[level] = [measure(weight, next(plans).packed()) for weight in weights]
    added = [level for level in wanted if level.low_rank is not None]
    found |= with_low_rank(weights, statistics, added, solver)
    return [[found[level][i] for level in wanted] for i in range(len(weights))]


@dataclass
class _Sum:
    """One weight at one level with a low-rank part.

    Args:
        weight: (out, in), dense.
        target: what the other parts were last solved for: the weight less its low-rank part.
        best: the solution of least error so far.
    """

    level: Joint
    weight: Tensor
    target: Tensor
    best: Solution | None = None


def with_low_rank(
    weights: Sequence[Tensor], statistics: Statistics, levels: Sequence[Joint], solver: Solver
) -> dict[Joint, list[Solution]]:  # level -> one solution per weight
    """Levels with a low-rank part: the best correction of what the other parts change.

    Solved one after the other, then `alternations` times again for what the other left, keeping
    the best: never worse than one after the other.

    References:
        Liu et al., EoRA, arXiv:2410.21271: the residual in the eigenspace of the inputs. Any
        square root of the Hessian gives the same product; see `best_factors`.
        Guo et al., LQ-LoRA, arXiv:2311.12023, section 3.1: alternation.
        Yao et al., ZeroQuant-V2, arXiv:2303.08302, LoRC: `low_rank='svd'`, no alternation.
    """
    measure = Measure.of(statistics, solver)
    sums = {level: [_Sum(level, w.float(), w.float()) for w in weights] for level in levels}
    for _ in range(1 + solver.alternations):
        for base in dict.fromkeys(level.base for level in levels):
            members = [it for level in levels if level.base == base for it in sums[level]]
            _solve_base(base, members, statistics, measure, solver)
    return {level: [it.best for it in row if it.best] for level, row in sums.items()}


def _solve_base(
    base: Prune | Quantize | Joint,
    members: Sequence[_Sum],
    statistics: Statistics,
    measure: Measure,
    solver: Solver,
) -> None:
    """Solve the base of all its levels for their targets, then their low-rank parts."""
    targets = {id(it.target): it.target for it in members}  # at first levels share the weight
    rows = solve(list(targets.values()), statistics, [base], solver)
    solved = {key: row[0].packed for key, row in zip(targets, rows, strict=True)}
    for it in members:
        stored = solved[id(it.target)]
        rest = it.weight - stored.dense()
        added = it.level.low_rank
        assert added is not None
        (correction,) = pack_low_rank(rest, measure, [added], solver)
        found = measure(it.weight, _joined(it.level, correction, stored))
        it.target = it.weight - correction.dense()
        if it.best is None or found.error < it.best.error:
            it.best = found


def _joined(level: Joint, correction: Packed, base: Packed) -> Packed:
    assert isinstance(correction.level, LowRank)
    return Packed(level, base.shape, {**correction.tensors, **base.tensors})
