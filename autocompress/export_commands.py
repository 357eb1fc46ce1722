"""The commands around exports: `export`, `runtimes`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else, on standard output.")]

Plan = Annotated[Path | None, typer.Option(help="plan.json, or the folder of an exported plan.")]


def build_plan(plan: Path, out: Path, run: Path | None, model: str | None, as_json: bool) -> None:
    """Build what a plan describes; settings are the plan's."""
    from autocompress.planning import build_plan as build
    from autocompress.progress import terminal_progress

    facts = build(plan, out, run=run, model=model, progress=terminal_progress())
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        bits = f"{facts['effective_bits']:.4f} effective bits"
        typer.echo(f"{facts['file_bytes']:,} bytes, {bits}: {out}")


def export(
    folder: Annotated[Path, typer.Argument(help="Result of a search.")],
    out: Annotated[Path | None, typer.Option(help="New folder; default FOLDER-FORMAT.")] = None,
    format: Annotated[
        str | None, typer.Option(help="compressed-tensors, dense, peft, plan, native.")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(help="What must load it; default the one searched for.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Read it back and compare.")
    ] = True,
    windows: Annotated[int, typer.Option(help="Windows of text that are compared.")] = 2,
    model: Annotated[
        str | None, typer.Option(help="The dense model; default the one it was made from.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a former export.")] = False,
    as_json: Json = False,
) -> None:
    """Write a result in a format that other runtimes load, and read it back."""
    from autocompress.exporting import export as run
    from autocompress.progress import terminal_progress

    name = format or runtime or "export"
    target = out or folder.with_name(f"{folder.resolve().name}-{name}")
    facts = run(
        folder,
        target,
        format=format,
        runtime=runtime,
        check=check,
        windows=windows,
        model=model,
        overwrite=overwrite,
        progress=terminal_progress(),
    )
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        typer.echo(f"{facts['file_bytes']:,} bytes: {target}")
        typer.echo(_checked(facts["verification"]))


def _checked(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not read back"
    kl = f"no KL ({found['kl_unknown']})"
    if found["kl"] is not None:
        kl = f"KL {found['kl']:.6f} (stitched {found['kl_stitched']:.6f}) nats/token"
    return (
        f"read back by {found['reader']}: {found['weights']['compared']} weights equal, logits "
        f"differ by {found['logits']:.3g} at most, {kl}, {found['file_bytes']:,} of "
        f"{found['promised_bytes']:,} bytes"
    )


def runtimes(as_json: Json = False) -> None:
    """List the runtimes that results can be exported for, and what they take."""
    from autocompress.runtimes import RUNTIMES

    rows: list[dict[str, Any]] = [
        {
            "name": runtime.name,
            "format": runtime.format,
            "summary": runtime.summary,
            "levels": list(map(str, runtime.levels)),
            "tie": [list(group) for group in runtime.tie],
        }
        for runtime in RUNTIMES.values()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        typer.echo(f"{row['name']} ({row['format']}): {row['summary']}")
        typer.echo(f"    {' '.join(row['levels'])}")
        tied = "; ".join("/".join(group) for group in row["tie"]) or "nothing"
        typer.echo(f"    one level for: {tied}")
