"""The study: the append-only table of every evaluation, which is also the memory for resume."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from autocompress.core import Allocation, CostTable, Fidelity, Score, SearchSpace, Trial
from autocompress.errors import OutputError, SpaceError, StudyError
from autocompress.files import exclusive, write_json
from autocompress.jsonl import JsonLines, Row, damaged, write_row
from autocompress.levels import parse_level

Measure = Callable[[Allocation, Fidelity, int], Score]  # (…, windows known): of those behind

LOCK = "study.lock"
FORMAT = 2  # of the rows
FACTS = "study.json"
TABLE = "evaluations.jsonl"


class Study:
    """Every evaluation of a run folder, from this run and earlier ones.

    Inside `with`, the folder belongs to this process alone, `evaluate` answers what is known
    and records the rest, one durable row each, so a run that is killed at any moment loses at
    most the evaluation it was in. Windows that an allocation was scored on are not scored again
    when another fidelity of the same seed names them.

    Args:
        path: the run folder; created when missing.
        space: every allocation must be in it.
        costs: the trials' costs, asked of these tables.
        facts: what the losses depend on (fingerprints of model, calibration, space, database);
            a folder that was recorded under other facts is refused. Values are JSON.
        score: (allocation, fidelity, known) -> its score on all but the first `known` windows of
            the fidelity; the expensive part.
        clock: seconds, for the recorded duration.

    Attributes:
        trials: all finished evaluations by number.
        fresh: evaluations that this session ran.
        spent: tokens ever scored for this study, by split, or by what `spend` was told.
        spent_until: all tokens that were spent when each trial was done, aligned with `trials`.

    Raises:
        StudyError: on entering, the folder is in use, foreign, damaged or of other facts.
        OutputError: the disk refused a write; what was recorded before stays loadable.
    """

    def __init__(
        self,
        path: Path,
        space: SearchSpace,
        costs: Sequence[CostTable],
        facts: Mapping[str, Any],
        score: Measure,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.path = path
        self.trials: list[Trial] = []
        self.fresh = 0
        self.spent: Counter[str] = Counter()
        self.spent_until: list[int] = []
        self._space, self._costs, self._score, self._clock = space, tuple(costs), score, clock
        as_read = json.loads(write_row(facts))  # tuples are lists
        self._facts = {"format": FORMAT, **as_read}
        self._known: dict[tuple[str, Fidelity], Trial] = {}
        self._longest: dict[tuple[str, int, str], Trial] = {}  # by allocation, seed and split
        self._allocations: dict[str, Allocation] = {}

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            try:
                opened.enter_context(exclusive(self.path / LOCK, StudyError, _two_runs(self.path)))
            except OSError as error:
                raise OutputError(
                    f"a study must be able to write its folder '{self.path}'. Got: {error}. "
                    "Choose another folder."
                ) from error
            _check_facts(self.path, self._facts)
            self._table = opened.enter_context(closing(JsonLines(self.path / TABLE)))
            for line, row in enumerate(self._table.load(), start=1):
                self._remember(row, line)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    def evaluate(
        self, allocations: Sequence[Allocation], fidelity: Fidelity, origin: str
    ) -> list[Trial]:
        """Trials of `allocations`, in order; what is known is not scored again.

        They are scored in the order of their levels, so that those that begin alike follow each
        other: the score of one may then use what it shares with the one before.

        Raises:
            SpaceError: an allocation is not in the space.
            OutputError: a row could not be written.
        """
        alike = sorted(allocations, key=lambda it: [str(level) for level in it.levels])
        for allocation in alike:
            self._evaluate(allocation, fidelity, origin)
        return [self._evaluate(allocation, fidelity, origin) for allocation in allocations]

    @property
    def tokens(self) -> int:
        """All tokens ever scored for this study."""
        return self.spent.total()

    def at(self, fidelity: Fidelity) -> list[Trial]:
        """The trials of one fidelity, whose losses can be compared, by number."""
        return [trial for trial in self.trials if trial.fidelity == fidelity]

    def spend(self, tokens: int, what: str) -> None:
        """Record `tokens` that were scored outside an evaluation, such as for sensitivities."""
        self._table.append([{"spent": what, "tokens": tokens}])
        self.spent[what] += tokens

    def _evaluate(self, allocation: Allocation, fidelity: Fidelity, origin: str) -> Trial:
        known = self._known.get((allocation.key, fidelity))
        if known is not None:
            return known
        if allocation not in self._space:
            raise SpaceError(
                f"an evaluated allocation must be in the search space '{self._space.name}'. "
                f"Got {', '.join(map(str, allocation.levels))}."
            )
        start = self._clock()
        score, tokens = self._shared(allocation, fidelity)
        if tokens < fidelity.tokens:
            score = score.then(_finite(self._score(allocation, fidelity, len(score.losses))))
        scored = fidelity.tokens - tokens
        seconds = self._clock() - start
        trial = self._trial(len(self.trials), allocation, fidelity, score, origin)
        self._table.append(self._rows(trial, scored, seconds))
        self._add(trial, scored)
        self.fresh += 1
        return trial

    def _shared(self, allocation: Allocation, fidelity: Fidelity) -> tuple[Score, int]:
        """What is known of the first windows of a fidelity, and how many tokens they are."""
        trial = self._longest.get((allocation.key, fidelity.seed, fidelity.split))
        if trial is None:
            return Score((), ()), 0
        window = trial.fidelity.tokens // len(trial.score.losses)
        score = trial.score.first(fidelity.tokens // window)
        return score, window * len(score.losses)

    def _trial(
        self,
        number: int,
        allocation: Allocation,
        fidelity: Fidelity,
        score: Score,
        origin: str,
    ) -> Trial:
        costs = tuple(table.total(allocation) for table in self._costs)
        return Trial(number, allocation, fidelity, score, costs, origin)

    def _rows(self, trial: Trial, scored: int, seconds: float) -> Iterable[Row]:
        key = trial.allocation.key
        if key not in self._allocations:
            yield {"allocation": key, "levels": [str(level) for level in trial.allocation.levels]}
        fidelity = trial.fidelity
        names = (table.name for table in self._costs)
        yield {
            "number": trial.number,
            "allocation": key,
            "fidelity": {
                "tokens": fidelity.tokens,
                "seed": fidelity.seed,
                "split": fidelity.split,
            },
            "loss": _null(trial.loss),  # for readers; the rest is in the next two
            "losses": list(map(_null, trial.score.losses)),
            "nlls": list(map(_null, trial.score.nlls)),
            "scored": scored,
            "costs": dict(zip(names, trial.costs, strict=True)),
            "origin": trial.origin,
            "seconds": round(seconds, 4),
        }

    def _remember(self, row: Row, line: int) -> None:
        """Take a row of an earlier session in.

        Raises:
            StudyError: it is not a row that this class writes, or it names unknown things.
        """
        try:
            if "spent" in row:
                self.spent[str(row["spent"])] += int(row["tokens"])
            elif "levels" in row:
                allocation = Allocation(tuple(map(parse_level, row["levels"])))
                if allocation not in self._space:
                    raise ValueError("its levels are not in the search space")
                self._allocations[allocation.key] = allocation
            else:
                self._add(self._read(row), int(row["scored"]))
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(self.path / TABLE, line, error) from error

    def _read(self, row: Row) -> Trial:
        if row["number"] != len(self.trials):
            raise ValueError(f"evaluation {len(self.trials)} must come here")
        score = _finite(Score(tuple(row["losses"]), tuple(row["nlls"])))
        if not score.losses or len(score.losses) != len(score.nlls):
            raise ValueError("it must have both losses of every window")
        return self._trial(
            row["number"],
            self._allocations[row["allocation"]],
            Fidelity(**row["fidelity"]),
            score,
            row["origin"],
        )

    def _add(self, trial: Trial, scored: int) -> None:
        self.trials.append(trial)
        self.spent[trial.fidelity.split] += scored
        self.spent_until.append(self.tokens)
        key, fidelity = trial.allocation.key, trial.fidelity
        self._allocations.setdefault(key, trial.allocation)
        self._known[key, fidelity] = trial
        same = (key, fidelity.seed, fidelity.split)
        longest = self._longest.get(same)
        if longest is None or longest.fidelity.tokens < fidelity.tokens:
            self._longest[same] = trial


def _finite(score: Score) -> Score:
    """NaN and infinities are the worst loss there is: they must sort last, never crash."""
    return Score(
        *(
            tuple(math.inf if it is None or not math.isfinite(it) else float(it) for it in part)
            for part in score
        )
    )


def _null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _two_runs(path: Path) -> str:
    return (
        f"a study must have one run at a time. Got two runs on one study, '{path}'. "
        "Wait for the other run, or use another folder."
    )


def _check_facts(path: Path, facts: Row) -> None:
    """Compare with the facts of the first run, or write them when this is it."""
    file = path / FACTS
    if not file.exists():
        if (path / TABLE).exists() and (path / TABLE).stat().st_size:
            raise StudyError(f"'{path}' must have {FACTS} beside {TABLE}. Use another folder.")
        return write_json(file, facts)
    try:
        before = dict(json.loads(file.read_bytes()))
    except (TypeError, ValueError) as error:
        raise StudyError(f"'{file}' must be JSON. Got: {error}. Use another folder.") from error
    other = sorted(key for key in before.keys() | facts.keys() if before.get(key) != facts.get(key))
    if other:
        changes = "; ".join(f"{key} {before.get(key)!r} is now {facts.get(key)!r}" for key in other)
        raise StudyError(
            f"a study must continue with the facts it began with. Got other {', '.join(other)} "
            f"in '{path}' ({changes}). Use another folder, or the former settings."
        )
    return None
