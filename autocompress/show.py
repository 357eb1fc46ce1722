"""Results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from autocompress.report_facts import DASH, bits, label, loss, number, rivals, size


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
    """One row per layer."""
    table = Table(title=f"{facts['space']['name']}: {len(facts['allocation'])} layers")
    for column in ("layer", "level", "weights", "bits/weight", "bytes", "predicted loss"):
        table.add_column(column, justify="left" if column in ("layer", "level") else "right")
    for row in facts["allocation"]:
        predicted = row.get("loss_predicted")
        table.add_row(
            row["layer"],
            row["level"],
            f"{row['weights']:,}",
            f"{row['bits'] / row['weights']:.3f}",
            f"{row['bits'] // 8:,}",
            DASH if predicted is None else f"{predicted:.5f}",
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
    for column in ("space", "levels", "scope", "when to use"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["name"], " ".join(row["levels"]), " ".join(row["scope"]), row["description"]
        )
    Console().print(table)
