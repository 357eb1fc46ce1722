"""The report as Markdown: the same sentences and tables, the allocation as a grid of digits."""

from __future__ import annotations

import re

from autocompress.report.facts import (
    Facts,
    Table,
    cost_table,
    gap_table,
    layer_bits,
    layer_grid,
    levels_table,
    results_table,
    setting_table,
)
from autocompress.report.latency import dropped_table, latency_table
from autocompress.report.plots import searched
from autocompress.report.search import additivity_table, dominated_table, phases_table
from autocompress.report.verdict import title, verdict


def render_markdown(facts: Facts) -> str:
    """The whole report."""
    command = facts.get("command")
    sections = (
        ("Result", _table(results_table(facts)), _table(gap_table(facts))),
        ("Latency", _table(latency_table(facts)), _table(dropped_table(facts))),
        ("Where the bits went", _grid(facts), _table(levels_table(facts))),
        (
            "How the search went",
            *map(_table, (phases_table(facts), additivity_table(facts), _progress(facts))),
            _table(dominated_table(facts)),
        ),
        ("What it cost", _table(cost_table(facts))),
        ("How to reproduce it", _code(str(command or "")), _table(setting_table(facts))),
        ("Notes", "\n".join(f"- {plain(note)}" for note in facts.get("notes") or ())),
    )
    parts = [f"# {plain(title(facts))}", plain(verdict(facts))]
    for heading, *contents in sections:
        if any(contents):
            parts += [f"## {heading}", *filter(None, contents)]
    return "\n\n".join(parts) + "\n\nPlots are in `report.html`.\n"


def plain(text: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|>])", r"\\\1", line)


def _code(text: str) -> str:
    return "    " + " ".join(text.split()) if text.strip() else ""


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    numeric = table.columns[0] != "What"
    rules = ("---", *(("---:" if numeric else "---") for _ in table.columns[1:]))
    lines = [table.columns, rules]
    for index, row in enumerate(table.rows):
        cells = tuple(map(plain, row))
        lines.append(tuple(f"**{cell}**" for cell in cells) if index == table.strong else cells)
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{rows}\n\n{plain(table.caption)}"


def _grid(facts: Facts) -> str:
    """Rounded effective bits, one digit column per layer type."""
    grid = layer_grid(facts.get("allocation") or ())
    if not grid.blocks:
        return ""
    names = [kind.rpartition(".")[2] or kind for kind in grid.kinds]
    widths = [max(len(name), 4) for name in names]
    lines = ["block  " + "  ".join(n.rjust(w) for n, w in zip(names, widths, strict=True))]
    for block, row in grid.blocks.items():
        cells = (f"{layer_bits(row[kind]):.1f}" if kind in row else "" for kind in grid.kinds)
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{block:5d}  {'  '.join(padded)}".rstrip())
    picture = "\n".join("    " + " ".join(line.splitlines()) for line in lines)
    others = "".join(f"\n- {plain(e['layer'])}: {plain(e['level'])}" for e in grid.others)
    return f"Effective bits by block and layer type:\n\n{picture}" + (others and f"\n{others}")


def _progress(facts: Facts) -> Table:
    """Best searched loss of every fidelity on search windows."""
    rows = []
    for (_, tokens, seed), trials in searched(facts).items():
        best = min(trials, key=lambda trial: trial["loss"])
        spent = best["spent"]
        name = f"{tokens:,} tokens" + (f", seed {seed}" if seed else "")
        rows.append((name, f"{len(trials):,}", f"{best['loss']:.4f}", f"{spent:,}"))
    return Table(
        "Search windows, by tokens per trial. Losses compare only within a row.",
        ("Fidelity", "Trials", "Best KL", "Found after tokens"),
        tuple(rows),
    )
