"""`build --plan`: the packed model that a plan describes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from autocompress.core import Allocation
from autocompress.errors import ModelError
from autocompress.exporters.native import save_native
from autocompress.files import sha256
from autocompress.manifest import plan_facts
from autocompress.output import check_output, claim_output, write_manifest
from autocompress.parts import module_parts
from autocompress.plans import BuildPlan
from autocompress.progress import Progress, Silent
from autocompress.runtimes import find_runtime
from autocompress.runtimes.rules import check_allocation
from autocompress.session import complete_database, file_costs, open_session
from autocompress.structure import layers_for


def build_plan(
    path: str | Path,
    out: str | Path,
    *,
    run: str | Path | None = None,
    model: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Solve what a plan names and the run folder lacks, and write the packed model.

    Args:
        path: plan.json, or the folder that `export --format plan` wrote.
        out: folder of the result.
        run: folder of the level database; that of the search spares all solving.
        model: the dense model; None is the one that the plan names.
        progress: told what happens.

    Returns:
        The content of the result's `autocompress.json`; nothing in it is scored.

    Raises:
        AutocompressError: the plan is wrong, or the model is another.
    """
    plan, out = BuildPlan.read(Path(path)), Path(out)
    given = {} if model is None else {"model": model}
    config = plan.config(out=out, run=None if run is None else Path(run), **given)
    runtime = None if config.runtime is None else find_runtime(config.runtime)
    check_output(out)
    session = open_session(config, progress or Silent(), plan)
    loaded = session.loaded
    if plan.fingerprint not in (None, loaded.fingerprint):
        raise ModelError(
            f"the model must be the one that the plan was made for. Got '{loaded.name}', whose "
            "weights differ. Name the right one with --model, or take 'fingerprint' out of the "
            "plan to build it from this one."
        )
    space = plan.space(layers_for(loaded.model, plan))
    allocation = Allocation(tuple(row[0] for row in space.levels))
    if runtime is not None:
        check_allocation(runtime, space, allocation, module_parts(loaded.model))
    complete_database(session)
    claim_output(out)
    weights = save_native(
        *(loaded.model, loaded.tokenizer, space, allocation, session.database, out),
        config.activations,
    )
    costs = file_costs(loaded.model, space, runtime)
    facts = plan_facts(replace(session, space=space, costs=costs), plan, allocation)
    facts |= {"file_bytes": weights.stat().st_size, "sha256": {weights.name: sha256(weights)}}
    write_manifest(out, facts)
    return facts
