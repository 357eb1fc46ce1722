"""Results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonpath
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from autocompress.report.facts import DASH, bits, label, loss, number, rivals, size


def result_table(facts: dict[str, Any], folder: Path) -> None:
    """Dense, uniform, ILP and winner on test windows, and where everything is."""
    table = Table(title=f"{facts['model']['name']}: test windows")
    for column in ("model", "effective bits", "size", "KL, nats/token", "perplexity"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in rivals(facts).items():
        test = row.get("test") or {}
        table.add_row(
            label(name, row),
            bits(row["effective_bits"]),
            size(row["total_bytes"]),
            loss(test),
            number(test.get("perplexity"), 2),
        )
    console = Console()
    console.print(table)
    console.print(
        f"{facts['effective_bits']:.4f} effective bits in scope, {facts['model_bits']:.4f} bits "
        f"per parameter of the whole model, {facts['file_bytes']:,} bytes on disk.",
        highlight=False,
    )
    console.print(f"model  {folder}\nreport {folder / 'report.html'}", highlight=False)


def layer_table(facts: dict[str, Any]) -> None:
    """One row per layer; what all names begin with is in the title, so that rows stay short."""
    names = [row["layer"] for row in facts["allocation"]]
    shared = commonpath([name.replace(".", "/") for name in names]) if len(names) > 1 else ""
    prefix = shared.replace("/", ".")
    within = f" of {prefix}" if prefix else ""
    table = Table(title=f"{facts['space']['name']}: {len(names)} layers{within}")
    table.add_column("layer", overflow="fold")
    table.add_column("level", no_wrap=True)
    for column in ("weights", "bits/weight", "bytes", "predicted KL"):
        table.add_column(column, justify="right")
    for row in facts["allocation"]:
        predicted = row.get("loss_predicted")
        table.add_row(
            row["layer"].removeprefix(f"{prefix}."),
            row["level"],
            f"{row['weights']:,}",
            f"{row['bits'] / row['weights']:.3f}",
            f"{row['bits'] // 8:,}",
            DASH if predicted is None else f"{predicted:.2g}",
        )
    Console().print(table)


def score_table(facts: dict[str, Any]) -> None:
    """A packed model's score beside the dense model's."""
    table = Table(title=f"{facts['tokens']:,} tokens of {facts['data']}")
    for column in ("model", "KL, nats/token", "perplexity"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in ("dense", "packed"):
        table.add_row(name, loss(facts[name]), number(facts[name]["perplexity"], 2))
    Console().print(table)


def space_table(rows: Sequence[dict[str, Any]]) -> None:
    """The search spaces."""
    table = Table()
    table.add_column("space", no_wrap=True)
    for column in ("levels", "scope", "when to use"):
        table.add_column(column)
    for row in rows:
        reason = row["description"].removeprefix("When to use: ")
        table.add_row(row["name"], " ".join(row["levels"]), " ".join(row["scope"]), reason)
    Console().print(table)
