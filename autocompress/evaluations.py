"""The table of evaluations: what its rows say, and how a trial becomes one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

from autocompress.core import Allocation, CostTable, Fidelity, Score, SearchSpace, Trial
from autocompress.jsonl import Row, damaged, read_rows

TABLE = "evaluations.jsonl"


class Evaluations:
    """Every trial of a run folder, in memory.

    Args:
        space: every allocation must be in it.
        costs: the trials' costs, asked of these tables.

    Attributes:
        trials: by number.
        spent: tokens ever scored, by split, or by what else they were spent on.
        spent_until: all tokens that were spent when each trial was done, aligned with `trials`.
        allocations: by key.
    """

    def __init__(self, space: SearchSpace, costs: Sequence[CostTable]) -> None:
        self.trials: list[Trial] = []
        self.spent: Counter[str] = Counter()
        self.spent_until: list[int] = []
        self.allocations: dict[str, Allocation] = {}
        self._space, self._costs = space, tuple(costs)
        # By name: levels are compared and hashed by their fields, a hundred times as slowly.
        self._levels = [{str(level): level for level in allowed} for allowed in space.levels]
        self._prices = [
            [{str(level): cost for level, cost in entry.items()} for entry in table.entries]
            for table in self._costs
        ]
        self._totals: dict[str, tuple[float, ...]] = {}  # by key of the allocation

    @classmethod
    def read(cls, path: Path, space: SearchSpace, costs: Sequence[CostTable]) -> Self:
        """What the table at `path` holds now; a run may be appending to it.

        Raises:
            StudyError: it is damaged.
        """
        found = cls(space, costs)
        found.take(path, read_rows(path))
        return found

    def take(
        self, path: Path, rows: Sequence[Row], seen: Callable[[Trial], None] = lambda trial: None
    ) -> None:
        """Take the rows of a table in.

        Args:
            path: named in errors.
            seen: called with every trial.

        Raises:
            StudyError: a row is not one that `rows` makes, or it names unknown things.
        """
        for line, row in enumerate(rows, start=1):
            try:
                trial = self._remember(row)
            except (KeyError, TypeError, ValueError) as error:
                raise damaged(path, line, error) from error
            if trial is not None:
                seen(trial)

    def _remember(self, row: Row) -> Trial | None:
        if "spent" in row:
            self.spent[str(row["spent"])] += int(row["tokens"])
        elif "levels" in row:
            allocation = self._allocation(row["levels"])
            self.allocations[allocation.key] = allocation
            self._totals[allocation.key] = tuple(
                table.base + sum(map(dict.__getitem__, prices, row["levels"]))
                for table, prices in zip(self._costs, self._prices, strict=True)
            )
        else:
            trial = self._read(row)
            self.add(trial, int(row["scored"]))
            return trial
        return None

    def _allocation(self, names: Sequence[str]) -> Allocation:
        """The allocation whose levels are called `names`."""
        pairs = list(zip(self._levels, names, strict=True))
        allocation = Allocation(tuple(known[name] for known, name in pairs if name in known))
        if len(allocation.levels) < len(pairs) or not allocation.keeps_some:
            raise ValueError("its levels are not in the search space")
        return allocation

    def _read(self, row: Row) -> Trial:
        if row["number"] != len(self.trials):
            raise ValueError(f"evaluation {len(self.trials)} must come here")
        score = finite(Score(tuple(row["losses"]), tuple(row["nlls"])))
        if not score.losses or len(score.losses) != len(score.nlls):
            raise ValueError("it must have both losses of every window")
        allocation, fidelity = self.allocations[row["allocation"]], Fidelity(**row["fidelity"])
        return self.trial(allocation, fidelity, score, row["origin"])

    def trial(self, allocation: Allocation, fidelity: Fidelity, score: Score, origin: str) -> Trial:
        """The next trial."""
        known = self._totals.get(allocation.key)
        costs = known or tuple(table.total(allocation) for table in self._costs)
        return Trial(len(self.trials), allocation, fidelity, score, costs, origin)

    def add(self, trial: Trial, scored: int) -> None:
        """Take a trial in, for which `scored` tokens were scored."""
        self.trials.append(trial)
        self.spent[trial.fidelity.split] += scored
        self.spent_until.append(self.spent.total())
        self.allocations.setdefault(trial.allocation.key, trial.allocation)

    def rows(self, trial: Trial, scored: int, seconds: float) -> Iterator[Row]:
        """The rows of a new trial: that of its allocation, unless it is known, and its own."""
        key = trial.allocation.key
        if key not in self.allocations:
            yield {"allocation": key, "levels": [str(level) for level in trial.allocation.levels]}
        names = (table.name for table in self._costs)
        yield {
            "number": trial.number,
            "allocation": key,
            "fidelity": asdict(trial.fidelity),
            "loss": _null(trial.loss),  # for readers; the rest is in the next two
            "losses": list(map(_null, trial.score.losses)),
            "nlls": list(map(_null, trial.score.nlls)),
            "scored": scored,
            "costs": dict(zip(names, trial.costs, strict=True)),
            "origin": trial.origin,
            "seconds": round(seconds, 4),
        }


def finite(score: Score) -> Score:
    """NaN and infinities are the worst loss there is: they must sort last, never crash."""
    return Score(
        *(
            tuple(math.inf if it is None or not math.isfinite(it) else float(it) for it in part)
            for part in score
        )
    )


def _null(value: float) -> float | None:
    return value if math.isfinite(value) else None
