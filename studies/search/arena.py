"""One model, one database, one set of windows: where strategies are compared by tokens.

Every run (strategy, budget, seed) has its own study, so none profits from what another scored.
Gradients of equal windows are computed once and charged to every run that asks for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile
from typing import Any

from autocompress.config import StudyConfig
from autocompress.core import Allocation, Fidelity, Problem, Score
from autocompress.cost import check_budgets, parse_budget
from autocompress.estimates import sensitivities
from autocompress.evaluator import Evaluator
from autocompress.files import fingerprint, write_json
from autocompress.levels import parse_level
from autocompress.opening import make_evaluator, make_problem
from autocompress.predictions import Estimate
from autocompress.progress import Lines
from autocompress.session import Session, complete_database, open_session
from autocompress.strategies.metering import metered
from autocompress.study import Study

HERE = Path(__file__).parent
SCALES = 0.296875  # bits per weight that scales and zeros of groups of 64 take at 3 bits


@dataclass(frozen=True)
class Arena:
    """The open session and where runs are kept."""

    session: Session
    evaluator: Evaluator
    work: Path

    @property
    def model(self) -> str:
        """The model's name in rows."""
        return self.session.loaded.name.split()[0]

    @property
    def dtype(self) -> str:
        """The number format of forward passes."""
        return str(self.session.loaded.model.dtype).removeprefix("torch.")

    @contextmanager
    def problem(self, name: str, budget: str, seed: int) -> Iterator[tuple[Problem, Study]]:
        """A metered problem with a study of its own in `WORK/runs/NAME`.

        Args:
            budget: such as '3.3bits'.
            seed: of windows, labels and the strategy.
        """
        folder = self.work / "runs" / name
        config = replace(self.session.config, run=folder, seed=seed)
        session = replace(self.session, config=config)
        space, costs = session.space, session.costs
        budgets = check_budgets(space, costs, [parse_budget(budget, space)])
        facts = session.facts()
        with Study(folder, space, costs, facts, self.evaluator) as study:

            def shared(tokens: int) -> Estimate:
                file = f"sensitivities-{tokens}-{seed}.json"
                common, own = self.work / f"{fingerprint(facts)[:8]}-{file}", folder / file
                if common.exists() and not own.exists():
                    copyfile(common, own)
                found = sensitivities(session, self.evaluator, study, tokens)
                if not common.exists():
                    copyfile(own, common)
                return found

            problem = make_problem(session, self.evaluator, study, space, costs, budgets)
            yield metered(replace(problem, sensitivities=shared)), study

    def score(self, allocation: Allocation, split: str) -> Score:
        """The score on a whole split, kept where no search sees it."""
        file = self.work / "scores" / f"{allocation.key}-{split}.json"
        if not file.exists():
            tokens = int(self.session.windows.split(split).size)
            file.parent.mkdir(exist_ok=True)
            write_json(file, self.evaluator(allocation, Fidelity(tokens, 0, split))._asdict())
        return Score(**{key: tuple(row) for key, row in json.loads(file.read_text()).items()})


def effective(payload: float) -> float:
    """Effective bits of a payload: at 3 bits, those of uniform w3g64."""
    return payload + SCALES


def open_arena(work: Path, **settings: Any) -> Arena:
    """A model, by default SmolLM2, at groups of 64; builds the database the first time.

    Args:
        settings: fields of `StudyConfig` that differ.
    """
    usual = {"space": str(HERE / "space.toml"), "run": work / "base.run", "out": work / "out"}
    config = StudyConfig(**{**usual, **settings})
    session = open_session(config, Lines())
    complete_database(session)
    return Arena(session, make_evaluator(session), work)


def read_allocation(path: Path, arena: Arena) -> Allocation:
    """An allocation from a text file of `module: level` lines.

    A level is a key such as `w3g64` or a bare number of bits, as EvoPress writes it.
    """
    rows = [line.split(":") for line in path.read_text().splitlines() if line.strip()]
    named = {name.strip(): level.strip() for name, level in rows}
    levels = []
    for layer in arena.session.space.layers:
        found = {named[module] for module in layer.modules}
        if len(found) != 1:
            raise SystemExit(f"{layer.name} must have one level. Got {', '.join(sorted(found))}.")
        (key,) = found
        levels.append(parse_level(f"w{key}g64" if key.isdecimal() else key))
    return Allocation(tuple(levels))
