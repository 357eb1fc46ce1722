"""What a report says about latency: predicted against measured, and what was left out."""

from __future__ import annotations

from autocompress.report.facts import DASH, Facts, Table, label, number, percent, rivals


def latency(result: Facts) -> str:
    """Measured latency, or the predicted one, marked so; ms per token."""
    row = result.get("latency") or {}
    if row.get("measured_ms") is not None:
        return f"{row['measured_ms']:.2f}"
    return DASH if row.get("predicted_ms") is None else f"about {row['predicted_ms']:.2f}"


def latency_table(facts: Facts) -> Table:
    """Predicted against measured latency of the finalists."""
    known = facts.get("latency") or {}
    rows = []
    for name, result in rivals(facts).items():
        row = result.get("latency") or {}
        ends = (row.get("low_ms"), row.get("high_ms"))
        rows.append(
            (
                label(name, result),
                number(row.get("predicted_ms"), 2),
                number(row.get("measured_ms"), 2),
                DASH if None in ends else f"{ends[0]:.2f} to {ends[1]:.2f}",
                DASH if row.get("error") is None else percent(row["error"], "+"),
            )
        )
    threads = (known.get("target") or {}).get("threads")
    used = f", {threads} thread{'s' if threads != 1 else ''}" if threads else ""
    return Table(
        f"Latency in ms per token: {known.get('use', 'decode')}{used}. The error is predicted "
        "over measured; the interval holds the median with 95 % confidence.",
        ("Model", "Predicted", "Measured", "Interval", "Error"),
        tuple(rows) if known else (),
    )


def dropped_table(facts: Facts) -> Table:
    """Levels that were left out because of the target."""
    rows = tuple(
        (str(entry.get("level")), f"{len(entry.get('layers') or ()):,}", str(entry.get("reason")))
        for entry in (facts.get("latency") or {}).get("dropped") or ()
    )
    return Table(
        "Levels left out at this target, and why; layers of one row have the same shape.",
        ("What", "Layers", "Reason"),
        rows,
    )
