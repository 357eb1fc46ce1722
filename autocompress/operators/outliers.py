"""Quantized weights with a few outliers beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from autocompress.levels import Joint, Quantize
from autocompress.operators import TINY, Solver
from autocompress.operators.columns import Grid, Plan, round_to, sweep_plans
from autocompress.operators.measure import Measure, refit
from autocompress.operators.scales import group_scales
from autocompress.packed.quantized import spread

PASSES = 2  # of choosing outliers and, without them, scales
CANDIDATES = 2  # times as many as are kept are left out of the first scales


def outlier_plans(
    weights: Sequence[Tensor], measure: Measure, levels: Sequence[Joint], solver: Solver
) -> list[Plan]:  # level by level, in each weight by weight
    """Outliers chosen, the others quantized around them, outliers refitted to what that changed.

    References:
        Dettmers et al., SpQR, arXiv:2306.03078, section 4: outliers by their Hessian-weighted
        error, here by the diagonal, as scales are searched.
    """
    plans = [
        choose_outliers(Plan(level, weight.float()), measure.hessian, solver)
        for level in levels
        for weight in weights
    ]
    if measure.hessian is None or solver.method == "rtn":
        return plans
    assert measure.assumed is not None
    dense = [plan.weight for plan in plans]
    found = []
    for plan, weight in zip(sweep_plans(plans, measure.statistics, solver), dense, strict=True):
        assert plan.exact is not None
        better = refit(weight, plan.weight, plan.exact, measure.assumed, solver.refit)
        found.append(replace(plan, weight=better))
    return found


def choose_outliers(plan: Plan, hessian: Tensor | None, solver: Solver) -> Plan:
    """The plan with the weights whose rounding costs most as outliers, and the others' scales.

    What a group's range makes room for costs nothing, so the first scales are made without the
    weights that stand out in their groups; those that cost most under them are left out next.
    """
    weight, quantize = plan.weight, plan.quantize
    assert isinstance(plan.level, Joint) and plan.level.outliers is not None
    assert quantize is not None
    importance = torch.ones(weight.shape[1]) if hessian is None else hessian.diagonal().clone()
    count = plan.level.outliers.count((weight.shape[0], weight.shape[1]))

    settings = solver.search_scales, solver.scale_bits

    def scales(among: Tensor) -> Grid:
        return group_scales(among, importance, quantize, *settings)

    exact = _largest(_standing_out(weight, quantize), CANDIDATES * count)
    for _ in range(PASSES):
        grid = scales(weight.masked_fill(exact, 0))
        scale, zero = (spread(part, quantize, weight.shape[1]) for part in grid)
        rounded = round_to(weight, scale, zero, (1 << quantize.bits) - 1)
        exact = _largest(rounded.sub_(weight).square_() * importance, count)
    grid = scales(weight.masked_fill(exact, 0))
    return replace(plan, exact=exact, grid=grid)


def _standing_out(weight: Tensor, level: Quantize) -> Tensor:  # (out, in)
    """How often each weight is as large as its group's root mean square."""
    rows, width = weight.shape
    size, groups = level.group_size or width, level.groups(width)
    tiles = torch.nn.functional.pad(weight, (0, groups * size - width)).view(rows, groups, size)
    return weight.abs() / spread(tiles.square().mean(2).sqrt().clamp_min(TINY), level, width)


def _largest(score: Tensor, count: int) -> Tensor:  # (out, in), bool
    """The `count` largest, or all."""
    chosen = score.flatten().topk(min(count, score.numel()), sorted=False).indices
    mask = torch.zeros(score.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
    return mask.view(score.shape)
