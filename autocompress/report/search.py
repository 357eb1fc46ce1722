"""How a search went, phase by phase: what each bought, and whether losses of layers added up."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import StatisticsError, correlation, median
from typing import Any

from autocompress.report.facts import DASH, Facts, Table, number, percent
from autocompress.report.plots import Axes, spread

FEW = 3  # trials, below which a correlation says nothing


def phases_table(facts: Facts) -> Table:
    """Tokens and best loss of every phase, in the order in which they began."""
    rows, best = [], None
    for origin, trials in _phases(facts):
        tokens = sum(trial["paid"] for trial in trials)
        longest = max(trial["tokens"] for trial in trials)
        whole = [trial for trial in trials if trial.get("every", 1) == 1]
        losses = [trial["loss"] for trial in whole if trial["tokens"] == longest]
        loss = min((loss for loss in losses if loss is not None), default=None)
        same = best is not None and best[0] == longest and loss is not None
        change = DASH
        if best is not None and same and best[1]:
            change = percent(loss / best[1] - 1, "+") if loss < best[1] else "no gain"
        rows.append((origin, f"{len(trials):,}", f"{tokens:,}", number(loss, 4), change))
        if loss is not None and (not same or (best is not None and loss < best[1])):
            best = longest, loss
    return Table(
        "Search windows. Tokens include those of gradients (three times) that a phase asked for; "
        "losses are on the most windows that the phase used, the change is against the best "
        "before on as many.",
        ("Phase", "Trials", "Tokens", "Best KL", "Change"),
        tuple(rows),
    )


def dominated_table(facts: Facts) -> Table:
    """Levels that the search was not offered."""
    rows = tuple(
        (str(entry.get("level")), f"{len(entry.get('layers') or ()):,}", str(entry.get("reason")))
        for entry in facts.get("dominated") or ()
    )
    return Table(
        "Levels left out before the search: in these layers another level is as good by the error "
        "of their outputs on calibration text, and costs no more.",
        ("What", "Layers", "Reason"),
        rows,
    )


def additivity_table(facts: Facts) -> Table:
    """Sums of sensitivities beside measured losses, phase by phase."""
    rows = []
    for origin, trials in _phases(facts):
        pairs = [
            (trial["predicted"], trial["loss"])
            for trial in trials
            if trial.get("predicted") and trial["loss"] and trial.get("every", 1) == 1
        ]
        if pairs:
            ratio = median(loss / predicted for predicted, loss in pairs)
            rows.append((origin, f"{len(pairs):,}", f"{ratio:.2f}", _correlation(pairs)))
    return Table(
        "Sum of the layers' sensitivities against the measured loss. A ratio of 1 and a "
        "correlation near 1 mean that losses add up; where they do not, only phases that see "
        "layers together can gain.",
        ("Phase", "Trials", "Measured / predicted, median", "Correlation"),
        tuple(rows),
    )


def additivity_plot(facts: Facts) -> str:
    """Measured losses against sums of sensitivities; on the line they would be equal."""
    pairs = [
        (trial["predicted"], trial["loss"])
        for trial in facts.get("trials") or ()
        if trial.get("predicted") and trial["loss"] and trial["split"] == "validate"
    ]
    if len(pairs) < FEW:
        return ""
    values = [value for pair in pairs for value in pair]
    both = spread(values, log=True)
    axes = Axes(460, 320, both, both, log_y=True, log_x=True)
    axes.frame("sum of sensitivities", "measured KL, nats per token")
    (left, low), (right, high) = axes.at(both[0], both[0]), axes.at(both[1], both[1])
    axes.path(f"M{left:.1f} {low:.1f}L{right:.1f} {high:.1f}", "front")
    axes.dots(pairs, "s0")
    return (
        f'<figure class="half">{axes.svg("Measured loss against the sum of sensitivities")}'
        "<figcaption>Every trial on validation windows. On the line, losses of layers would add "
        "up exactly.</figcaption></figure>"
    )


def _correlation(pairs: list[tuple[float, float]]) -> str:
    if len(pairs) < FEW:
        return DASH
    try:
        return f"{correlation(*zip(*pairs, strict=True)):.2f}"
    except StatisticsError:  # all predictions or all losses are equal
        return DASH


def _phases(facts: Facts) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Origin -> its trials on search windows, each with the tokens `paid` for it."""
    phases: dict[str, list[dict[str, Any]]] = {}
    before = 0
    for trial in facts.get("trials") or ():
        paid, before = trial["spent"] - before, trial["spent"]
        if trial.get("split", "search") == "search":
            phases.setdefault(trial["origin"], []).append({**trial, "paid": paid})
    yield from phases.items()
