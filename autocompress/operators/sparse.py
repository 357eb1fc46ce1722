"""Sparse weights: SparseGPT with a refit of what is kept, Wanda, magnitude; quantized or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from autocompress.levels import Joint, Level, Prune
from autocompress.operators import Solution, Solver, Statistics, operator
from autocompress.operators.columns import Plan, sweep_plans
from autocompress.operators.masks import keep_largest, rule_mask
from autocompress.operators.measure import Measure, refit
from autocompress.operators.scales import group_scales


@operator(Prune)
def prune(
    weights: Sequence[Tensor], statistics: Statistics, levels: Sequence[Level], solver: Solver
) -> list[list[Solution]]:
    """Every weight at every sparse level.

    Args:
        weights: each (out_i, in), float32; they share one input.
        statistics: of that input; without, the largest weights are kept as they are.
        levels: all `Prune`.
        solver: settings.

    Returns:
        [weight][level] solutions.

    Raises:
        ModelError: the Hessian cannot be factorised at any damping up to 1.

    References:
        Frantar, Alistarh, SparseGPT, arXiv:2301.00774, algorithm 1.
    """
    wanted = [level for level in levels if isinstance(level, Prune)]
    measure = Measure.of(statistics, solver)
    plans = sparse_plans(weights, measure, wanted, solver)
    return [
        [measure(weight, plans[level][number].packed()) for level in wanted]
        for number, weight in enumerate(weights)
    ]


def sparse_plans(
    weights: Sequence[Tensor], measure: Measure, levels: Sequence[Prune], solver: Solver
) -> dict[Prune, list[Plan]]:  # level -> one plan per weight
    """Weights with their masks, dropped ones zero, the others refitted."""
    unique = list(dict.fromkeys(levels))
    plans = [Plan(level, weight.float()) for level in unique for weight in weights]
    hessian = measure.hessian
    if hessian is not None and solver.pruning == "sparsegpt":
        plans = sweep_plans(plans, measure.statistics, solver)
    else:
        plans = [_by_rule(plan, hessian, solver) for plan in plans]
    if measure.assumed is not None and solver.refit:
        dense = [weight.float() for _ in unique for weight in weights]
        plans = [
            _refitted(plan, weight, measure.assumed, solver.refit)
            for plan, weight in zip(plans, dense, strict=True)
        ]
    count = len(weights)
    return {level: plans[i * count : (i + 1) * count] for i, level in enumerate(unique)}


def _by_rule(plan: Plan, hessian: Tensor | None, solver: Solver) -> Plan:
    assert plan.prune is not None
    keep = rule_mask(plan.weight, hessian, plan.prune, solver.pruning)
    return replace(plan, weight=plan.weight * keep, keep=keep)


def _refitted(plan: Plan, dense: Tensor, assumed: Tensor, steps: int) -> Plan:
    assert plan.keep is not None
    return replace(plan, weight=refit(dense, plan.weight, plan.keep, assumed, steps))


def sparse_code_plans(
    weights: Sequence[Tensor], measure: Measure, levels: Sequence[Joint], solver: Solver
) -> list[Plan]:  # level by level, in each weight by weight
    """Weights that are sparse and quantized.

    With refitted masks, what is kept is the best sparse weight, so the error of its codes only
    adds up with that of dropping: scales are searched for it, and GPTQ rounds it on its mask.
    Without refits mask and codes are chosen in one pass, as in SparseGPT, section 3.5.
    """
    hessian = measure.hessian
    gptq = hessian is not None and solver.method == "gptq"
    if gptq and solver.pruning == "sparsegpt" and not solver.refit:
        assert hessian is not None
        plans = [
            _in_one_pass(level, w.float(), hessian, solver) for level in levels for w in weights
        ]
        return sweep_plans(plans, measure.statistics, solver)
    sparse = sparse_plans(weights, measure, [lv.prune for lv in levels if lv.prune], solver)
    plans = [
        _with_scales(replace(plan, level=level), hessian, solver)
        for level in levels
        if level.prune is not None
        for plan in sparse[level.prune]
    ]
    if not gptq:
        return plans
    assert hessian is not None
    if not solver.refit:  # nothing has made up for what a rule dropped: the sweep does
        dense = [weight.float() for _ in levels for weight in weights]
        plans = [replace(plan, weight=w) for plan, w in zip(plans, dense, strict=True)]
    return sweep_plans(plans, measure.statistics, solver)


def _with_scales(plan: Plan, hessian: Tensor | None, solver: Solver) -> Plan:
    """Scales of what is kept: dropped weights are zero, which every grid has."""
    assert plan.quantize is not None
    width = plan.weight.shape[1]
    importance = torch.ones(width) if hessian is None else hessian.diagonal().clone()
    settings = solver.search_scales, solver.scale_bits
    grid = group_scales(plan.weight, importance, plan.quantize, *settings)
    return replace(plan, grid=grid)


def _in_one_pass(level: Joint, weight: Tensor, hessian: Tensor, solver: Solver) -> Plan:
    """A plan whose mask is still to choose, with the scales of what it will about keep."""
    assert level.prune is not None
    keep = keep_largest(weight.square() * hessian.diagonal(), level.prune)
    plan = _with_scales(Plan(level, weight * keep), hessian, solver)
    return replace(plan, weight=weight)
