"""The command that scores a result: `eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Folder = Annotated[Path, typer.Argument(help="Result of a search, any model folder or GGUF file.")]
Data = Annotated[
    str | None, typer.Option(help="Any text; default the search's own text, its test windows.")
]
Model = Annotated[
    str | None, typer.Option(help="The dense model; default the one it was made from.")
]
Window = Annotated[int | None, typer.Option(help="Tokens per window; default 512.")]
Tokens = Annotated[int, typer.Option(help="At most this many.")]
Task = Annotated[
    list[str] | None, typer.Option(help="lm-eval task to score, too; repeat for several.")
]
TaskFolder = Annotated[Path | None, typer.Option(help="Tasks of your own, as YAML files.")]
Limit = Annotated[int | None, typer.Option(help="Questions of each task at most.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else, on standard output.")]

FIGURES = {  # name in the facts -> column, digits
    "kl": ("KL(dense‖·)", 4),
    "kl_reverse": ("KL(·‖dense)", 4),
    "agreement": ("top-1 agree", 4),
    "perplexity": ("perplexity", 2),
    "bits_per_byte": ("bits/byte", 4),
}


def evaluate(
    folder: Folder,
    data: Data = None,
    model: Model = None,
    window: Window = None,
    tokens: Tokens = 16384,
    task: Task = None,
    task_folder: TaskFolder = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Score a packed model against its dense model: on test windows, any text, lm-eval tasks."""
    from autocompress.gguf_files import only_gguf
    from autocompress.output import is_result
    from autocompress.progress import terminal_progress

    settings: dict[str, Any] = {"model": model, "window": window, "tokens": tokens}
    settings["progress"] = terminal_progress()
    gguf = only_gguf(folder)
    if gguf is not None or not is_result(folder):
        from autocompress.errors import ConfigError
        from autocompress.foreign_scoring import evaluate_foreign

        if task or task_folder is not None or limit is not None:
            raise ConfigError(
                f"--task, --task-folder and --limit must go with a result of a search. Got "
                f"'{gguf or folder}', which is none. Leave them out."
            )
        facts = evaluate_foreign(gguf or folder, data, **settings)
    else:
        from autocompress.scoring import evaluate as score

        wanted: dict[str, Any] = {"tasks": task or (), "task_folder": task_folder, "limit": limit}
        facts = score(folder, data, **settings, **wanted)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        _show(facts)


def _show(facts: dict[str, Any]) -> None:
    """A packed model's figures beside the dense model's."""
    from rich.console import Console
    from rich.table import Table

    from autocompress.report.facts import number

    title = f"{facts['tokens']:,} tokens ({facts['bytes']:,} bytes) of {facts['data']}"
    table = Table(title=title)
    table.add_column("model")
    for column, _ in FIGURES.values():
        table.add_column(column, justify="right")
    for name in ("dense", "packed"):
        if facts[name] is None:  # the dense model of a stranger's file
            continue
        cells = (number(facts[name][it], digits) for it, (_, digits) in FIGURES.items())
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    packed = facts["packed"]
    if packed["kl"] is None:
        console.print("Name the dense model with --model to compare with it.")
        return
    console.print(
        f"KL in nats/token, ± {packed['kl_stderr']:.4f} and ± {packed['kl_reverse_stderr']:.4f}; "
        f"{packed['kl_top']:.4f} as a search measures it, on the 512 likeliest tokens.",
        highlight=False,
    )
    if facts["tasks"]:
        console.print(_task_table(facts["tasks"]))


def _task_table(tasks: dict[str, Any]) -> Any:
    """One row per task and metric."""
    from rich.table import Table

    table = Table(title="lm-eval tasks")
    for column in ("task", "metric", "dense", "packed"):
        table.add_column(column, justify="right" if column in ("dense", "packed") else "left")
    for task, metrics in tasks.items():
        for metric, row in metrics.items():
            cells = (_figure(row, name) for name in ("dense", "packed"))
            table.add_row(task, metric, *cells)
    return table


def _figure(row: dict[str, float], name: str) -> str:
    """'0.4310 ± 0.0214'."""
    if name not in row:
        return ""
    error = row.get(f"{name}_stderr")
    return f"{row[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")
