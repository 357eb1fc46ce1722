"""The report of a front: every point beside the simple answers, and where its bits went."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from autocompress.report.facts import (
    DASH,
    Facts,
    Table,
    bits,
    cost_table,
    layer_grid,
    loss,
    number,
    percent,
    setting_table,
    size,
)
from autocompress.report.heatmap import cell_style, colours, heat_map
from autocompress.report.latency import latency
from autocompress.report.page import html_table, page, section
from autocompress.report.plots import Axes, loss_axis, spread
from autocompress.report.search import additivity_plot, additivity_table
from autocompress.strategies.racing import SIMPLE

NAMES = {**SIMPLE, "search": "search", "tighter limit": "the answer to a tighter limit"}
SURE = 1.96  # standard errors of a 95 % interval
SPLITS = ("search", "validate", "test")
AXES = {"bits": "effective bits", "bytes": "MB", "latency": "ms per token"}


def render_front(facts: Facts) -> str:
    """The whole page."""
    points = facts["points"]
    tints = colours(entry for point in points for entry in point["allocation"])
    body = "\n".join(
        part
        for part in (
            _head(facts),
            section("Front", _plot(facts), html_table(points_table(facts))),
            section("Against the simple answers", html_table(rivals_table(facts))),
            section("What carries over", html_table(splits_table(facts))),
            section("Predicted and measured cost", html_table(measured_table(facts))),
            section("Where the bits went", *_maps(facts)),
            section(
                "Do losses of layers add up?",
                additivity_plot(facts),
                html_table(additivity_table(facts)),
            ),
            section("What it cost", html_table(cost_table(facts))),
            section(
                "How to reproduce it", _command(facts), html_table(setting_table(facts), "words")
            ),
            section("Notes", *(f"<p>{escape(str(note))}</p>" for note in facts.get("notes") or ())),
        )
        if part
    )
    return page(_title(facts), body, cell_style(tints))


def _head(facts: Facts) -> str:
    return (
        f'<header>\n<p class="eyebrow">autocompress report</p>\n<h1>{escape(_title(facts))}</h1>\n'
        f'<p class="verdict">{escape(verdict(facts))}</p>\n</header>'
    )


def _title(facts: Facts) -> str:
    return f"{facts['model']['name']}: {len(facts['points'])} points, {facts['pareto']}"


def verdict(facts: Facts) -> str:
    """Who won at the points, where the knee is, and the hypervolume."""
    points = facts["points"]
    simple = [point["limit"] for point in points if point["role"] in SIMPLE]
    searched = [point for point in points if point["role"] not in SIMPLE]
    lead = f"The search won at {len(searched)} of {len(points)} limits on validation windows"
    if simple:
        winners = ", ".join(
            f"{NAMES[point['role']]} at {point['limit']}"
            for point in points
            if point["role"] in SIMPLE
        )
        lead += f"; a simple answer won at the others and is the result there: {winners}"
    parts = [f"{lead}."]
    if facts.get("knee") is not None:
        knee = points[facts["knee"]]
        parts.append(
            f"The knee is at {knee['limit']}: {bits(knee['effective_bits'])} bits, KL "
            f"{loss(knee['validate'])}; beyond it more size buys little."
        )
    volume = facts["hypervolume"]
    cost, worst = volume["reference"]
    parts.append(
        f"Hypervolume {volume['value']:.4g} to the reference point ({cost:.4g} "
        f"{'effective bits' if facts['cost'] == 'bits' else facts['cost']}, {worst:.4g} nats per "
        "token), the worst of all that was validated."
    )
    return " ".join(parts)


def points_table(facts: Facts) -> Table:
    """A row per limit."""
    timed = any("latency" in point for point in facts["points"])
    columns = ("Limit", "Effective bits", "Size", "KL, validation", "Perplexity, test", "From")
    rows = []
    for number_, point in enumerate(facts["points"]):
        mark = " (knee)" if number_ == facts.get("knee") else ""
        row = (
            f"{point['limit']}{mark}",
            bits(point["effective_bits"]),
            size(point["total_bytes"]),
            loss(point["validate"]),
            number((point.get("test") or {}).get("perplexity"), 2),
            point["path"],
        )
        rows.append((*row, latency(point)) if timed else row)
    return Table(
        "What won at every limit; KL in nats per token with its standard error, size of the whole "
        "model. The last column names the folder. Every model was loaded again, and lost what "
        "had been scored.",
        (*columns, "ms per token") if timed else columns,
        tuple(rows),
        strong=facts.get("knee"),
    )


def rivals_table(facts: Facts) -> Table:
    """The loss of every rival at every limit, on validation windows."""
    names = [it for it in NAMES if any(it in point["rivals"] for point in facts["points"])]
    rows = tuple(
        (
            point["limit"],
            *(loss((point["rivals"].get(name) or {}).get("validate")) for name in names),
            NAMES[point["role"]],
        )
        for point in facts["points"]
    )
    heads = tuple(NAMES[name][0].upper() + NAMES[name][1:] for name in names)
    return Table(
        "KL on validation windows, nats per token, ± standard error over windows. All are within "
        "the limit. A searched answer wins where the windows prove it better than all simple ones, "
        "by two standard errors of their difference; else the simple one of least loss wins.",
        ("Limit", *heads, "Winner"),
        rows,
    )


def splits_table(facts: Facts) -> Table:
    """Search, validation and test side by side."""
    rows = []
    for point in facts["points"]:
        losses = [(point.get(split) or {}).get("kl") for split in SPLITS]
        gap = percent(losses[-1] / losses[0] - 1, "+") if losses[-1] and losses[0] else DASH
        rows.append((point["limit"], *(number(kl, 4) for kl in losses), gap))
    return Table(
        "KL by split, nats per token. Candidates were "
        "compared on search windows, winners chosen on validation windows; test windows saw no "
        "decision. The gap is test over search.",
        ("Limit", "Search", "Validation", "Test", "Gap"),
        tuple(rows),
    )


def measured_table(facts: Facts) -> Table:
    """Costs as the search saw them, and as they turned out."""
    rows = []
    for point in facts["points"]:
        times = point.get("latency") or {}
        rows.append(
            (
                point["limit"],
                size(point["total_bytes"]),
                size(point["file_bytes"]),
                percent(point["file_bytes"] / point["total_bytes"] - 1, "+"),
                number(times.get("predicted_ms"), 2),
                number(times.get("measured_ms"), 2),
            )
        )
    return Table(
        "Size is predicted with room for the file's header, an upper limit. Latency in ms per "
        "token, where it was limited.",
        ("Limit", "Size, predicted", "File", "Difference", "ms, predicted", "ms, measured"),
        tuple(rows),
    )


def _maps(facts: Facts) -> Iterator[str]:
    """A heat map of every different winner; the first stands open."""
    shown: set[str] = set()
    for point in facts["points"]:
        if point["path"] not in shown:
            opened = "" if shown else " open"
            shown.add(point["path"])
            grid = layer_grid(point["allocation"])
            heading = f"{point['limit']}: {bits(point['effective_bits'])} bits, {point['origin']}"
            yield (
                f"<details{opened}><summary>{escape(heading)}</summary>"
                f"{heat_map(grid) if grid.blocks else ''}</details>"
            )


def _plot(facts: Facts) -> str:
    """The front, drawn twice so that its text stays readable on a phone."""
    key = "".join(
        f'<li><i class="{style}"></i>{name}</li>'
        for style, name in (("s0", "front"), ("s1", "knee"), ("simple", "simple answers"))
    )
    return (
        f'<figure><ul class="key">{key}</ul>'
        f'<div class="wide">{_front(facts, 920, 420)}</div>'
        f'<div class="narrow">{_front(facts, 360, 320)}</div>'
        "<figcaption>Loss on validation windows against cost, with 95 % intervals over windows "
        "(differences between points of the same windows are far surer). Rest the pointer on a "
        "point for its allocation.</figcaption></figure>"
    )


def _simple(point: Facts) -> dict[str, Facts]:
    return {role: row for role, row in point["rivals"].items() if role in SIMPLE}


def _front(facts: Facts, width: int, height: int) -> str:
    cost = facts["cost"]
    winners = [(_cost(point, cost), point["validate"]["kl"]) for point in facts["points"]]
    simple = {
        (_cost(row, cost), row["validate"]["kl"]): f"{NAMES[role]} at {point['limit']}"
        for point in facts["points"]
        for role, row in _simple(point).items()
        if row["validate"]["kl"] is not None
    }
    errors = {
        (_cost(row, cost), row["validate"]["kl"]): row["validate"]["kl_stderr"]
        for point in facts["points"]
        for row in (point, *_simple(point).values())
    }
    places = [*winners, *simple]
    y, log = loss_axis([kl for _, kl in places])
    axes = Axes(width, height, spread(place[0] for place in places), y, log)
    axes.frame(AXES[cost], "KL, nats per token")
    axes.stairs(sorted(set(winners)), "front")
    for place in dict.fromkeys(places):
        axes.bar(place, SURE * (errors[place] or 0.0), "")
    for place, told in simple.items():
        axes.diamond(place, "simple", f"{told}: KL {place[1]:.4f}", 4)
    for number_, (place, point) in enumerate(zip(winners, facts["points"], strict=True)):
        axes.diamond(place, "knee" if number_ == facts.get("knee") else "winner", _told(point))
    return axes.svg(f"Loss against {AXES[cost]}")


def _cost(row: Facts, cost: str) -> float:
    if cost == "latency":
        return float((row.get("latency") or row)["predicted_ms"])
    return float(row["effective_bits"] if cost == "bits" else row["total_bytes"] / 1e6)


def _told(point: Facts) -> str:
    """What a point's allocation is in few words."""
    counts: dict[str, int] = {}
    for entry in point["allocation"]:
        counts[entry["level"]] = counts.get(entry["level"], 0) + 1
    levels = ", ".join(f"{count} × {level}" for level, count in sorted(counts.items()))
    return (
        f"{point['limit']}: {bits(point['effective_bits'])} bits, {size(point['total_bytes'])}, KL "
        f"{loss(point['validate'])}, from {point['origin']}\n{levels}"
    )


def _command(facts: Facts) -> str:
    command = facts.get("command")
    return f"<pre><code>{escape(str(command))}</code></pre>" if command else ""
