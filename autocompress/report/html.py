"""The report as one HTML file: no scripts, no links elsewhere, readable on a phone and in print."""

from __future__ import annotations

from html import escape

from autocompress.report.facts import (
    DASH,
    Facts,
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
from autocompress.report.heatmap import cell_class, cell_style, colours, heat_map
from autocompress.report.latency import dropped_table, latency, latency_table
from autocompress.report.page import html_table, page, section
from autocompress.report.plots import front_plots, progress_plot, searched, shades
from autocompress.report.search import additivity_table, dominated_table, phases_table
from autocompress.report.verdict import title, verdict


def render_html(facts: Facts) -> str:
    """The whole page."""
    tints = colours(facts.get("allocation") or ())
    body = "\n".join(
        part
        for part in (
            _head(facts),
            section("Result", html_table(results_table(facts)), html_table(gap_table(facts))),
            section(
                "Latency",
                html_table(latency_table(facts)),
                html_table(dropped_table(facts), "words"),
            ),
            section("Where the bits went", _allocation(facts)),
            section(
                "How the search went",
                html_table(phases_table(facts)),
                html_table(additivity_table(facts)),
                _progress(facts),
                html_table(dominated_table(facts), "words"),
                _fronts(facts),
            ),
            section("What it cost", html_table(cost_table(facts))),
            section(
                "How to reproduce it", _command(facts), html_table(setting_table(facts), "words")
            ),
            section("Notes", _notes(facts)),
        )
        if part
    )
    return page(title(facts), body, cell_style(tints))


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


def _allocation(facts: Facts) -> str:
    entries = facts.get("allocation") or ()
    grid = layer_grid(entries)
    picture = heat_map(grid) if grid.blocks else ""
    others = "".join(
        f'<li><i class="{cell_class(f"{layer_bits(entry):.2f}")}"></i>'
        f"{escape(entry['layer'])}: {escape(entry['level'])}</li>"
        for entry in grid.others
    )
    outside = f'<ul class="key">{others}</ul>' if others else ""
    return f"{picture}{outside}{html_table(levels_table(facts))}"


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
