"""Write REPORT.md's table and loss.png from results.jsonl; needs matplotlib.

python studies/search/report.py
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from run import rows

HERE = Path(__file__).parent
MARK = "<!-- table -->"
COLUMNS = 3  # of the plot


def main() -> None:
    """Table between the marks of REPORT.md, plot beside it."""
    found = rows()
    _, before, _, after = f"{MARK}{(HERE / 'REPORT.md').read_text()}".split(MARK)
    (HERE / "REPORT.md").write_text(f"{before}{MARK}\n{table(found)}\n{MARK}{after}")
    plot(found)


def table(found: list[dict[str, Any]]) -> str:
    """Median over seeds of the KL on test windows, against the run's own start and uniform."""
    lines = [
        "| Model | Format | Payload | Strategy | Seeds | Tokens | Uniform | Start | Winner (range) "
        "| below uniform | below start | worse than start / uniform | own work | on |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    key = lambda row: (row["model"], row["dtype"], row["payload"], row["strategy"])  # noqa: E731
    for (model, dtype, payload, name), group in itertools.groupby(sorted(found, key=key), key):
        runs = list(group)
        split = "test" if all("test" in run["winner"] for run in runs) else "validate"
        kl = {
            role: [run[role][split]["kl"] for run in runs]
            for role in ("uniform", "start", "winner")
        }
        pairs = list(zip(kl["winner"], kl["start"], kl["uniform"], strict=True))
        worse = sum(a > b for a, b, _ in pairs), sum(a > c for a, _, c in pairs)
        timed = [run for run in runs if run["seconds"]]  # in one process
        own = [run["seconds"] - run["model_seconds"] for run in timed]
        lines.append(
            f"| {model} | {dtype} | {payload} | {name} | {len(runs)} "
            f"| {median(run['tokens'] for run in runs):,.0f} "
            f"| {median(kl['uniform']):.4f} | {median(kl['start']):.4f} "
            f"| {median(kl['winner']):.4f} ({min(kl['winner']):.4f} to {max(kl['winner']):.4f}) "
            f"| {median(1 - a / c for a, _, c in pairs):.1%} "
            f"| {median(1 - a / b for a, b, _ in pairs):.1%} | {worse[0]} / {worse[1]} "
            f"| {f'{median(own):.1f} s' if own else '–'} | {split} |"
        )
    return "\n".join(lines)


def plot(found: list[dict[str, Any]]) -> None:
    """Validation loss over tokens: medians of seeds, bands from the best to the worst."""
    shown = sorted({(row["model"], row["dtype"], row["payload"]) for row in found})
    lines = -(-len(shown) // COLUMNS)
    size = (5.5 * COLUMNS, 4.2 * lines)
    figure, axes = plt.subplots(lines, COLUMNS, figsize=size, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, (model, dtype, payload) in zip(axes.flat, shown, strict=False):
        curves = defaultdict(list)
        for row in found:
            if (row["model"], row["dtype"], row["payload"]) == (model, dtype, payload):
                curves[row["strategy"]].append(row)
                axis.axhline(row["uniform"]["validate"]["kl"], color="0.8", zorder=0)
        for name, runs in sorted(curves.items()):
            draw(axis, name, [[(p["spent"], p["validate"]) for p in run["path"]] for run in runs])
        axis.set(xscale="log", xlabel="search tokens")
        axis.set_title(f"{model}, {dtype}, {payload} bits of payload", fontsize=10)
        axis.set_ylabel("KL, validation windows (grey: uniform)")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "loss.png", dpi=110)


def draw(axis: Any, name: str, curves: list[list[tuple[int, float]]]) -> None:
    """One strategy: at every token count, the last incumbent of each seed that has one by then."""
    marks = sorted({spent for curve in curves for spent, _ in curve})
    marks = [spent for spent in marks if all(curve[0][0] <= spent for curve in curves)]
    values = [[[v for s, v in curve if s <= spent][-1] for curve in curves] for spent in marks]
    middle = list(map(median, values))
    (line,) = axis.step(marks, middle, where="post", label=name, marker=".")
    low, high = [min(row) for row in values], [max(row) for row in values]
    axis.fill_between(marks, low, high, step="post", alpha=0.2, color=line.get_color())


if __name__ == "__main__":
    main()
