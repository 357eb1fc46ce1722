"""Results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonpath
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from autocompress.report.facts import (
    DASH,
    bits,
    label,
    loss,
    number,
    rivals,
    size,
)
from autocompress.report.latency import latency

WORDS = ("shape", "level", "runs on", "")  # columns of a profile that are read from the left


def show(facts: dict[str, Any], folder: Path) -> None:
    """Print what `output.describe` found."""
    if "tensors" in facts:
        tensor_table(facts)
    elif "modules" in facts:
        module_table(facts)
    elif "plan" in facts:
        plan_table(facts)
    else:
        layer_table(facts)
        if facts["results"]:
            result_table(facts, folder)


def plan_table(facts: dict[str, Any]) -> None:
    """Patterns and levels of a plan, and how it is built."""
    table = Table(title=f"{facts['file']}: a plan")
    table.add_column("layers", overflow="fold")
    table.add_column("level")
    for row in facts["plan"]:
        table.add_row(row["layers"], row["level"])
    Console().print(table)
    build = f"autocompress build --plan {facts['file']} --out MODEL"
    Console().print("The first pattern that matches wins. It holds no weights; this builds them:")
    Console().print(build, highlight=False, soft_wrap=True)


def module_table(facts: dict[str, Any]) -> None:
    """Every matrix of a model folder, and the sums of each level."""
    table = Table(title=f"{facts['folder']}: {facts['method']}, {facts['architecture']}")
    table.add_column("module", overflow="fold")
    table.add_column("level", no_wrap=True)
    for column in ("shape", "bits/weight", "bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in facts["modules"]:
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(row["name"], row["level"], shape, f"{row['bits']:.3f}", f"{row['bytes']:,}")
    console = Console()
    console.print(table)
    for level, total in sorted(facts["levels"].items()):
        console.print(
            f"{level}: {total['weights']:,} weights, {total['bytes']:,} bytes", highlight=False
        )
    console.print(
        f"{facts['file_bytes']:,} bytes on disk, {facts['bits_per_weight']:.4f} bits per weight of "
        "all matrices",
        highlight=False,
    )


def result_table(facts: dict[str, Any], folder: Path) -> None:
    """Dense, uniform, ILP and winner on test windows, and where everything is."""
    table = Table(title=f"{facts['model']['name']}: test windows")
    timed = "latency" in facts
    columns = ("model", "effective bits", "size", "KL, nats/token", "perplexity")
    for column in (*columns, "ms/token") if timed else columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in rivals(facts).items():
        if name == "ends":
            continue  # scored on validation windows only
        test = row.get("test") or {}
        cells = (
            label(name, row),
            bits(row["effective_bits"]),
            size(row["total_bytes"]),
            loss(test),
            number(test.get("perplexity"), 2),
        )
        table.add_row(*cells, latency(row)) if timed else table.add_row(*cells)
    console = Console()
    console.print(table)
    console.print(
        f"{facts['effective_bits']:.4f} effective bits in scope, {facts['model_bits']:.4f} bits "
        f"per parameter of the whole model, {facts['file_bytes']:,} bytes on disk.",
        highlight=False,
    )
    console.print(f"model  {folder}\nreport {folder / 'report.html'}", highlight=False)


def front_table(facts: dict[str, Any], folder: Path) -> None:
    """What won at every limit of a front."""
    table = Table(title=f"{facts['model']['name']}: validation windows")
    for column in ("limit", "effective bits", "size", "KL, nats/token", "winner", "folder"):
        table.add_column(column, justify="left" if column in ("winner", "folder") else "right")
    for number_, point in enumerate(facts["points"]):
        table.add_row(
            point["limit"] + (" knee" if number_ == facts["knee"] else ""),
            bits(point["effective_bits"]),
            size(point["total_bytes"]),
            loss(point["validate"]),
            f"{point['role']}: {point['origin']}",
            point["path"],
        )
    console = Console()
    console.print(table)
    volume = facts["hypervolume"]
    console.print(
        f"hypervolume {volume['value']:.4g} to ({volume['reference'][0]:.4g} {facts['cost']}, "
        f"{volume['reference'][1]:.4g} nats/token), the worst that was validated",
        highlight=False,
    )
    console.print(f"models {folder}\nreport {folder / 'report.html'}", highlight=False)


def points_table(about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """The front of a run folder."""
    title = f"{about['model']}: {about['windows']} validation windows"
    table = Table(title=title)
    for column in ("point", "effective bits", "size", "KL, nats/token", "perplexity", "origin"):
        table.add_column(column, justify="left" if column == "origin" else "right")
    for row in rows:
        table.add_row(
            f"{'knee ' if row['knee'] else ''}{row['point']}",
            bits(row["effective_bits"]),
            size(row["bytes"]),
            loss(row),
            number(row["perplexity"], 2),
            row["origin"],
        )
    console = Console()
    console.print(table)
    worst = about["reference"]
    console.print(
        f"hypervolume {about['hypervolume']:.4g} to ({worst[0]:.4g} {about['cost']}, "
        f"{worst[1]:.4g} nats/token), the worst of the run",
        highlight=False,
    )


def comparison_table(facts: dict[str, Any]) -> None:
    """Two runs at equal cost."""
    table = Table(title=f"{facts['windows']} validation windows, the same for both")
    for column in (facts["cost"], "KL, first", "KL, second", "difference", "95 % interval"):
        table.add_column(column, justify="right")
    for row in facts["points"]:
        one, other = row["losses"]
        table.add_row(
            " / ".join(f"{cost:.6g}" for cost in row["costs"]),
            f"{one:.4f}",
            f"{other:.4f}",
            f"{row['difference'] / one:+.1%}" if one else DASH,
            f"{row['low']:+.4f} to {row['high']:+.4f}",
        )
    console = Console()
    console.print(table)
    first, second = facts["hypervolume"]
    cost, worst = facts["reference"]
    console.print(
        f"first {facts['runs'][0]}\nsecond {facts['runs'][1]}, its best at no more cost; the "
        f"difference is second − first, nats/token\nhypervolume {first:.4g} and {second:.4g} to "
        f"({cost:.4g} {facts['cost']}, {worst:.4g} nats/token)",
        highlight=False,
    )


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


def tensor_table(facts: dict[str, Any]) -> None:
    """One row per tensor of a GGUF file, and what its types sum up to."""
    table = Table(
        title=f"{facts['file']}: {facts['architecture']}, {len(facts['tensors'])} tensors"
    )
    for column in ("tensor", "type", "shape", "bits/weight", "bytes"):
        table.add_column(column, justify="left" if column in ("tensor", "type") else "right")
    for row in facts["tensors"]:
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(row["name"], row["type"], shape, f"{row['bits']:.4g}", f"{row['bytes']:,}")
    console = Console()
    console.print(table)
    for kind, part in sorted(facts["types"].items(), key=lambda item: -item[1]["bytes"]):
        text = f"{kind}: {part['weights']:,} weights, {part['bytes']:,} bytes"
        console.print(text, highlight=False)
    console.print(
        f"{facts['weights']:,} weights, {facts['bits_per_weight']:.4f} bits per weight, "
        f"{facts['file_bytes']:,} bytes on disk.",
        highlight=False,
    )


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


def latency_table(facts: dict[str, Any], layers: int) -> None:
    """Every timing of a profile, what is left out, and the model around the layers."""
    title = f"{facts['use']}: one call, weights cold; time against dense, with its 95 % interval"
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("shape", "rows", "level", "runs on", "µs", "GB/s", "dense", "±", ""):
        table.add_column(column, justify="left" if column in WORDS else "right", overflow="fold")
    for row in sorted(facts["points"], key=lambda row: (row["shape"], row["rows"], row["us"])):
        table.add_row(
            "x".join(map(str, row["shape"])),
            str(row["rows"]),
            row["level"],
            row["backend"],
            f"{row['us']:.1f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['ratio']:.3f}",
            f"{(row['high'] - row['low']) / 2:.3f}",
            "left out" if row["dropped"] else "noisy" if row["noisy"] else "",
        )
    console = Console()
    console.print(table)
    for dropped in facts["dropped"]:
        count = len(dropped["layers"])
        text = f"left out of {count} of {layers} layers: {dropped['level']}, {dropped['reason']}"
        console.print(text, highlight=False)
    part = facts["model"]
    if part is not None:
        dense = "" if part["dense_ms"] is None else f", dense model {part['dense_ms']:.2f} ms"
        console.print(
            f"model: {part['fixed_ms']:.2f} ms per token outside the table, table times "
            f"{part['scale']:.3f}{dense}; decoder: {part['decoder']}",
            highlight=False,
        )
    if facts["path"]:
        console.print(f"store  {facts['path']}", highlight=False)
