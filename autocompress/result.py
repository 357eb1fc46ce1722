"""What a search found: the facts of `autocompress.json`, the report and the Python result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from autocompress.core import Allocation, Budget, Problem, Trial
from autocompress.predictions import Sensitivities
from autocompress.study import Study

FRONT = "front.json"  # of a front, what autocompress.json is of one model


@dataclass(frozen=True)
class Result:
    """A finished search.

    Args:
        path: folder of the packed model, manifest and report.
        facts: content of `autocompress.json`.
        allocation: level of every layer.
    """

    path: Path
    facts: dict[str, Any]
    allocation: Allocation

    @property
    def effective_bits(self) -> float:
        """Stored bits per dense parameter in scope."""
        return float(self.facts["effective_bits"])

    @property
    def total_bytes(self) -> int:
        """Bytes of the weights file by the cost table."""
        return int(self.facts["total_bytes"])

    @property
    def file_bytes(self) -> int:
        """Bytes of the weights file on disk."""
        return int(self.facts["file_bytes"])

    @property
    def results(self) -> dict[str, Any]:
        """Scores of dense, uniform, ilp and winner on search, validate and test windows."""
        return dict(self.facts["results"])

    def load(self) -> tuple[Any, Any]:
        """The packed model and its tokenizer."""
        from autocompress.exporters.native import load

        return load(self.path)

    def export(self, out: str | Path, format: str | None = None, **settings: Any) -> dict[str, Any]:
        """Write the model in another format, read it back and compare; see `autocompress.export`.

        Args:
            out: new folder.
            format: name in `exporters`, such as 'compressed-tensors' or 'gguf'; None is that of
                the runtime which was searched for.
            settings: of `autocompress.export`.

        Returns:
            The content of the export's `autocompress.json`.

        Raises:
            AutocompressError: the format cannot hold these levels, or the disk refused.
        """
        # By name: exports stand above this module, which only a script may jump over.
        write = import_module("autocompress.exporting").export
        facts: dict[str, Any] = write(self.path, out, format=format, **settings)
        return facts


@dataclass(frozen=True)
class FrontResult:
    """A finished search for a front.

    Args:
        path: folder of the packed models, one below it for each, and of the report.
        facts: content of `front.json`.
    """

    path: Path
    facts: dict[str, Any]

    @property
    def points(self) -> list[dict[str, Any]]:
        """Limit, costs, scores and folder of every point, in order of the limits."""
        return list(self.facts["points"])

    def load(self, number: int) -> tuple[Any, Any]:
        """The packed model of a point, counted from 1, and its tokenizer."""
        from autocompress.exporters.native import load

        return load(self.path / self.points[number - 1]["path"])


def candidate_facts(problem: Problem, trials: Mapping[str, Trial]) -> dict[str, Any]:
    """One candidate's costs and scores: `trials` maps split -> trial of one allocation."""
    trial = next(iter(trials.values()))
    bits, size = (problem.table(name).total(trial.allocation) for name in ("bits", "bytes"))
    levels = set(map(str, trial.allocation.levels))
    return {
        "level": levels.pop() if len(levels) == 1 else None,
        "effective_bits": bits / problem.space.weights,
        "total_bytes": int(size),
        "origin": trial.origin,
        **{split: score_facts(one) for split, one in trials.items()},
    }


def score_facts(trial: Trial) -> dict[str, Any]:
    """A trial's figures; infinities are null, as JSON has none."""
    return {
        "kl": _finite(trial.loss),
        "kl_stderr": _finite(trial.stderr),
        "perplexity": _finite(trial.perplexity),
        "tokens": trial.fidelity.tokens,
    }


def dense_facts(problem: Problem, size: int, perplexities: Mapping[str, tuple[float, int]]) -> Any:
    """The dense model as a row of results: KL to itself is zero.

    Args:
        size: bytes of the dense model at 16 bits.
        perplexities: split -> (perplexity, tokens).
    """
    splits = {
        split: {"kl": 0.0, "kl_stderr": 0.0, "perplexity": perplexity, "tokens": tokens}
        for split, (perplexity, tokens) in perplexities.items()
    }
    return {
        "level": "dense",
        "effective_bits": 16.0,
        "total_bytes": size,
        "origin": "dense",
        **splits,
    }


def allocation_facts(
    problem: Problem, allocation: Allocation, predicted: Sensitivities
) -> list[dict[str, Any]]:
    """One row per layer."""
    return [
        {
            "layer": layer.name,
            "modules": list(layer.modules),
            "level": str(level),
            "weights": layer.weights,
            "bits": int(problem.table("bits").entries[index][level]),
            "loss_predicted": predicted[index].get(level),
        }
        for index, (layer, level) in enumerate(
            zip(problem.space.layers, allocation.levels, strict=True)
        )
    ]


def budget_facts(problem: Problem, budget: Budget, allocation: Allocation) -> dict[str, Any]:
    """A budget and what the winner uses of it."""
    return {
        "text": budget.text,
        "cost": budget.cost,
        "limit": budget.limit,
        "reached": problem.table(budget.cost).total(allocation),
    }


def goal_facts(budget: Budget, objective: str, winner: Trial) -> dict[str, Any]:
    """A limit on the loss, what was made small under it, and the winner's loss.

    Args:
        winner: on validation windows, nats/token.
    """
    limit = {"text": budget.text, "limit": budget.limit, "reached": _finite(winner.loss)}
    return {**limit, "minimized": objective}


def trial_facts(problem: Problem, study: Study, predicted: Sensitivities) -> list[dict[str, Any]]:
    """Every evaluation of the study, with all tokens that were spent when it was done.

    Args:
        predicted: whose sum over layers is the loss if losses of layers add up.
    """
    rows = []
    for trial, spent in zip(study.trials, study.spent_until, strict=True):
        bits = problem.table("bits").total(trial.allocation) / problem.space.weights
        rows.append(
            {
                "number": trial.number,
                "spent": spent,
                "loss": _finite(trial.loss),
                "predicted": _finite(additive_loss(predicted, trial.allocation)),
                "effective_bits": bits,
                "origin": trial.origin,
                "split": trial.fidelity.split,
                "tokens": trial.fidelity.tokens,
                "seed": trial.fidelity.seed,
                "every": trial.fidelity.every,
            }
        )
    return rows


def additive_loss(predicted: Sensitivities, allocation: Allocation) -> float:
    """The sum of sensitivities, nats/token; NaN where a level has none."""
    rows = zip(predicted, allocation.levels, strict=True)
    return sum(row.get(level, math.nan) for row, level in rows)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
