"""The commands that read run folders: `front`, `compare`, `dashboard`."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from autocompress.runs import Front, Study

RunFolder = Annotated[Path, typer.Argument(help="Run folder of a search, or the result beside it.")]
Cost = Annotated[str, typer.Option(help="Against the loss: bits, bytes or latency.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else, on standard output.")]

COLUMNS = ("point", "cost", "effective_bits", "bytes", "kl", "kl_stderr", "perplexity", "origin")


def front(
    run: RunFolder,
    cost: Cost = "bits",
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: Json = False,
) -> None:
    """List the best of a run at every cost, as proven on validation windows."""
    from autocompress.runs import front_of, open_run

    opened = open_run(run)
    found = front_of(opened, cost)
    rows = front_rows(opened, found)
    if as_json:
        typer.echo(json.dumps({**_about(opened, found), "points": rows}, indent=1))
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    else:
        from autocompress.show import points_table

        points_table(_about(opened, found), rows)


def front_rows(run: Study, found: Front) -> list[dict[str, Any]]:
    """A row per point of a front: costs, scores, and the level of every layer."""
    bits, size = run.table("bits"), run.table("bytes")
    return [
        {
            "point": number,
            "cost": cost,
            "effective_bits": bits.total(trial.allocation) / run.space.weights,
            "bytes": int(size.total(trial.allocation)),
            "kl": trial.loss,
            "kl_stderr": trial.stderr,
            "perplexity": trial.perplexity,
            "origin": trial.origin,
            "knee": number - 1 == found.knee,
            "levels": {
                layer.name: str(level)
                for layer, level in zip(run.space.layers, trial.allocation.levels, strict=True)
            },
        }
        for number, (trial, cost) in enumerate(zip(found.trials, found.costs, strict=True), 1)
    ]


def _about(run: Study, found: Front) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "model": run.record["model"]["name"],
        "cost": found.cost,
        "windows": len(found.trials[0].score.losses),
        "reference": list(found.reference),
        "hypervolume": found.hypervolume,
    }


def compare(
    run: RunFolder,
    other: Annotated[Path, typer.Argument(help="Another run of the same model.")],
    cost: Cost = "bits",
    as_json: Json = False,
) -> None:
    """Compare two runs at equal cost, window by window, with 95 % intervals."""
    from autocompress.run_comparison import compare_runs
    from autocompress.runs import open_run

    facts = compare_runs(open_run(run), open_run(other), cost)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        from autocompress.show import comparison_table

        comparison_table(facts)


def dashboard(
    run: RunFolder,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8080,
    storage: Annotated[
        str | None, typer.Option(help="Of the Optuna study; default what the run remembers.")
    ] = None,
) -> None:
    """Watch a run in the browser: trials, front, heat maps, losses; while it goes on, too."""
    from autocompress.dashboard import serve

    serve(run, storage, host, port, lambda line: typer.echo(line, err=True))
