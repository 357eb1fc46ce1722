"""The report's plots as inline SVG, coloured by the page's style: dark mode and print work.

Points are zero-length strokes of one path per series (14 bytes a point), so that thousands of
trials stay far below a megabyte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from autocompress.pareto import front
from autocompress.report.facts import RIVALS, Facts, rivals

Point = tuple[float, float]
Group = tuple[str, int, int]  # split, tokens, seed: the losses that may be compared

MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 44, 14, 28, 40
MAX_POINTS = 2000  # per series; beyond it a plot gets heavier, not clearer


@dataclass
class Axes:
    """A frame with two scales; drawing adds to `parts`.

    Args:
        width, height: of the picture, user units (one CSS pixel at full size).
        x: data range, left to right.
        y: data range, bottom to top.
        log_y: logarithmic losses.
        log_x: logarithmic across, too.
    """

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    log_y: bool = False
    log_x: bool = False
    parts: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> Point:
        """Data to picture coordinates."""
        across, up = _share(x, self.x, self.log_x), _share(y, self.y, self.log_y)
        inner = self.width - MARGIN_LEFT - MARGIN_RIGHT
        tall = self.height - MARGIN_TOP - MARGIN_BOTTOM
        return MARGIN_LEFT + across * inner, MARGIN_TOP + (1 - up) * tall

    def text(self, x: float, y: float, text: str, anchor: str = "middle", style: str = "") -> None:
        """A text at picture coordinates."""
        name = f' class="{style}"' if style else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}>{escape(text)}</text>'
        )

    def path(self, data: str, style: str) -> None:
        """A path in picture coordinates."""
        if data:
            self.parts.append(f'<path class="{style}" d="{data}"/>')

    def dots(self, points: Sequence[Point], style: str) -> None:
        """Data points, evenly thinned when there are too many."""
        step = max(1, math.ceil(len(points) / MAX_POINTS))
        places = (self.at(*point) for point in points[::step])
        self.path("".join(f"M{x:.1f} {y:.1f}h.01" for x, y in places), f"dots {style}")

    def diamond(self, place: Point, style: str, told: str = "", size: int = 6) -> None:
        """A mark for one data point; `told` is shown where a pointer rests on it."""
        x, y = self.at(*place)
        data = f"M{x:.1f} {y - size:.1f}l{size} {size}l-{size} {size}l-{size} -{size}z"
        title = f"<title>{escape(told)}</title>" if told else ""
        self.parts.append(f'<path class="mark {style}" d="{data}">{title}</path>')

    def bar(self, place: Point, error: float, style: str) -> None:
        """A vertical error bar of a data point, cut at the frame."""
        x, loss = place
        ends = (min(max(loss + sign * error, self.y[0]), self.y[1]) for sign in (-1, 1))
        (across, low), (_, high) = (self.at(x, end) for end in ends)
        caps = (f"M{across - 4:.1f} {y:.1f}h8" for y in (low, high))
        self.path(f"M{across:.1f} {low:.1f}V{high:.1f}{''.join(caps)}", f"bar {style}")

    def stairs(self, points: Sequence[Point], style: str) -> None:
        """A line through data points that only steps: nothing between them was measured."""
        places = [self.at(*point) for point in points]
        steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in places[1:])
        if steps:
            self.path(f"M{places[0][0]:.1f} {places[0][1]:.1f}{steps}", f"line {style}")

    def frame(self, x_label: str, y_label: str) -> None:
        """Grid lines, tick labels and axis names."""
        bottom, right = self.height - MARGIN_BOTTOM, self.width - MARGIN_RIGHT
        values = log_ticks(*self.y) if self.log_y else ticks(*self.y)
        for value, text in zip(values, alike(values) if not self.log_y else values, strict=True):
            _, y = self.at(self.x[0], value)
            self.path(f"M{MARGIN_LEFT} {y:.1f}H{right}", "grid")
            self.text(MARGIN_LEFT - 6, y + 4, f"{text}", "end")
        values = log_ticks(*self.x) if self.log_x else ticks(*self.x, max(4, self.width // 110))
        for value, text in zip(values, alike(values) if not self.log_x else values, strict=True):
            x, _ = self.at(value, self.y[0])
            self.path(f"M{x:.1f} {bottom}v4", "axis")
            self.text(x, bottom + 17, f"{text}")
        self.path(f"M{MARGIN_LEFT} {bottom}H{right}", "axis")
        self.text((MARGIN_LEFT + right) / 2, self.height - 6, x_label)
        self.text(2, 12, y_label, "start")

    def svg(self, name: str) -> str:
        """The picture, named for screen readers."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(name)}">'
            f"{''.join(self.parts)}</svg>"
        )


def _share(value: float, ends: tuple[float, float], log: bool) -> float:
    """How far along a scale a value is, 0 to 1."""
    low, high, at = (math.log(it) if log else it for it in (*ends, value))
    return (at - low) / (high - low)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values inside the range."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of every decade inside the range; of many decades, only the ones."""
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = (round(factor * 10.0**decade, 10) for decade in decades for factor in factors)
    return [value for value in values if low <= value <= high]


def alike(values: Sequence[float]) -> list[str]:
    """Tick labels with one number of decimals; thousands and millions are abbreviated."""
    largest = max(map(abs, values), default=0)
    unit, suffix = (1e6, "M") if largest >= 2e6 else (1e3, "k") if largest >= 2e3 else (1.0, "")
    scaled = [value / unit for value in values]
    decimals = max((len(f"{value:g}".partition(".")[2]) for value in scaled), default=0)
    return [f"{value:.{decimals}f}{suffix if value else ''}" for value in scaled]


def spread(values: Iterable[float], log: bool = False) -> tuple[float, float]:
    """The values' range with a margin, never empty."""
    known = list(values)
    low, high = min(known), max(known)
    if log:
        return low / 1.15, high * 1.15
    pad = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return low - pad, high + pad


def loss_axis(losses: Sequence[float]) -> tuple[tuple[float, float], bool]:
    """The range of an axis of losses, and whether it is logarithmic."""
    log = min(losses) > 0 and max(losses) / min(losses) > 5
    return spread(losses, log), log


def groups(facts: Facts) -> dict[Group, list[dict[str, Any]]]:
    """Trials that were scored at all positions, by fidelity; search first, few tokens first."""
    found: dict[Group, list[dict[str, Any]]] = {}
    for trial in facts.get("trials") or ():
        whole = trial.get("every", 1) == 1  # others only choose who is scored further
        if whole and trial.get("loss") is not None and math.isfinite(trial["loss"]):
            key = (trial.get("split", "search"), trial.get("tokens", 0), trial.get("seed", 0))
            found.setdefault(key, []).append(trial)
    order = ("search", "validate", "test")
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1:])))


def searched(facts: Facts) -> dict[Group, list[dict[str, Any]]]:
    """What the search proposed (no uniform models) on search windows, by fidelity."""
    kept = {
        group: [trial for trial in trials if not trial["origin"].startswith("uniform")]
        for group, trials in groups(facts).items()
        if group[0] == "search"
    }
    return {group: trials for group, trials in kept.items() if trials}


def shades(found: Iterable[Group]) -> dict[int, str]:
    """Style of each token count: the most tokens get the strongest colour."""
    counts = sorted({tokens for _, tokens, _ in found}, reverse=True)
    return {tokens: f"s{min(rank, 3)}" for rank, tokens in enumerate(counts)}


def progress_plot(facts: Facts, width: int, height: int) -> str:
    """Loss over tokens spent; the line is the best so far among comparable losses."""
    found = searched(facts)
    if not found:
        return ""
    flat = [trial for trials in found.values() for trial in trials]
    y, log = loss_axis([trial["loss"] for trial in flat])
    spent = max(trial["spent"] for trial in flat)
    axes = Axes(width, height, (0, spent * 1.02 or 1), y, log)
    axes.frame("tokens spent", "KL, nats per token")
    style = shades(found)
    for (_, tokens, _), trials in found.items():
        axes.dots([_spent_at(trial) for trial in trials], style[tokens])
    for (_, tokens, _), trials in found.items():
        best, line = math.inf, []
        for trial in sorted(trials, key=lambda trial: trial["spent"]):
            best = min(best, trial["loss"])
            line.append((_spent_at(trial)[0], best))
        axes.stairs(line, style[tokens])
    return axes.svg("Loss of every searched trial over the tokens spent until then")


def _spent_at(trial: Facts) -> Point:
    return trial["spent"], trial["loss"]


def front_plots(facts: Facts, width: int, height: int) -> dict[tuple[str, int], str]:
    """Loss against effective bits, one picture per split and token count.

    Trials of different seeds saw different windows, so together they have no front.
    """
    panels: dict[tuple[str, int], list[Facts]] = {}
    for (split, tokens, _), trials in groups(facts).items():
        panels.setdefault((split, tokens), []).extend(trials)
    marks = _marks(facts)
    for key in sorted(marks, key=lambda key: key[0]):
        panels.setdefault(key, [])
    return {
        key: _front_plot(facts, key, trials, marks.get(key, {}), width, height)
        for key, trials in panels.items()
        if len(trials) + len(marks.get(key, {})) > 1
    }


def _marks(facts: Facts) -> dict[tuple[str, int], dict[str, Point]]:
    """Scores of uniform, ILP and winner by split and tokens."""
    marks: dict[tuple[str, int], dict[str, Point]] = {}
    for name, result in rivals(facts).items():
        for split in ("search", "validate", "test"):
            score = result.get(split) or {}
            if name != "dense" and score.get("kl") and result.get("effective_bits") is not None:
                key = (split, score.get("tokens", 0))
                marks.setdefault(key, {})[name] = (result["effective_bits"], score["kl"])
    return marks


def _front_plot(
    facts: Facts,
    key: tuple[str, int],
    trials: Sequence[Facts],
    marks: dict[str, Point],
    width: int,
    height: int,
) -> str:
    points = [(trial["effective_bits"], trial["loss"]) for trial in trials]
    everything = [*points, *marks.values()]
    y, log = loss_axis([loss for _, loss in everything])
    axes = Axes(width, height, spread(bits for bits, _ in everything), y, log)
    axes.frame("effective bits", "KL, nats per token")
    _budget_line(axes, facts)
    distinct = sorted(set(everything))
    kept = front(np.array(distinct, dtype=np.float64))
    if len({trial.get("seed", 0) for trial in trials}) <= 1:
        axes.stairs([point for point, best in zip(distinct, kept, strict=True) if best], "front")
    axes.dots(points, "s0")
    for trial, place in zip(trials, points, strict=True):
        if trial["origin"].startswith("uniform"):
            axes.diamond(place, "uniform")
    _label(axes, marks)
    return axes.svg(f"Loss against effective bits, {key[0]} windows, {key[1]:,} tokens")


def _label(axes: Axes, marks: Mapping[str, Point]) -> None:
    """Marks with their names, which never overlap; what won under two names has both."""
    names: dict[Point, list[str]] = {}
    for name, place in marks.items():
        names.setdefault(place, []).append(name)
    below = -math.inf
    for place, same in sorted(names.items(), key=lambda item: axes.at(*item[0])[1]):
        x, spot = axes.at(*place)
        axes.diamond(place, same[-1])
        left = x > axes.width * 0.6
        below = max(spot + 4, below + 14)
        text = " = ".join(RIVALS[name] for name in same)
        axes.text(x + (-10 if left else 10), below, text, "end" if left else "start", "tag")


def _budget_line(axes: Axes, facts: Facts) -> None:
    weights = (facts.get("space") or {}).get("weights")
    for budget in facts.get("budgets") or ():
        if budget.get("cost") == "bits" and budget.get("limit") and weights:
            limit = budget["limit"] / weights
            if axes.x[0] <= limit <= axes.x[1]:
                x, _ = axes.at(limit, axes.y[0])
                axes.path(f"M{x:.1f} {MARGIN_TOP}V{axes.height - MARGIN_BOTTOM}", "limit")
