"""Write the tables of REPORT.md from results.jsonl: `python studies/joint/report.py`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).parent
MARK = "<!-- table -->"
HEAD = (
    "| Part | Limit | Strategy | Seeds | Tokens | Test KL (range) | to baseline | Levels |",
    "|---|---|---|---|---|---|---|---|",
)
BASELINES = {
    "sparsity": ("sparsity", "uniform"),
    "joint": ("quantized", "auto"),
    "joint-ms": ("quantized-ms", "auto"),
}


def main() -> None:
    """Replace what stands between the marks."""
    lines = (HERE / "results.jsonl").read_text().splitlines()
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in map(json.loads, lines):
        groups.setdefault((row["part"], row["limit"], row["strategy"]), []).append(row)
    table = "\n".join([*HEAD, *(line(key, rows, groups) for key, rows in sorted(groups.items()))])
    report = HERE / "REPORT.md"
    before, _, after = report.read_text().split(MARK)
    report.write_text(f"{before}{MARK}\n{table}\n{MARK}{after}")


def line(key: tuple[str, float, str], rows: list[dict[str, Any]], groups: Any) -> str:
    """One strategy at one limit, over its seeds."""
    part, limit, strategy = key
    losses = [row["test"]["kl"] for row in rows]
    rival, name = BASELINES.get(part, ("", ""))
    others = [row["test"]["kl"] for row in groups.get((rival, limit, name), ())]
    change = f"{100 * (fmean(losses) / fmean(others) - 1):+.1f} %" if others else "–"
    counts: dict[str, int] = {}
    for row in rows:
        for level, count in row["counts"].items():
            counts[level] = counts.get(level, 0) + count
    chosen = ", ".join(f"{level} {count / len(rows):.0f}" for level, count in counts.items())
    spread = f"{fmean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
    tokens = f"{fmean(row['tokens'] for row in rows):,.0f}"
    cells = (part, f"{limit:g}", strategy, str(len(rows)), tokens, spread, change, chosen)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
