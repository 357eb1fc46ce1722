"""Racing: candidates are scored on ever more windows, and leave once they are surely worse."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, stdev

from autocompress.core import Allocation, Problem, Score, Trial

FIRST = 4  # windows that everyone is scored on; fewer say nothing of the spread
SURE = 2.5  # standard errors
PROVEN = 2.0  # the same, by which an answer must beat the simple ones to replace them
SIMPLE = {  # roles of baselines, which searched answers must beat -> what reports call them
    "uniform": "uniform",
    "mix": "llama.cpp's mix",
    "ends": "first and last blocks high",
    "ilp": "additive ILP",
}


def race(
    problem: Problem,
    candidates: Sequence[Allocation],
    tokens: int,
    origin: str,
    seed: int = 0,
) -> list[Trial]:
    """The candidates that may still be the best after `tokens` tokens, best first.

    Windows differ far more than candidates do, so candidates are compared window by window: one
    leaves when its mean difference to the best exceeds `SURE` standard errors of the difference.
    Windows double from stage to stage; those of a stage are the first of the next, so nothing is
    scored twice.

    Args:
        candidates: at least one.
        tokens: of the last stage; whole windows, at most the search split.
        seed: of the windows.

    References:
        Maron, Moore, Hoeffding Races, NeurIPS 1993.
    """
    stage = FIRST * problem.window
    alive = list(dict.fromkeys(candidates))
    while True:
        fidelity = problem.fidelity(min(stage, tokens), seed)
        trials = sorted(problem.evaluate(alive, fidelity, origin), key=lambda trial: trial.loss)
        trials = [trial for trial in trials if not surely_worse(trial.score, trials[0].score)]
        if fidelity == problem.fidelity(tokens, seed):
            return trials
        if len(trials) == 1:  # nobody is left to race: score the winner on everything
            stage = tokens
        alive, stage = [trial.allocation for trial in trials], 2 * stage


def surely_worse(one: Score, other: Score, errors: float = SURE) -> bool:
    """Whether `one` has a higher loss than `other`, judged by the windows of both.

    Args:
        errors: standard errors of the mean difference that it must exceed.
    """
    if not math.isfinite(one.loss):
        return math.isfinite(other.loss)
    gaps = [a - b for a, b in zip(one.losses, other.losses, strict=True)]
    if len(gaps) < FIRST or not math.isfinite(other.loss):
        return False
    return fmean(gaps) > errors * stdev(gaps) / math.sqrt(len(gaps))


def ranked(raced: Mapping[str, Trial], simple: Collection[str]) -> list[str]:
    """Roles by loss, the best first, where simple answers stay unless they are surely worse.

    What a search chose on its own windows looks better there than it is, and on a few others it
    may do so by chance. A role that is not simple thus comes behind the best of the simple ones
    unless its loss is lower by `PROVEN` standard errors of the difference.

    Args:
        raced: role -> trial; all on the same windows, the simplest first.
        simple: roles of baselines.
    """
    by_loss = sorted(raced, key=lambda role: raced[role].loss)
    plain = [role for role in by_loss if role in simple]
    others = [role for role in by_loss if role not in simple]
    if not plain:
        return others
    bar = raced[plain[0]].score
    proven = [role for role in others if surely_worse(bar, raced[role].score, PROVEN)]
    return proven + plain + [role for role in others if role not in proven]
