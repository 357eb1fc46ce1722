"""Estimates of a run folder: gradients are taken once and kept there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autocompress.core import GRADIENT, Allocation, Fidelity
from autocompress.errors import StudyError
from autocompress.evaluator import Evaluator
from autocompress.files import fingerprint, write_json
from autocompress.influence import block_influence
from autocompress.levels import parse_level
from autocompress.linearization import linearize as linearize_model
from autocompress.predictions import Estimate, Linearization, Sensitivities
from autocompress.sensitivity import fisher_sensitivities
from autocompress.session import Session
from autocompress.study import Study

Compute = Callable[[], dict[str, Sensitivities]]


def sensitivities(session: Session, evaluator: Evaluator, study: Study, tokens: int) -> Estimate:
    """The run's sensitivities from `tokens` tokens, computed the first time."""
    seed = session.config.seed
    windows = session.windows.for_sensitivities(tokens, seed)

    def compute() -> dict[str, Sensitivities]:
        with session.clock("sensitivities"), session.progress.task("sensitivities") as advance:
            found = fisher_sensitivities(evaluator.stitched, windows, seed, progress=advance)
        study.spend(GRADIENT * tokens, "sensitivities")
        return found._asdict()

    path = session.config.run_folder / f"sensitivities-{tokens}-{seed}.json"
    return Estimate(**_stored(path, session, compute))


def linearize(
    session: Session,
    evaluator: Evaluator,
    study: Study,
    allocation: Allocation,
    tokens: int,
    before: int,
) -> Linearization:
    """The run's linearization at an allocation from `tokens` search tokens, likewise.

    Args:
        before: search tokens to pass over first, in the order of the run's seed; whole windows.

    Raises:
        Stopped: the run shall end, and a part of the windows is left; what they said is dropped.
    """
    seed, window = session.config.seed, session.windows.window
    order = session.windows.rows(Fidelity(int(session.windows.search.size), seed))
    chosen = order[(before + np.arange(0, tokens, window)) // window % len(order)]

    def compute() -> dict[str, Sensitivities]:
        reference = evaluator.teacher("search").rows(torch.from_numpy(chosen))
        with session.clock("linearization"), session.progress.task("linearization") as shown:

            def advance(done: int, total: int) -> None:
                shown(done, total)
                if done < total:
                    study.pause()

            found = linearize_model(evaluator.stitched, allocation, reference, advance)
        study.spend(GRADIENT * tokens, "linearization")
        return {**found.slope._asdict(), "overlap": found.overlap}

    name = f"linearization-{allocation.key[:12]}-{tokens}-{before}-{seed}.json"
    found = _stored(session.config.run_folder / name, session, compute)
    return Linearization(Estimate(found["mean"], found["stderr"]), found["overlap"])


def influence(
    session: Session, evaluator: Evaluator, study: Study, tokens: int
) -> tuple[float, ...]:
    """How far each layer's block moves the hidden states on `tokens` search tokens, likewise.

    Raises:
        StudyError: what was kept is damaged, or of another model, database, space or text.
    """
    seed, facts = session.config.seed, fingerprint(session.facts())
    path = session.config.run_folder / f"influence-{tokens}-{seed}.json"
    if not path.exists():
        windows = session.windows.subset(Fidelity(tokens, seed))
        with session.clock("influence"):
            made = block_influence(evaluator.stitched, windows)
        study.spend(tokens, "influence")
        write_json(path, {"facts": facts, "influence": made})
    try:
        content = json.loads(path.read_text())
        found = tuple(map(float, content["influence"]))
        if content["facts"] != facts or len(found) != len(session.space.layers):
            raise ValueError("another model, space, database or text")
    except (ValueError, TypeError, KeyError) as error:
        raise StudyError(
            f"'{path}' must be whole and of this run. Got: {error}. Delete it."
        ) from error
    return found


def _stored(path: Path, session: Session, compute: Compute) -> dict[str, Sensitivities]:
    """What is kept at `path`, computed and written there the first time.

    Raises:
        StudyError: the file is damaged, or of another model, database, space or text.
    """
    facts = fingerprint(session.facts())
    if not path.exists():
        made = compute()
        rows = {key: [{str(k): v for k, v in row.items()} for row in made[key]] for key in made}
        write_json(path, {"facts": facts, **rows})
        return made
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        known = content.pop("facts")
        found: dict[str, Sensitivities] = {
            key: tuple({parse_level(k): float(v) for k, v in row.items()} for row in rows)
            for key, rows in content.items()
        }
        complete = all(
            set(row) >= set(levels)
            for rows in found.values()
            for row, levels in zip(rows, session.space.levels, strict=True)
        )
        if not complete or not {"mean", "stderr"} <= found.keys():
            raise ValueError("levels are missing")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise StudyError(f"'{path}' must be whole. Got: {error}. Delete it.") from error
    if known != facts:
        raise StudyError(
            f"'{path}' must belong to this model, space, database and text. Got others. Delete it."
        )
    return found
