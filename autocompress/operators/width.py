"""Narrower sublayers: the channels whose loss the others make up for best go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autocompress.levels import Level, Rows, Width
from autocompress.operators import Solution, Solver, Statistics, operator, output_energy, solve
from autocompress.operators.measure import Measure
from autocompress.packed import Packed

STEPS = 128  # channels that are left go in so many steps of their number, one at a time at last


@operator(Width)
def narrow(
    weights: Sequence[Tensor], statistics: Statistics, levels: Sequence[Level], solver: Solver
) -> list[list[Solution]]:
    """Every weight with some of its inputs, refitted; each chooses its own.

    Args:
        weights: each (out_i, in), float32; they share one input.
        statistics: of that input.
        levels: all `Width`.
        solver: settings.

    Returns:
        [weight][level] solutions, whose packed weights know which inputs they keep.

    References:
        Kurtic et al., ZipLM, arXiv:2302.04089, section 3.1: structured optimal brain surgeon.
    """
    measure = Measure.of(statistics, solver)
    wanted = [level for level in levels if isinstance(level, Width)]
    return [_narrowed(weight, wanted, measure, solver) for weight in weights]


def _narrowed(
    weight: Tensor, levels: Sequence[Width], measure: Measure, solver: Solver
) -> list[Solution]:
    """One weight at every width: what a smaller one keeps, a larger one keeps too."""
    hessian = torch.eye(weight.shape[1]) if measure.assumed is None else measure.assumed
    shape = (weight.shape[0], weight.shape[1])
    found: dict[Width, Solution] = {}
    for of in dict.fromkeys(level.of for level in levels):
        alike = [level for level in levels if level.of == of]
        counts = {level: level.inner_shape(shape)[1] for level in alike}
        masks = choose_inputs(weight, hessian, of, sorted(set(counts.values()), reverse=True))
        refitted = {count: refit_inputs(weight, hessian, masks[count]) for count in masks}
        for level, count in counts.items():
            kept = masks[count].clone()  # files hold each for itself
            inner = _inner(refitted[count], measure, kept, level, solver)
            found[level] = measure(weight, Packed(level, shape, inner.tensors, kept))
    return [found[level] for level in levels]


def _inner(weight: Tensor, measure: Measure, kept: Tensor, level: Width, solver: Solver) -> Packed:
    """The smaller weight as it is stored: its error only adds to that of what is gone."""
    known = measure.hessian
    own = Statistics(None if known is None else known[kept][:, kept], measure.statistics.tokens)
    ((solution,),) = solve([weight], own, [level.inner], solver)
    return solution.packed


def choose_inputs(
    weight: Tensor,  # (out, in), float32
    hessian: Tensor,  # (in, in), positive definite
    of: int,  # inputs of a channel
    counts: Sequence[int],  # inputs to keep, falling; multiples of `of`
) -> dict[int, Tensor]:  # count -> (in,), bool
    """Which inputs to keep, channel by channel.

    Leaving out the inputs S, with all others refitted, adds tr(W_S (H^-1)_SS^-1 W_S^T) to the
    error; the channels of least error go, and the others take over. Many channels go a few at a
    time, those of least error together.
    """
    solved, inverse = weight.clone(), torch.linalg.inv(hessian.double()).float()
    left = torch.ones(weight.shape[1] // of, dtype=torch.bool)
    found: dict[int, Tensor] = {}
    for count in counts:
        while (over := int(left.sum()) - count // of) > 0:
            errors = _errors(solved, inverse, of).masked_fill(~left, torch.inf)
            most = max(1, min(over, int(left.sum()) // STEPS))
            gone = errors.topk(most, largest=False).indices
            left[gone] = False
            places = (gone[:, None] * of + torch.arange(of)).flatten()
            _leave_out(solved, inverse, places)
        found[count] = left.repeat_interleave(of)
    return found


def _errors(solved: Tensor, inverse: Tensor, of: int) -> Tensor:  # (channels,)
    """What leaving out each channel alone adds; of those that are gone, anything."""
    channels = inverse.shape[0] // of
    if of == 1:
        return solved.square().sum(0) / inverse.diagonal().clamp_min(torch.finfo().tiny)
    blocks = inverse.view(channels, of, channels, of).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    gram = solved.T @ solved
    own = gram.view(channels, of, channels, of).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return torch.stack(
        [
            torch.trace(torch.linalg.pinv(a, hermitian=True) @ b)
            for a, b in zip(blocks, own, strict=True)
        ]
    )


def _leave_out(solved: Tensor, inverse: Tensor, places: Tensor) -> None:
    """Set inputs to zero, let the others make up for them, and forget them in the inverse."""
    within = inverse[places][:, places]
    push = torch.linalg.solve(within, inverse[places])  # (places, in)
    solved -= solved[:, places] @ push
    inverse -= inverse[:, places] @ push
    solved[:, places] = 0
    inverse[places] = 0
    inverse[:, places] = 0


def refit_inputs(
    weight: Tensor,  # (out, in)
    hessian: Tensor,  # (in, in), positive definite
    kept: Tensor,  # (in,), bool
) -> Tensor:  # (out, kept), float32
    """The best weight on some inputs for the outputs of all: W H_K (H_KK)^-1."""
    exact = hessian.double()
    factor = torch.linalg.cholesky(exact[kept][:, kept])
    return torch.cholesky_solve(exact[kept] @ weight.double().T, factor).T.float().contiguous()


@operator(Rows)
def keep_rows(
    weights: Sequence[Tensor], statistics: Statistics, levels: Sequence[Level], solver: Solver
) -> list[list[Solution]]:
    """Every weight with the outputs that are read still; those of most energy where nobody says.

    The error is that of the outputs kept: nobody reads the others.
    """
    return [
        [_rows(weight, level, statistics, solver) for level in levels if isinstance(level, Rows)]
        for weight in weights
    ]


def _rows(weight: Tensor, level: Rows, statistics: Statistics, solver: Solver) -> Solution:
    shape = (weight.shape[0], weight.shape[1])
    level.inner_shape(shape)  # channels are whole
    kept = statistics.kept.get(level.percent)
    if kept is None:
        kept = _largest(weight, level, statistics)
    kept = kept.repeat_interleave(shape[0] // len(kept))
    ((inner,),) = solve([weight[kept]], statistics, [level.inner], solver)
    rows = torch.zeros(shape[0])
    rows[kept] = inner.rows
    return Solution(Packed(level, shape, inner.packed.tensors, kept), inner.error, rows)


def _largest(weight: Tensor, level: Rows, statistics: Statistics) -> Tensor:  # (channels,), bool
    energy = output_energy(weight, statistics.known).view(-1, level.of).sum(1)
    count = level.inner_shape((weight.shape[0], weight.shape[1]))[0] // level.of
    return torch.zeros(len(energy), dtype=torch.bool).index_fill_(
        0, energy.topk(count).indices, True
    )
