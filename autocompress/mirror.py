"""The mirror: trials worth looking at, reported to an Optuna study that dashboards open."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

# Here and not where it is used: what optuna's imports keep of exceptions would keep a search's
# frames alive, and with them its model.
import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import DuplicatedStudyError

from autocompress.core import CostTable, SearchSpace, Trial
from autocompress.cost import LATENCY
from autocompress.errors import StudyError
from autocompress.optuna_storage import masked, open_storage, quiet, reason
from autocompress.summary import mean_bits, summary

Attribute = str | float | None

METRICS = ("loss (KL, nats/token)", "effective bits", "bytes", "ms per token")
MOST_BITS = 64.0  # upper end of the parameters' range; no level stores more per weight
RETRY = 30.0  # seconds until a storage that failed is asked again


class Mirror:
    """Reports to one Optuna study. It is written to, never searched from: not the hot path.

    Each trial has at most six summary parameters (see `summary`), because the dashboard sends every
    parameter of every trial; the whole allocation stays in the study's own table under the key
    given here. User attributes: allocation, number, origin, role, perplexity, split, tokens, seed,
    every, and every cost under its table's name.

    A storage that fails does not end a search: what it lacks is kept, offered again, and reported
    by the next run at the latest, because a resumed run reports everything once more.

    Attributes:
        seconds: that reporting took.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: SearchSpace,
        costs: Sequence[CostTable],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.seconds = 0.0
        self._study, self._space, self._costs, self._clock = study, space, tuple(costs), clock
        self._values = ("bits", "bytes", LATENCY)[: len(study.directions) - 1]
        self._mirrored = self._held()
        self._waiting: list[optuna.trial.FrozenTrial] = []
        self._failed = -math.inf  # when the storage did last

    @classmethod
    def open(
        cls, storage: str | Path, name: str, space: SearchSpace, costs: Sequence[CostTable]
    ) -> Self:
        """Create the study `name`, or continue it.

        Its objectives are the loss, effective bits and bytes, and where `costs` has latencies ms
        per token; a study that began with others is left alone, and one beside it is opened.

        Args:
            storage: an Optuna storage URL (`sqlite:///…`), or the path of a journal file.
            name: of the study; what runs that share a storage must differ in.
            costs: the trials' costs; 'bits' and 'bytes' at least.

        Raises:
            StudyError: Optuna cannot open the storage.
        """
        return cls._open(
            open_storage(storage), name, space, costs, mine=True, shown=masked(storage)
        )

    @classmethod
    def create(
        cls,
        storage: str | Path,
        names: Iterable[str],
        space: SearchSpace,
        costs: Sequence[CostTable],
    ) -> tuple[Self, str]:
        """Create a study, which no other run that shares the storage can have, and its name.

        Args:
            names: in the order of preference; the first that is free is taken.

        Raises:
            StudyError: Optuna cannot open the storage.
        """
        opened = open_storage(storage)
        for name in names:
            with suppress(DuplicatedStudyError):
                made = cls._open(opened, name, space, costs, mine=False, shown=masked(storage))
                return made, name
        raise StudyError(f"a new study must have a name. Got none that '{masked(storage)}' lacks.")

    @classmethod
    def _open(
        cls,
        storage: optuna.storages.BaseStorage,
        name: str,
        space: SearchSpace,
        costs: Sequence[CostTable],
        *,
        mine: bool,
        shown: str,
    ) -> Self:
        timed = any(table.name == LATENCY for table in costs)
        metrics = METRICS if timed else METRICS[:-1]
        try:
            with quiet():
                study = optuna.create_study(
                    storage=storage,
                    study_name=f"{name} (with latency)" if timed else name,
                    directions=["minimize"] * len(metrics),
                    load_if_exists=mine,
                )
                if len(study.directions) == len(metrics):
                    study.set_metric_names(list(metrics))
                return cls(study, space, costs)
        except optuna.exceptions.DuplicatedStudyError:
            raise
        except Exception as error:  # every storage brings exceptions of its own
            raise StudyError(
                f"storage must be a journal file or an Optuna storage URL that can be written. "
                f"Got '{shown}': {reason(error)}. Check its rights."
            ) from error

    def report(self, trial: Trial, role: str) -> None:
        """Add a trial once; a second report of the same allocation and fidelity does nothing.

        A trial of infinite loss is added as failed, so that it has no place on the front. Where
        the storage fails, a warning says so once, and the trial waits.

        Args:
            role: 'baseline', 'candidate' or 'finalist'; the first report decides.
        """
        start = self._clock()
        attributes = self._attributes(trial, role)
        if _identity(attributes) not in self._mirrored:
            self._mirrored.add(_identity(attributes))
            self._waiting.append(self._frozen(trial, attributes))
        if self._waiting and self._clock() - self._failed > RETRY:
            self._send()
        self.seconds += self._clock() - start

    def flush(self) -> None:
        """Offer what waits once more; a warning says what is still lacking."""
        if self._waiting:
            self._send()
        if self._waiting:
            warnings.warn(
                f"the Optuna storage lacks {len(self._waiting)} trials, which the run folder has. "
                "The same command reports them once the storage can be reached.",
                stacklevel=2,
            )

    def _held(self) -> set[tuple[object, ...]]:
        """What the storage has."""
        return {
            _identity(trial.user_attrs)
            for trial in self._study.get_trials(deepcopy=False)
            if "allocation" in trial.user_attrs
        }

    def _send(self) -> None:
        try:
            with quiet():
                if self._failed > -math.inf:  # it may have taken a trial whose receipt was lost
                    held = self._held()
                    self._waiting = [
                        it for it in self._waiting if _identity(it.user_attrs) not in held
                    ]
                while self._waiting:
                    self._study.add_trial(self._waiting[0])
                    del self._waiting[0]
        except Exception as error:  # every storage brings exceptions of its own
            if self._failed == -math.inf:
                warnings.warn(
                    f"the Optuna storage must stay reachable. Got: {reason(error)}. The search "
                    "goes on, and reports later.",
                    stacklevel=3,
                )
            self._failed = self._clock()

    def _frozen(self, trial: Trial, attributes: dict[str, Attribute]) -> optuna.trial.FrozenTrial:
        parameters = summary(self._space, trial.allocation)
        finite = math.isfinite(trial.loss)
        return optuna.create_trial(
            state=optuna.trial.TrialState.COMPLETE if finite else optuna.trial.TrialState.FAIL,
            values=[trial.loss, *self._cost_values(trial)] if finite else None,
            params=parameters,
            distributions=dict.fromkeys(parameters, FloatDistribution(0.0, MOST_BITS)),
            user_attrs=attributes,
        )

    def _cost_values(self, trial: Trial) -> list[float]:
        """Effective bits, and the other costs that are objectives."""
        tables = {table.name: table for table in self._costs}
        rest = [tables[name].total(trial.allocation) for name in self._values[1:]]
        return [mean_bits(self._space.layers, trial.allocation.levels), *rest]

    def _attributes(self, trial: Trial, role: str) -> dict[str, Attribute]:
        costs = {table.name: cost for table, cost in zip(self._costs, trial.costs, strict=False)}
        return {
            "allocation": trial.allocation.key,
            "number": trial.number,
            "origin": trial.origin,
            "role": role,
            "perplexity": trial.perplexity if math.isfinite(trial.perplexity) else None,
            "split": trial.fidelity.split,
            "tokens": trial.fidelity.tokens,
            "seed": trial.fidelity.seed,
            "every": trial.fidelity.every,
            **costs,
        }


def _identity(attributes: Mapping[str, object]) -> tuple[object, ...]:
    """What makes a trial itself; numbers differ between runs that share a storage."""
    same = tuple(attributes[name] for name in ("allocation", "tokens", "seed", "split"))
    return (*same, attributes.get("every", 1))
