"""One search for a front against a search of its own for every limit.

    python studies/front/run.py WORK --run RUN --tokens 30000
    python studies/front/run.py WORK --run RUN --tokens 30000 --strategies sweep nsgaii

RUN is the run folder of any finished search of the model; its database and the dense model's
distributions are copied to WORK. Every single search may spend `--tokens`, and all of a front
together half as much again. Counted is what each asked for, whether an earlier one had paid for it
already or not, so all share a study and none learns from another. Answers are then scored on
validation windows, which no search sees.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.config import StudyConfig
from autocompress.core import Budget, Fidelity, Problem, Trial
from autocompress.cost import parse_budget
from autocompress.effort import front_plan
from autocompress.opening import Opened, open_search
from autocompress.progress import terminal_progress
from autocompress.ranges import range_texts
from autocompress.run_record import recalled
from autocompress.strategies.auto import Auto
from autocompress.strategies.fronts import find_front
from autocompress.strategies.metering import metered

HERE = Path(__file__).parent
KEPT = ("database", "run.json", "teacher-search.safetensors", "teacher-validate.safetensors")


def main() -> None:
    """Search every way, then score all answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=30_000, help="of one search")
    parser.add_argument("--pareto", default="bits=2.5..4.5")
    parser.add_argument("--points", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", nargs="+", default=["auto"], help="of the front")
    arguments = parser.parse_args()
    run = copied(arguments.run, arguments.work / "study.run")
    texts = range_texts(arguments.pareto, arguments.points)
    given = {"run": run, "budgets": texts[-1:], "seed": arguments.seed, "spend": arguments.tokens}
    config = StudyConfig(**{**recalled(given), "warm": None, "out": arguments.work / "out"})
    with open_search(config, terminal_progress()) as opened:
        limits = [parse_budget(text, opened.session.space) for text in texts]
        rows = [Way(opened, limits).singles()]
        rows += [Way(opened, limits).front(name) for name in arguments.strategies]
    for row in rows[1:]:
        row["tokens beside one search"] = row["tokens"] / max(rows[0]["tokens of each"])
        pairs = zip(row["losses"], rows[0]["losses"], strict=True)
        row["losses beside single ones"] = [mine / other - 1 for mine, other in pairs]
    facts = {"limits": texts, "given": arguments.tokens, "seed": arguments.seed, "ways": rows}
    print(json.dumps(facts, indent=1))
    model = opened.session.loaded.name.split(" ")[0]  # without where it came from
    name = f"results-{model}-{arguments.tokens}-{arguments.seed}.json"
    (HERE / name).write_text(json.dumps(facts, indent=1) + "\n")


def copied(run: Path, to: Path) -> Path:
    """What of a run folder no search has to pay for."""
    for name in KEPT:
        if not (to / name).exists():
            to.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (run / name).is_dir() else shutil.copy2
            copy(run / name, to / name)
    return to


class Way:
    """A way to answers at all limits; `tokens` is what it asked for."""

    def __init__(self, opened: Opened, limits: Sequence[Budget]) -> None:
        self.opened, self.limits = opened, limits
        self.problem = replace(opened.problem, budgets=())

    def singles(self) -> dict[str, Any]:
        """A search for each limit, which knows nothing of the others."""
        answers, tokens = [], []
        for limit in self.limits:
            problem = metered(replace(self.problem, budgets=(limit,)))
            search = Auto(self.opened.session.spending)
            *_, last = search(problem, np.random.default_rng(self.opened.config.seed))
            answers.append(last)
            tokens.append(problem.spent())
        facts = {"way": "singles", "tokens": sum(tokens), "tokens of each": tokens}
        return {**facts, **self._scored(answers)}

    def front(self, name: str) -> dict[str, Any]:
        """One search for all limits, with that strategy."""
        problem, config = metered(self.problem), self.opened.config
        size = int(self.opened.session.windows.search.size)
        spending = front_plan(config.full_tokens, len(self.limits), config.window, size)
        rng = np.random.default_rng(config.seed)
        answers = dict(self._found(find_front(name, spending), problem, rng))
        found = [answers[number] for number in range(len(self.limits))]
        return {"way": f"front: {name}", "tokens": problem.spent(), **self._scored(found)}

    def _found(
        self, strategy: Any, problem: Problem, rng: np.random.Generator
    ) -> Iterator[tuple[int, Trial]]:
        yield from strategy(problem, self.limits, rng)

    def _scored(self, answers: Sequence[Trial]) -> dict[str, Any]:
        """Losses on validation windows, with standard errors."""
        fidelity = Fidelity(int(self.opened.session.windows.validate.size), 0, "validate")
        self.opened.evaluator.teacher("validate")
        trials = [
            self.problem.evaluate([answer.allocation], fidelity, answer.origin)[0]
            for answer in answers
        ]
        bits, weights = self.problem.table("bits"), self.problem.space.weights
        return {
            "origins": [answer.origin for answer in answers],
            "effective bits": [bits.total(it.allocation) / weights for it in answers],
            "losses": [trial.loss for trial in trials],
            "standard errors": [trial.stderr for trial in trials],
        }


if __name__ == "__main__":
    main()
