"""The report as one HTML file: no scripts, no links elsewhere, readable on a phone and in print."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from html import escape
from importlib import resources

from autocompress.report.facts import (
    DASH,
    Facts,
    Grid,
    Table,
    bits,
    cost_table,
    gap_table,
    layer_bits,
    layer_grid,
    levels_table,
    number,
    results_table,
    rivals,
    setting_table,
    size,
)
from autocompress.report.latency import dropped_table, latency, latency_table
from autocompress.report.plots import front_plots, progress_plot, searched, shades
from autocompress.report.search import additivity_table, dominated_table, phases_table
from autocompress.report.verdict import title, verdict

# From few bits to many; falling lightness, so it also reads in grey and by the colour-blind.
RAMP = ("#fbf3bf", "#cfe8b4", "#93d3b9", "#62b6c9", "#3a78b5", "#2b3a8a")
WIDEST = 9.0  # effective bits; more, such as a dense layer, share the darkest colour
CROWDED = 24  # columns; more of them leave no room for numbers in the cells


def render_html(facts: Facts) -> str:
    """The whole page."""
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    colours = _colours(facts)
    body = "\n".join(
        part
        for part in (
            _head(facts),
            _section("Result", _table(results_table(facts)), _table(gap_table(facts))),
            _section(
                "Latency", _table(latency_table(facts)), _table(dropped_table(facts), "words")
            ),
            _section("Where the bits went", _allocation(facts, colours)),
            _section(
                "How the search went",
                _table(phases_table(facts)),
                _table(additivity_table(facts)),
                _progress(facts),
                _table(dominated_table(facts), "words"),
                _fronts(facts),
            ),
            _section("What it cost", _table(cost_table(facts))),
            _section("How to reproduce it", _command(facts), _table(setting_table(facts), "words")),
            _section("Notes", _notes(facts)),
        )
        if part
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title(facts))}</title>\n<style>\n{style}{_cell_style(colours)}</style>\n"
        f"</head>\n<body>\n{body}\n<footer>Written by autocompress.</footer>\n</body>\n</html>\n"
    )


def _section(heading: str, *parts: str) -> str:
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>" if content else ""


def _head(facts: Facts) -> str:
    return (
        f'<header>\n<p class="eyebrow">autocompress report</p>\n<h1>{escape(title(facts))}</h1>\n'
        f'<p class="verdict">{escape(verdict(facts))}</p>\n{_tiles(facts)}\n</header>'
    )


def _tiles(facts: Facts) -> str:
    """Four figures: bits, size, loss, perplexity of the winner."""
    found = rivals(facts)
    winner, dense = (found.get(name) or {} for name in ("winner", "dense"))
    test, reference = (result.get("test") or {} for result in (winner, dense))
    limits = " and ".join(str(budget.get("text", "")) for budget in facts.get("budgets") or ())
    total, whole = facts.get("total_bytes"), facts.get("dense_bytes")
    times = f"{whole / total:.1f} times smaller than {size(whole)}" if total and whole else ""
    error = test.get("kl_stderr")
    figures = (
        ("Effective bits", bits(facts.get("effective_bits")), limits and f"budget {limits}"),
        ("Whole model", size(total), times),
        ("KL to dense", number(test.get("kl"), 4), "" if error is None else f"± {error:.4f}, test"),
        (
            "Perplexity",
            number(test.get("perplexity"), 2),
            f"dense {number(reference.get('perplexity'), 2)}" if reference else "",
        ),
        ("ms per token", latency(winner), f"dense {latency(dense)}, measured"),
    )
    tiles = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="figure">{escape(figure)}</dd>'
        f'<dd class="aside">{escape(aside)}</dd></div>'
        for name, figure, aside in figures
        if figure != DASH
    )
    return f'<dl class="tiles">{tiles}</dl>' if tiles else ""


def _table(table: Table, style: str = "") -> str:
    """A table whose first column heads its rows."""
    if not table.rows:
        return ""
    heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = []
    for index, (first, *rest) in enumerate(table.rows):
        strong = ' class="strong"' if index == table.strong else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        rows.append(f'<tr{strong}><th scope="row">{escape(first)}</th>{cells}</tr>')
    named = f' class="{style}"' if style else ""
    return (
        f'<div class="scroll"><table{named}>\n<caption>{escape(table.caption)}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )


def _colours(facts: Facts) -> dict[str, tuple[str, str]]:
    """Effective bits (as shown) -> background and text colour."""
    shown = sorted({round(layer_bits(entry), 2) for entry in facts.get("allocation") or ()})
    if not shown:
        return {}
    # Steps from few bits matter most, and one dense layer must not turn all others pale.
    places = [math.log(max(0.1, min(value, WIDEST))) for value in shown]
    spread = (places[-1] - places[0]) or 1.0
    shares = [(place - places[0]) / spread for place in places]
    return {f"{value:.2f}": _shade(share) for value, share in zip(shown, shares, strict=True)}


def _shade(share: float) -> tuple[str, str]:
    """The ramp's colour at `share` of its length, and a text colour that reads on it."""
    place = share * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    ends = [[int(RAMP[i][j : j + 2], 16) for j in (1, 3, 5)] for i in (low, low + 1)]
    mixed = [round(a + (b - a) * (place - low)) for a, b in zip(*ends, strict=True)]
    linear = [(channel / 255) ** 2.2 for channel in mixed]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    dark_reads = (luminance + 0.05) / 0.06 > 1.05 / (luminance + 0.05)  # WCAG contrast ratios
    return "#{:02x}{:02x}{:02x}".format(*mixed), "#0b1620" if dark_reads else "#ffffff"


def _cell_style(colours: Mapping[str, tuple[str, str]]) -> str:
    """One class per shown number of bits: far shorter than a style per cell."""
    return "".join(
        f".{_cell_class(value)} {{ background: {back}; color: {ink}; }}\n"
        for value, (back, ink) in colours.items()
    )


def _cell_class(value: str) -> str:
    return f"b{value.replace('.', '-')}"


def _allocation(facts: Facts, colours: Mapping[str, tuple[str, str]]) -> str:
    entries = facts.get("allocation") or ()
    grid = layer_grid(entries)
    picture = _grid(grid) if grid.blocks else ""
    others = "".join(
        f'<li><i class="{_cell_class(f"{layer_bits(entry):.2f}")}"></i>'
        f"{escape(entry['layer'])}: {escape(entry['level'])}</li>"
        for entry in grid.others
    )
    outside = f'<ul class="key">{others}</ul>' if others else ""
    return f"{picture}{outside}{_table(levels_table(facts))}"


def _grid(grid: Grid) -> str:
    """Blocks by layer types, each cell coloured by its effective bits."""
    crowded = len(grid.kinds) > CROWDED
    heads = "".join(f'<th scope="col">{_kind(kind)}</th>' for kind in grid.kinds)
    rows = []
    for block, row in grid.blocks.items():
        cells = "".join(_cell(row.get(kind), crowded) for kind in grid.kinds)
        mean = sum(e["bits"] for e in row.values()) / sum(e["weights"] for e in row.values())
        rows.append(f'<tr><th scope="row">{block}</th>{cells}<td class="mean">{mean:.2f}</td></tr>')
    return (
        f'<div class="scroll"><table class="grid{" dense" if crowded else ""}">\n'
        "<caption>Effective bits of every layer: blocks from the input (top) to the output, "
        "layer types in the order they run. Darker cells have more bits.</caption>\n"
        f'<thead><tr><th scope="col">block</th>{heads}<th scope="col">mean</th></tr></thead>\n'
        f"<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )


def _kind(kind: str) -> str:
    """'self_attn.q_proj' as two lines that may break at underscores and plus signs."""
    parent, _, name = kind.rpartition(".")
    parts = (re.sub(r"([_+])", r"\1<wbr>", escape(part)) for part in (parent, name))
    return "{}<b>{}</b>".format(*parts)


def _cell(entry: Facts | None, crowded: bool) -> str:
    if entry is None:
        return "<td></td>"
    value = layer_bits(entry)
    predicted = entry.get("loss_predicted")
    told = f"{entry['layer']}: {entry['level']}, {value:.2f} bits, {entry['weights']:,} weights"
    told += "" if predicted is None else f", predicted loss {predicted:.2g} nats per token"
    text = "" if crowded else f"{value:.1f}"
    style = _cell_class(f"{value:.2f}")
    return f'<td class="{style}" title="{escape(told)}">{text}</td>'


def _progress(facts: Facts) -> str:
    """Loss over tokens, drawn twice so that its text stays readable on a phone."""
    found = searched(facts)
    if not found:
        return ""
    counted = shades(found)
    key = "".join(
        f'<li><i class="{style}"></i>{tokens:,} tokens per trial</li>'
        for tokens, style in sorted(counted.items())
    )
    return (
        f'<figure><ul class="key">{key}</ul>'
        f'<div class="wide">{progress_plot(facts, 920, 340)}</div>'
        f'<div class="narrow">{progress_plot(facts, 360, 300)}</div>'
        "<figcaption>Loss on search windows over the tokens spent. Every dot is a trial; lines "
        "show the best so far among trials of the same windows, the only losses that compare."
        "</figcaption></figure>"
    )


def _fronts(facts: Facts) -> str:
    panels = "".join(
        f"<div><h3>{escape(split)}, {tokens:,} tokens</h3>{picture}</div>"
        for (split, tokens), picture in front_plots(facts, 300, 250).items()
    )
    if not panels:
        return ""
    return (
        f'<figure><div class="panels">{panels}</div>'
        "<figcaption>Everything that was seen, one picture per split and number of tokens. The "
        "stepped line is the front of trials that saw the same windows, diamonds are the baselines "
        "and the winner (filled), the dashed line is the budget.</figcaption></figure>"
    )


def _command(facts: Facts) -> str:
    command = facts.get("command")
    return f"<pre><code>{escape(str(command))}</code></pre>" if command else ""


def _notes(facts: Facts) -> str:
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in facts.get("notes") or ())
    return f"<ul>{notes}</ul>" if notes else ""
