"""The study: the append-only table of every evaluation, which is also the memory for resume."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from autocompress.core import Allocation, CostTable, Fidelity, Score, SearchSpace, Trial
from autocompress.errors import OutputError, SpaceError, StudyError
from autocompress.evaluations import TABLE, Evaluations, finite
from autocompress.files import exclusive
from autocompress.jsonl import JsonLines, write_row
from autocompress.run_facts import check_facts

Measure = Callable[[Allocation, Fidelity, int], Score]  # (…, windows known): of those behind


@runtime_checkable
class Together(Protocol):
    """A measure that scores several allocations at once for less than one by one."""

    def together(
        self, allocations: Sequence[Allocation], fidelity: Fidelity, known: int
    ) -> Sequence[Score]:
        """Their scores, in order, on all but the first `known` windows."""


GROUP = 8  # allocations scored at once at most, by each worker
GROUP_TOKENS = 1 << 16  # that they score at most, each worker: what a kill may lose

LOCK = "study.lock"
FORMAT = 2  # of the rows


class Study:
    """Every evaluation of a run folder, from this run and earlier ones.

    Inside `with`, the folder belongs to this process alone, `evaluate` answers what is known
    and records the rest, one durable row each, so a run that is killed at any moment loses at
    most the group it was in: 8 evaluations and 65,536 tokens for every worker, or one evaluation.
    Rows do not depend on the number of workers, but for their seconds. Windows that an
    allocation was scored on are not scored again when another fidelity of the same seed, at the
    same positions, names them.

    Args:
        path: the run folder; created when missing.
        space: every allocation must be in it.
        costs: the trials' costs, asked of these tables.
        facts: what the losses depend on (fingerprints of model, calibration, space, database);
            a folder that was recorded under other facts is refused. Values are JSON.
        score: (allocation, fidelity, known) -> its score on all but the first `known` windows of
            the fidelity; the expensive part. What can score several `Together` is asked to.
        clock: seconds, for the recorded duration.
        pause: called before every group that is scored: where a run may end.
        workers: that score a group among them.

    Attributes:
        pause: for whoever else comes to such a point.
        trials: all finished evaluations by number.
        fresh: evaluations that this session ran.
        recording: seconds that this session spent on writing rows.
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
        score: Measure | Together,
        clock: Callable[[], float] = time.perf_counter,
        pause: Callable[[], None] = lambda: None,
        workers: int = 1,
    ) -> None:
        self.path = path
        self.fresh = 0
        self.recording = 0.0
        self._seen = Evaluations(space, costs)
        self.trials, self.spent = self._seen.trials, self._seen.spent
        self.spent_until = self._seen.spent_until
        self._space, self._score, self._clock, self.pause = space, score, clock, pause
        self._workers = workers
        as_read = json.loads(write_row(facts))  # tuples are lists
        self._facts = {"format": FORMAT, **as_read}
        self._known: dict[tuple[str, Fidelity], Trial] = {}
        self._longest: dict[tuple[str, Fidelity], Trial] = {}  # by `_windows`

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            try:
                opened.enter_context(exclusive(self.path / LOCK, StudyError, _two_runs(self.path)))
            except OSError as error:
                raise OutputError(
                    f"a study must be able to write its folder '{self.path}'. Got: {error}. "
                    "Choose another folder."
                ) from error
            check_facts(self.path, TABLE, self._facts)
            self._table = opened.enter_context(closing(JsonLines(self.path / TABLE)))
            self._seen.take(self.path / TABLE, self._table.load(), self._index)
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
        other, and in groups: the score of one may use what it shares with the others.

        Raises:
            SpaceError: an allocation is not in the space.
            OutputError: a row could not be written.
        """
        for known, group in self._groups(allocations, fidelity):
            self.pause()
            self._evaluate(group, fidelity, known, origin)
        return [self._known[allocation.key, fidelity] for allocation in allocations]

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

    def _groups(
        self, allocations: Sequence[Allocation], fidelity: Fidelity
    ) -> list[tuple[int, list[Allocation]]]:
        """What must be scored: a few at a time that have as many known windows, and how many."""
        fresh = {it: None for it in allocations if (it.key, fidelity) not in self._known}
        for allocation in fresh:
            if allocation not in self._space:
                raise SpaceError(
                    f"an evaluated allocation must be in the search space '{self._space.name}'. "
                    f"Got {', '.join(map(str, allocation.levels))}."
                )
        alike: defaultdict[int, list[Allocation]] = defaultdict(list)
        for allocation in sorted(fresh, key=lambda it: [str(level) for level in it.levels]):
            alike[len(self._shared(allocation, fidelity)[0].losses)].append(allocation)
        most = GROUP * self._workers if isinstance(self._score, Together) else 1
        size = min(most, max(1, GROUP_TOKENS * self._workers // fidelity.tokens))
        return [
            (k, them[i : i + size]) for k, them in alike.items() for i in range(0, len(them), size)
        ]

    def _evaluate(
        self, group: Sequence[Allocation], fidelity: Fidelity, known: int, origin: str
    ) -> None:
        """Score allocations whose first `known` windows are known, and record them."""
        start = self._clock()
        shared = [self._shared(allocation, fidelity) for allocation in group]
        rest: Sequence[Score] = [Score((), ())] * len(group)
        if shared[0][1] < fidelity.tokens:
            rest = self._measure(group, fidelity, known)
        seconds = (self._clock() - start) / len(group)
        for allocation, (before, tokens), behind in zip(group, shared, rest, strict=True):
            score = before.then(finite(behind))
            trial = self._seen.trial(allocation, fidelity, score, origin)
            start = self._clock()
            self._table.append(self._seen.rows(trial, fidelity.tokens - tokens, seconds))
            self.recording += self._clock() - start
            self._add(trial, fidelity.tokens - tokens)
            self.fresh += 1

    def _measure(
        self, group: Sequence[Allocation], fidelity: Fidelity, known: int
    ) -> Sequence[Score]:
        if isinstance(self._score, Together):
            return self._score.together(group, fidelity, known)
        return [self._score(allocation, fidelity, known) for allocation in group]

    def _shared(self, allocation: Allocation, fidelity: Fidelity) -> tuple[Score, int]:
        """What is known of the first windows of a fidelity, and how many tokens they are."""
        trial = self._longest.get((allocation.key, _windows(fidelity)))
        if trial is None:
            return Score((), ()), 0
        window = trial.fidelity.tokens // len(trial.score.losses)
        score = trial.score.first(fidelity.tokens // window)
        return score, window * len(score.losses)

    def _add(self, trial: Trial, scored: int) -> None:
        self._seen.add(trial, scored)
        self._index(trial)

    def _index(self, trial: Trial) -> None:
        key, fidelity = trial.allocation.key, trial.fidelity
        self._known[key, fidelity] = trial
        same = (key, _windows(fidelity))
        longest = self._longest.get(same)
        if longest is None or longest.fidelity.tokens < fidelity.tokens:
            self._longest[same] = trial


def _windows(fidelity: Fidelity) -> Fidelity:
    """What scores of the same windows at the same positions have in common."""
    return replace(fidelity, tokens=0)


def _two_runs(path: Path) -> str:
    return (
        f"a study must have one run at a time. Got two runs on one study, '{path}'. "
        "Wait for the other run, or use another folder."
    )
