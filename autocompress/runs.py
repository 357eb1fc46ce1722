"""A run folder that is read: its trials, and the front of those on validation windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autocompress.core import CostTable, SearchSpace, Trial
from autocompress.errors import BudgetError, StudyError
from autocompress.evaluations import TABLE, Evaluations
from autocompress.pareto import front, hypervolume, knee
from autocompress.run_record import find_run, read_record, recorded_costs, recorded_space
from autocompress.strategies.racing import PROVEN, SIMPLE, surely_worse


@dataclass(frozen=True)
class Study:
    """A study that is read: what its run folder knows now; a search may be going on in it.

    Args:
        record: settings, model and space, as `run_record` keeps them.
        evaluations: every finished trial.
    """

    path: Path
    record: Mapping[str, Any]
    space: SearchSpace
    costs: tuple[CostTable, ...]
    evaluations: Evaluations

    def table(self, name: str) -> CostTable:
        """The cost table called `name`.

        Raises:
            BudgetError: this run has no such cost.
        """
        for table in self.costs:
            if table.name == name:
                return table
        known = ", ".join(table.name for table in self.costs)
        raise BudgetError(f"--cost must be one of {known}, which '{self.path}' has. Got '{name}'.")

    def front(self, cost: str = "bits") -> Front:
        """The trials on validation windows that a search would ship: see `front_of`.

        Args:
            cost: name of a cost table, such as 'bits', 'bytes' or 'latency'.

        Raises:
            BudgetError: the run has no such cost.
            StudyError: no search of the run has come to its validation windows.
        """
        return front_of(self, cost)

    def validated(self) -> list[Trial]:
        """Trials on all validation windows, by number: those whose losses a front compares."""
        found = [
            trial
            for trial in self.evaluations.trials
            if trial.fidelity.split == "validate" and math.isfinite(trial.loss)
        ]
        most = max((trial.fidelity.tokens for trial in found), default=0)
        return [trial for trial in found if trial.fidelity.tokens == most]


def open_run(path: str | Path) -> Study:
    """Read a run folder.

    Args:
        path: the folder, or the result that it stands beside.

    Raises:
        StudyError: it is none, damaged, or of a newer version.
    """
    path = find_run(Path(path))
    record = read_record(path)
    space, costs = recorded_space(record), recorded_costs(record)
    return Study(path, record, space, costs, Evaluations.read(path / TABLE, space, costs))


@dataclass(frozen=True)
class Front:
    """The trials on validation windows that no other proven one beats in both loss and cost.

    Args:
        trials: in order of cost, a different allocation each.
        costs: of each, in the table's unit; bits are effective bits.
        knee: number of the point after which more cost buys little; None where there is none.
        reference: (cost, loss), the worst of all trials: what `hypervolume` is measured to.
    """

    cost: str
    trials: tuple[Trial, ...]
    costs: tuple[float, ...]
    knee: int | None
    reference: tuple[float, float]
    hypervolume: float

    def point(self, number: int) -> Trial:
        """The point that tables call `number`, from 1.

        Raises:
            StudyError: there is none.
        """
        if not 1 <= number <= len(self.trials):
            raise StudyError(
                f"--point must be from 1 to {len(self.trials)}, a point of the front; "
                f"`autocompress front` lists them. Got {number}."
            )
        return self.trials[number - 1]


def front_of(run: Study, cost: str = "bits", reference: Sequence[float] | None = None) -> Front:
    """The front of a run's trials on validation windows: what a search would ship.

    A trial that lost less than a simple answer of no higher cost, but not provably, is left out:
    the rule by which a search with that cost as its limit chooses.

    Args:
        cost: name of a cost table.
        reference: (cost, loss) for the hypervolume; None takes the worst of the run's own trials.

    Raises:
        BudgetError: the run has no such cost.
        StudyError: no search of the run has come to its validation windows.
    """
    table, found = run.table(cost), run.validated()
    if not found:
        raise StudyError(
            f"a front must have trials on validation windows. Got none in '{run.path}'. Let a "
            "search finish, or end it by Ctrl-C."
        )
    unique = list({trial.allocation: trial for trial in reversed(found)}.values())[::-1]
    every = cost_loss(run, table, unique)
    kept = np.flatnonzero(_first(every) & _proven(unique, every[:, 0]))
    points = every[kept]
    chosen = sorted(np.flatnonzero(front(points)), key=lambda i: points[i, 0])
    at = np.array(reference) if reference is not None else every.max(axis=0)
    return Front(
        cost,
        tuple(unique[kept[i]] for i in chosen),
        tuple(points[chosen, 0].tolist()),
        knee(points[chosen]),
        (float(at[0]), float(at[1])),
        hypervolume(points, at),
    )


def _proven(
    trials: Sequence[Trial], costs: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:  # (trials,)
    """Which trials are simple, or surely better than what is kept of all that cost no more."""
    kept = np.zeros(len(trials), dtype=np.bool_)
    best: Trial | None = None
    for i in sorted(range(len(trials)), key=lambda i: (costs[i], not is_simple(trials[i]))):
        trial = trials[i]
        kept[i] = best is None or is_simple(trial) or surely_worse(best.score, trial.score, PROVEN)
        if kept[i] and (best is None or trial.loss < best.loss):
            best = trial
    return kept


def is_simple(trial: Trial) -> bool:
    """Whether it is one of the baselines that a search must prove to beat."""
    return trial.origin.split(" ")[0] in SIMPLE


def cost_loss(
    run: Study, table: CostTable, trials: Sequence[Trial]
) -> npt.NDArray[np.float64]:  # (trials, 2)
    """Cost and loss of each trial; bits are effective bits."""
    scale = run.space.weights if table.name == "bits" else 1
    at = [it.name for it in run.costs].index(table.name)
    return np.array([(trial.costs[at] / scale, trial.loss) for trial in trials]).reshape(-1, 2)


def _first(points: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Of points that are equal the first, which is the simplest."""
    kept = np.zeros(len(points), dtype=np.bool_)
    kept[np.unique(points, axis=0, return_index=True)[1]] = True
    return kept
