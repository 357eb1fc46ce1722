"""Which weights a sparse level keeps: the largest by a score, exactly as many as it stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autocompress.levels import Prune


def keep_largest(
    score: Tensor,  # (out, in)
    level: Prune,
    rows_alike: bool = False,
) -> Tensor:  # (out, in), bool
    """The mask of the largest scores.

    Args:
        level: how many to keep, and of which neighbours.
        rows_alike: every output keeps as many, give or take one; else the largest of all.
    """
    rows, width = score.shape
    kept = level.kept((rows, width))
    if level.of is not None:
        return _keep(score.reshape(-1, level.of), level.kept_of).view(rows, width)
    if not rows_alike:
        return _keep(score.reshape(1, -1), kept).view(rows, width)
    counts = [kept * (i + 1) // rows - kept * i // rows for i in range(rows)]
    return torch.cat([_keep(row, n) for row, n in zip(score.split(1), counts, strict=True)])


def _keep(score: Tensor, count: int) -> Tensor:
    """The `count` largest of each row."""
    kept = score.topk(count, sorted=False).indices
    return torch.zeros(score.shape, dtype=torch.bool).scatter_(1, kept, True)


def rule_mask(
    weight: Tensor,  # (out, in)
    hessian: Tensor | None,  # (in, in); None is no statistics: magnitude
    level: Prune,
    pruning: str,
) -> Tensor:  # (out, in), bool
    """The mask of a rule that looks at one weight at a time: 'wanda' or 'magnitude'.

    References:
        Sun et al., Wanda, arXiv:2306.11695, equation 1: |w| times the norm of its input, compared
        within an output.
    """
    if pruning != "wanda" or hessian is None:
        return keep_largest(weight.abs(), level)
    norms = hessian.diagonal().clamp_min(0).sqrt()
    return keep_largest(weight.abs() * norms, level, rows_alike=True)


class AdaptiveMask:
    """SparseGPT's mask, chosen during a sweep from weights that already make up for others.

    Dropping a weight adds (w / U_jj)^2 to the error, U the sweep's factor; keeping it may add an
    error of its own, which is taken off. Groups of n:m are chosen when the sweep reaches them, any
    weights block by block. A block drops as many as (w^2 / (H^-1)_jj) of all columns gives it
    beforehand; as many in every block, as in the paper, would not suit columns that are sorted by
    their inputs.

    Args:
        stack: (in, rows), in solved order, as the sweep works on it.
        segments: rows of each weight at each level; all levels choose of as many neighbours.
        factor: (in, in), upper, of the sweep.
        block: columns per choice.
        gap: (first, end) columns -> (columns, rows), what keeping changes; None is nothing.

    References:
        Frantar, Alistarh, SparseGPT, arXiv:2301.00774, algorithm 1.
    """

    def __init__(
        self,
        stack: Tensor,
        segments: Sequence[tuple[slice, Prune]],
        factor: Tensor,
        block: int,
        gap: Callable[[int, int], Tensor] | None = None,
    ) -> None:
        self.keep = torch.ones(stack.shape, dtype=torch.bool)
        self._stack, self._segments, self._block, self._gap = stack, segments, block, gap
        self._pivots, self._of = factor.diagonal().unsqueeze(1), segments[0][1].of
        alone = factor.square().sum(0).unsqueeze(1)  # diagonal of the whole inverse
        masks = [
            keep_largest(stack[:, rows].square() / alone, level)
            for rows, level in segments
            if level.of is None
        ]
        self._kept = [[int(part.sum()) for part in mask.split(block)] for mask in masks]

    def begin(self, first: int, end: int) -> None:
        """Choose among the weights of a block, where any may be dropped."""
        if self._of is not None:
            return
        score = self._score(first, end)
        for (rows, _), kept in zip(self._segments, self._kept, strict=True):
            chosen = _keep(score[:, rows].reshape(1, -1), kept[first // self._block])
            self.keep[first:end, rows] = chosen.view(end - first, -1)

    def reach(self, j: int) -> None:
        """Choose among the weights of the groups of n:m that begin at column j."""
        if self._of is None or j % self._of:
            return
        score = self._score(j, j + self._of)
        for rows, level in self._segments:
            self.keep[j : j + self._of, rows] = _keep(score[:, rows].T, level.kept_of).T

    def _score(self, first: int, end: int) -> Tensor:  # (columns, rows)
        score = self._stack[first:end].square()
        if self._gap is not None:
            score -= self._gap(first, end).square_()
        return score / self._pivots[first:end].square()
