"""Where the bits went: layers by block and type, coloured by their effective bits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from html import escape

from autocompress.report.facts import Facts, Grid, layer_bits

# From few bits to many; falling lightness, so it also reads in grey and by the colour-blind.
RAMP = ("#fbf3bf", "#cfe8b4", "#93d3b9", "#62b6c9", "#3a78b5", "#2b3a8a")
WIDEST = 9.0  # effective bits; more, such as a dense layer, share the darkest colour
CROWDED = 24  # columns; more of them leave no room for numbers in the cells

Colours = Mapping[str, tuple[str, str]]  # effective bits, as shown -> background, text colour


def colours(entries: Iterable[Facts]) -> dict[str, tuple[str, str]]:
    """Effective bits (as shown) -> background and text colour.

    Args:
        entries: layers of one allocation, or of several that share their colours.
    """
    shown = sorted({round(layer_bits(entry), 2) for entry in entries})
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


def cell_style(colours: Colours) -> str:
    """One class per shown number of bits: far shorter than a style per cell."""
    return "".join(
        f".{cell_class(value)} {{ background: {back}; color: {ink}; }}\n"
        for value, (back, ink) in colours.items()
    )


def cell_class(value: str) -> str:
    """The class of cells that show a number of bits."""
    return f"b{value.replace('.', '-')}"


def heat_map(grid: Grid) -> str:
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
        "<caption><span>Effective bits of every layer: blocks from the input (top) to the output, "
        "layer types in the order they run. Darker cells have more bits.</span></caption>\n"
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
    style = cell_class(f"{value:.2f}")
    return f'<td class="{style}" title="{escape(told)}">{text}</td>'
