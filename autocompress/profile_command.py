"""The command that prices a search space: `profile`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from autocompress.config import StudyConfig
    from autocompress.latency_setup import Latency
    from autocompress.latency_store import LatencyStore


# How a target is named and used; `search` has the same options.
Threads = Annotated[int | None, typer.Option(help="That a forward pass uses.")]
Batch = Annotated[int, typer.Option(help="Sequences the target decodes at once, 1 to 32.")]
Prompt = Annotated[int, typer.Option(help="Tokens the target reads before it decodes.")]
Decode = Annotated[float, typer.Option(help="Share of decoded tokens, 0 to 1.")]
Activations = Annotated[str, typer.Option(help="In kernels: int8, bfloat16 or float32.")]
Target = Annotated[
    str, typer.Option(help="Of budgets in time: cpu, or another machine's store FILE.json.")
]
Model = Annotated[
    str | None, typer.Option(help="Folder, GGUF file or Hub id; default SmolLM2-135M-Instruct.")
]
Space = Annotated[str, typer.Option(help="Built-in search space or a TOML file.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16 or float32.")]
Again = Annotated[bool, typer.Option("--again", help="Measure what is known, too.")]
Export = Annotated[Path | None, typer.Option(help="Write the store for other machines to use.")]
Import = Annotated[
    Path | None,
    typer.Option("--import", help="Take in a store of this machine; measures nothing."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else, on standard output.")]


def profile(
    target: Target = "cpu",
    model: Model = None,
    space: Space = "quant-2-8",
    threads: Threads = None,
    batch: Batch = 1,
    prompt: Prompt = 128,
    decode: Decode = 1.0,
    activations: Activations = "int8",
    dtype: Dtype = "auto",
    again: Again = False,
    export: Export = None,
    import_: Import = None,
    as_json: Json = False,
) -> None:
    """Measure what every level of every layer takes at a target, once; later searches reuse it."""
    from autocompress.config import StudyConfig

    config = StudyConfig(
        model=model,
        space=space,
        target=target,
        threads=threads,
        batch=batch,
        prompt=prompt,
        decode=decode,
        activations=activations,
        dtype=dtype,
    )
    if import_ is not None:
        facts = _import(config, import_)
        typer.echo(json.dumps(facts, indent=1) if as_json else f"imported into {facts['path']}")
    else:
        from autocompress.profiling import profile as measure
        from autocompress.progress import terminal_progress

        latency = measure(config, again=again, progress=terminal_progress())
        _show(latency, export, as_json)


def _show(latency: Latency, export: Path | None, as_json: bool) -> None:
    """Print prices, and export their store."""
    from autocompress.errors import LatencyError
    from autocompress.show import latency_table

    store = latency.store
    if export is not None:
        if store is None:
            raise LatencyError("a registered target has no store. Got --export. Leave it out.")
        store.export(export)
    facts = {**latency.facts(), "path": None if store is None else str(store.path)}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        latency_table(facts, len(latency.table.entries))


def _import(config: StudyConfig, path: Path) -> dict[str, Any]:
    """Take another copy of this machine's store in.

    Raises:
        LatencyError: it is damaged, or of another machine, thread count or version.
    """
    from autocompress.latency_setup import local_store
    from autocompress.latency_store import LatencyStore
    from autocompress.machine import compute_dtype

    other = LatencyStore.read(path)
    store = local_store(config.parsed_target(), compute_dtype(config.dtype))
    store.take(other)
    store.save()
    return {"path": str(store.path), **_counts(other), "identity": store.identity}


def _counts(store: LatencyStore) -> dict[str, int]:
    return {"timings": len(store.timings), "models": len(store.models)}
