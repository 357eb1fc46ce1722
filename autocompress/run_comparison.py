"""Two runs against each other, window by window, point by point of their fronts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from autocompress.errors import StudyError
from autocompress.runs import Front, Study, cost_loss, front_of

SURE = 0.95  # confidence of the intervals


def compare_runs(one: Study, other: Study, cost: str = "bits") -> dict[str, Any]:
    """The losses of two runs on the same validation windows at equal cost.

    Each point of the first front meets the best point of the second that costs no more; the
    difference is taken window by window, with a Student-t interval of its mean.

    Returns:
        `points`, each with cost, loss and origin of both, `difference` (other − one, nats/token),
        `low` and `high` (95 %); `hypervolume` of both to one `reference`; `windows`.

    Raises:
        StudyError: the runs are of different models or windows, or one has no front yet, or one
            of fewer windows.
    """
    _check_alike(one, other)
    worst = [
        max(pair)
        for pair in zip(
            *(cost_loss(run, run.table(cost), run.validated()).max(axis=0) for run in (one, other)),
            strict=True,
        )
    ]
    first, second = (front_of(run, cost, worst) for run in (one, other))
    return {
        "runs": [str(one.path), str(other.path)],
        "cost": cost,
        "windows": len(first.trials[0].score.losses),
        "reference": worst,
        "hypervolume": [first.hypervolume, second.hypervolume],
        "points": [row for i in range(len(first.trials)) if (row := _row(first, i, second))],
    }


def _row(first: Front, index: int, second: Front) -> dict[str, Any] | None:
    """A point of the first front beside the best of the second at no more cost."""
    costs = [i for i, cost in enumerate(second.costs) if cost <= first.costs[index]]
    if not costs:
        return None
    rival = costs[-1]  # of a front, the dearest loses least
    ours, theirs = first.trials[index], second.trials[rival]
    mean, low, high = interval(
        [b - a for a, b in zip(ours.score.losses, theirs.score.losses, strict=True)]
    )
    return {
        "costs": [first.costs[index], second.costs[rival]],
        "losses": [ours.loss, theirs.loss],
        "origins": [ours.origin, theirs.origin],
        "difference": mean,
        "low": low,
        "high": high,
    }


def interval(gaps: Sequence[float]) -> tuple[float, float, float]:
    """Mean of differences and its confidence interval; without end where one window was scored."""
    from scipy.stats import t

    mean = fmean(gaps)
    if len(gaps) < 2:
        return mean, -math.inf, math.inf
    margin = float(t.ppf((1 + SURE) / 2, len(gaps) - 1)) * stdev(gaps) / math.sqrt(len(gaps))
    return mean, mean - margin, mean + margin


def _check_alike(one: Study, other: Study) -> None:
    """Check that the losses of two runs compare.

    Raises:
        StudyError: another model, other windows, or nothing on them.
    """
    models = [run.record["model"] for run in (one, other)]
    if models[0]["fingerprint"] != models[1]["fingerprint"]:
        raise StudyError(
            f"runs that are compared must be of one dense model. Got '{models[0]['name']}' and "
            f"'{models[1]['name']}', whose weights differ. Name runs of the same model."
        )
    windows = [run.record["windows"] for run in (one, other)]
    if windows[0] != windows[1]:
        raise StudyError(
            "runs that are compared must have the same validation windows. Got others: another "
            "text, window or split sizes. Repeat one with the other's settings."
        )
    for run in (one, other):
        if not run.validated():
            front_of(run)  # says what is missing
    scored = [len(run.validated()[0].score.losses) for run in (one, other)]
    if scored[0] != scored[1]:
        raise StudyError(
            f"runs that are compared must have scored as many validation windows. Got {scored[0]} "
            f"and {scored[1]}: a search was stopped before its race. Let it finish."
        )
