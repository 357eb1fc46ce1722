"""The manifest: everything `autocompress.json` says about a finished search."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from autocompress.config import StudyConfig
from autocompress.core import Allocation, Problem
from autocompress.files import sha256
from autocompress.levels import Dense, Level
from autocompress.machine import describe_machine
from autocompress.opening import Opened, model_facts, source_of
from autocompress.plans import OTHERS, SETTINGS, BuildPlan
from autocompress.prefix_levels import nearest
from autocompress.result import allocation_facts, budget_facts, trial_facts
from autocompress.session import Session
from autocompress.study import Study

PACKAGES = ("autocompress", "torch", "transformers", "numpy", "scipy", "optuna", "safetensors")


def manifest_facts(
    opened: Opened, winner: Allocation, results: dict[str, Any], weights: Path
) -> dict[str, Any]:
    """The content of `autocompress.json`.

    Args:
        results: scores of dense, uniform, ilp and winner.
        weights: the written weights file.
    """
    session, problem = opened.session, opened.problem
    predicted = problem.sensitivities(session.spending.sensitivities).mean
    return {
        **study_facts(opened),
        **_size_facts(session, problem, winner),
        "file_bytes": weights.stat().st_size,
        "sha256": {weights.name: sha256(weights)},
        "budgets": [budget_facts(problem, budget, winner) for budget in problem.budgets],
        "results": results,
        "settings": build_settings(session.config),
        "allocation": [
            {**row, "prefix": str(prefix_of(session, index))}
            for index, row in enumerate(allocation_facts(problem, winner, predicted))
        ],
    }


def study_facts(opened: Opened) -> dict[str, Any]:
    """What is true of a whole search, however many models come of it."""
    session, problem, study = opened.session, opened.problem, opened.study
    predicted = problem.sensitivities(session.spending.sensitivities).mean
    return {
        "format": 1,
        "model": model_facts(session),
        **_setting_facts(session),
        "machine": describe_machine(session.loaded.model.dtype),
        "trials": trial_facts(problem, study, predicted),
        "tokens": _tokens(session, study),
        "seconds": {phase: round(spent, 2) for phase, spent in session.seconds.items()},
        "recording": round(study.recording + opened.mirror.seconds, 2),
        "peak_bytes": _peak_bytes(),
        "stopped": opened.stop.ended,
        "notes": _notes(opened),
        "command": " ".join(["autocompress", *sys.argv[1:]]) if _from_shell() else None,
        "seed": opened.config.seed,
        "versions": {name: version(name) for name in PACKAGES},
    }


def _peak_bytes() -> int:
    """The most memory that this process held."""
    unit = 1 if sys.platform == "darwin" else 1024  # what Linux counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plan_facts(session: Session, plan: BuildPlan, allocation: Allocation) -> dict[str, Any]:
    """The content of `autocompress.json` of a model that was built, not searched: no scores."""
    space, (bits, whole) = session.space, session.costs
    before = plan.build_space(space.layers).levels
    return {
        "format": 1,
        "model": model_facts(session),
        **_setting_facts(session),
        "effective_bits": bits.total(allocation) / space.weights,
        "model_bits": 8 * whole.total(allocation) / session.loaded.parameters,
        "total_bytes": int(whole.total(allocation)),
        "dense_bytes": dense_bytes(session),
        "machine": describe_machine(session.loaded.model.dtype),
        "budgets": [],
        "results": {},
        "settings": build_settings(session.config),
        "allocation": [
            {
                "layer": layer.name,
                "modules": list(layer.modules),
                "level": str(level),
                "weights": layer.weights,
                "bits": int(bits.entries[index][level]),
                "prefix": str(before[index][0]),
            }
            for index, (layer, level) in enumerate(
                zip(space.layers, allocation.levels, strict=True)
            )
        ],
        "versions": {name: version(name) for name in PACKAGES},
    }


def dense_bytes(session: Session) -> int:
    """Bytes of the model with every layer in scope dense, at 16 bits."""
    return int(session.costs[1].base) + 2 * session.space.weights


def _setting_facts(session: Session) -> dict[str, Any]:
    """Over which space and on which text."""
    space = session.space
    return {
        "space": {
            "name": space.name,
            "layers": len(space.layers),
            "weights": space.weights,
            "levels": list(map(str, space.all_levels())),
            "runtime": session.config.runtime,
            "scope": list(session.scope),
        },
        "text": source_of(session.config.calibration),
        "calibration": session.windows.record(),
        "dominated": [
            {"layers": list(it.layers), "level": str(it.level), "reason": it.reason}
            for it in session.dominated
        ],
        "database": session.database.identity,
    }


def build_settings(config: StudyConfig) -> dict[str, Any]:
    """The settings that built levels depend on, as a plan holds them."""
    found = {name: getattr(config, name) for name in (*SETTINGS, *OTHERS)}
    return found | {"model": source_of(config.model), "tokens": asdict(config.tokens)}


def prefix_of(session: Session, index: int) -> Level:
    """The level whose weights made the activations behind a layer; see `build.py`."""
    allowed, prefix = session.space.levels[index], session.prefix
    shape = session.space.layers[index].shapes[0]
    return prefix if prefix in (*allowed, Dense()) else nearest(prefix, allowed, shape)


def _size_facts(session: Session, problem: Problem, winner: Allocation) -> dict[str, Any]:
    """Effective bits in scope beside bits and bytes of the whole model."""
    total = int(problem.table("bytes").total(winner))
    return {
        "effective_bits": problem.table("bits").total(winner) / session.space.weights,
        "model_bits": 8 * total / session.loaded.parameters,
        "total_bytes": total,
        "dense_bytes": dense_bytes(session),
    }


def _tokens(session: Session, study: Study) -> dict[str, int]:
    parts = {
        "calibrate": int(session.windows.calibrate.size),
        "sensitivities": study.spent["sensitivities"],
        "linearization": study.spent["linearization"],
        "search": study.spent["search"],
        "verify": study.spent["validate"] + study.spent["test"],
    }
    return {**parts, "total": sum(parts.values())}


def _notes(opened: Opened) -> list[str]:
    session, notes = opened.session, []
    if opened.stop.ended:
        notes.append(
            f"Ctrl-C ended this search after {opened.study.tokens:,} tokens. The same command goes "
            "on from there."
        )
    if session.config.model is None and "Q4_1" in session.loaded.name:
        notes.append(
            "The default model is a dequantized Q4_1 file: its weights sit on a 4-bit grid of "
            "32, so results at 4 bits and more do not carry over to other models."
        )
    if session.config.calibration is None:
        notes.append("Calibrated and scored on Python's built-in help topics, split by document.")
    return notes


def _from_shell() -> bool:
    return Path(sys.argv[0]).name == "autocompress"
