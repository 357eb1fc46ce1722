"""Optuna's samplers: they ask for points, are told losses, and learn where to ask next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from autocompress.core import Allocation, Fidelity, Problem, Trial
from autocompress.errors import ConfigError
from autocompress.optuna_storage import quiet
from autocompress.tables import did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import optuna

# name -> class in optuna.samplers, and the package that it needs beside Optuna's own
SAMPLERS: Mapping[str, tuple[str, str | None]] = {
    "tpe": ("TPESampler", None),
    "gp": ("GPSampler", "torch"),  # which Optuna imports, and only once it fits
    "nsgaii": ("NSGAIISampler", None),
    "cmaes": ("CmaEsSampler", "cmaes"),
}


def check_sampler(name: str) -> None:
    """Check that a sampler exists and can run.

    Raises:
        ConfigError: it does not, or its package is not installed.
    """
    if name not in SAMPLERS:
        raise ConfigError(
            f"sampler must be one of {', '.join(SAMPLERS)}. Got '{name}'."
            f"{did_you_mean(name, SAMPLERS)}"
        )
    package = SAMPLERS[name][1]
    if package is not None and find_spec(package) is None:
        raise ConfigError(
            f"the sampler '{name}' must have the package '{package}', which is not installed. "
            f"Run: pip install {package}"
        )


def minimize(
    problem: Problem,
    sampler: str,
    propose: Callable[[optuna.Trial], Allocation],
    first: Mapping[str, Any],
    candidates: int,
    fidelity: Fidelity,
    origin: str,
    rng: np.random.Generator,
) -> Iterator[Trial]:
    """The best trial so far, after every candidate.

    The study lives in memory: the project's own answers what is known, so resume is replay.

    Args:
        sampler: a name in `SAMPLERS`.
        propose: the allocation of the parameters it suggests to itself; within every budget.
        first: parameters of the first candidate.
        candidates: at least 1, the first included.
        rng: seeds the sampler.
    """
    import optuna

    with quiet():
        seeded = getattr(optuna.samplers, SAMPLERS[sampler][0])(seed=int(rng.integers(2**31)))
        study = optuna.create_study(sampler=seeded)
        study.enqueue_trial(dict(first))
    best: Trial | None = None
    for _ in range(candidates):
        with quiet():
            asked = study.ask()
            allocation = propose(asked)
        (trial,) = problem.evaluate([allocation], fidelity, origin)
        with quiet():
            if math.isfinite(trial.loss):
                study.tell(asked, trial.loss)
            else:
                study.tell(asked, state=optuna.trial.TrialState.FAIL)
        best = trial if best is None else min(best, trial, key=lambda it: it.loss)
        yield best
