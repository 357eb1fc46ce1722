"""A result folder is written: packed model, report, and last the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autocompress.core import Allocation, Trial
from autocompress.errors import OutputError
from autocompress.exporters.native import load, save_native
from autocompress.manifest import dense_bytes, manifest_facts
from autocompress.opening import Opened
from autocompress.output import claim_output, write_manifest
from autocompress.quality import score
from autocompress.report import write_report
from autocompress.result import Result, dense_facts

CHECKED = 2  # windows on which a packed model must lose what its allocation did
TOLERANCE = 0.02, 1e-3  # relative, and nats/token: other kernels sum in another order


def write_result(
    opened: Opened, out: Path, winner: Allocation, results: dict[str, Any], timed: dict[str, Any]
) -> Result:
    """Write a packed model with its report and manifest.

    Args:
        results: scores of the dense model, the baselines and the winner.
        timed: facts on latency.

    Raises:
        OutputError: the disk refused; `out` then does not look like a result.
    """
    session = opened.session
    model = opened.evaluator.stitched.restore()
    claim_output(out)  # not before: until here a former result stays whole
    weights = save_native(
        model,
        session.loaded.tokenizer,
        session.space,
        winner,
        session.database,
        out,
        opened.config.activations,
    )
    facts = {**manifest_facts(opened, winner, results, weights), **timed}
    write_report(facts, out)
    write_manifest(out, facts)
    return Result(out, facts, winner)


def verify(opened: Opened, out: Path, trial: Trial) -> float:
    """Load a packed model and score it on the first validation windows.

    Args:
        trial: of its allocation, on validation windows.

    Returns:
        Its loss there, nats/token.

    Raises:
        OutputError: it is not what its allocation lost.
    """
    model, _ = load(out, activations="float32")
    rows = torch.from_numpy(opened.session.windows.rows(trial.fidelity)[:CHECKED])
    found = score(model, opened.evaluator.teacher("validate").rows(rows)).loss
    wanted = trial.score.first(CHECKED).loss
    if abs(found - wanted) > TOLERANCE[0] * wanted + TOLERANCE[1]:
        raise OutputError(
            f"the packed model '{out}' must lose what was scored, {wanted:.4f} nats per token. "
            f"Got {found:.4f}. The kernels or the file are damaged: run the tests of this machine."
        )
    return found


def dense_row(opened: Opened) -> dict[str, Any]:
    """The dense model as a row of results."""
    splits = {}
    for split in ("search", "validate", "test"):
        reference = opened.evaluator.teacher(split)
        splits[split] = (reference.perplexity, reference.windows.numel())
    row: dict[str, Any] = dense_facts(opened.problem, dense_bytes(opened.session), splits)
    return row
