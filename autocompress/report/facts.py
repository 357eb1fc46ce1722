"""What a report says: the facts of a search as sentences, tables and a grid, in plain text.

`facts` is the JSON of `autocompress.json`. Every part may be missing: a report of what exists is
better than none, so a missing number is shown as a dash.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Facts = Mapping[str, Any]

DASH = "–"
SPLITS = ("search", "validate", "test")
RIVALS = {
    "dense": "Dense",
    "uniform": "Uniform",
    "mix": "llama.cpp's mix",
    "ends": "First and last blocks high",
    "ilp": "ILP",
    "winner": "Winner",
}


@dataclass(frozen=True)
class Table:
    """Rows of plain text, rendered alike by both writers.

    Args:
        caption: what the table shows, with units.
        columns: headings; the first column names the row.
        rows: one text per column.
        strong: index of the row that matters most.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: int | None = None


@dataclass(frozen=True)
class Grid:
    """Layers by block and by type.

    Args:
        kinds: columns, the part of the layer name after the block index.
        blocks: rows, block index -> kind -> entry of `facts["allocation"]`.
        others: layers outside the blocks (embedding, head).
    """

    kinds: tuple[str, ...]
    blocks: Mapping[int, Mapping[str, Facts]]
    others: tuple[Facts, ...]


def percent(share: float, sign: str = "") -> str:
    """'21.3 %'; `sign='+'` also marks increases."""
    return f"{share:{sign}.1%}".replace("%", "\N{NO-BREAK SPACE}%").replace("-", "−")


def number(value: float | None, decimals: int) -> str:
    """A number with fixed decimals, or a dash."""
    return DASH if value is None else f"{value:,.{decimals}f}"


def bits(value: float | None) -> str:
    """Effective bits: two decimals, more only where two would round onto the limit."""
    if value is None:
        return DASH
    return f"{value:.4f}" if f"{value:.4f}"[-2:] != "00" else f"{value:.2f}"


def size(count: float | None) -> str:
    """Bytes in decimal megabytes; kilobytes below one."""
    if count is None:
        return DASH
    amount, unit = (count / 1e6, "MB") if count >= 1e6 else (count / 1e3, "kB")
    return f"{amount:,.1f}\N{NO-BREAK SPACE}{unit}"


def duration(seconds: float) -> str:
    """'8 min 18 s'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def loss(score: Facts | None) -> str:
    """KL with its standard error."""
    if not score or score.get("kl") is None:
        return DASH
    if score["kl"] == 0:
        return "0"
    error = score.get("kl_stderr")
    return f"{score['kl']:.4f}" + (f" ±\N{NO-BREAK SPACE}{error:.4f}" if error is not None else "")


def rivals(facts: Facts) -> dict[str, Facts]:
    """Dense, the baselines and the winner, in this order, those that were scored."""
    results = facts.get("results") or {}
    return {name: results[name] for name in RIVALS if results.get(name)}


def label(name: str, result: Facts) -> str:
    """'Uniform w3g64', 'llama.cpp's mix Q3_K_M'."""
    level = result.get("level")
    if name == "mix":
        return f"{RIVALS[name]} {str(result.get('origin') or '').removeprefix('mix ')}".strip()
    return RIVALS[name] if not level or name == "dense" else f"{RIVALS[name]} {level}"


def results_table(facts: Facts) -> Table:
    """Dense, uniform, ILP and winner on test windows."""
    found = {name: row for name, row in rivals(facts).items() if name != "ends"}
    rows = tuple(
        (
            label(name, result),
            bits(result.get("effective_bits")),
            size(result.get("total_bytes")),
            loss(result.get("test")),
            number((result.get("test") or {}).get("perplexity"), 2),
        )
        for name, result in found.items()
    )
    return Table(
        f"Test windows{_tokens_of(found, 'test')}. KL in nats per token, ± standard error; "
        "bits count everything stored per weight in scope; size is the whole model.",
        ("Model", "Effective bits", "Size", "KL to dense", "Perplexity"),
        rows,
        strong=list(found).index("winner") if "winner" in found else None,
    )


def _tokens_of(found: Mapping[str, Facts], split: str) -> str:
    scores = (result.get(split) or {} for result in found.values())
    counts = {score["tokens"] for score in scores if score.get("tokens")}
    return f" ({', '.join(f'{count:,}' for count in sorted(counts))} tokens)" if counts else ""


def gap_table(facts: Facts) -> Table:
    """The loss on every split: how much of what search found carries over."""
    rows = []
    for name, result in rivals(facts).items():
        if name != "dense":
            search, validate, test = ((result.get(split) or {}).get("kl") for split in SPLITS)
            gap = percent(test / search - 1, "+") if search and test else DASH
            losses = (number(kl, 4) for kl in (search, validate, test))
            rows.append((label(name, result), *losses, gap))
    return Table(
        "KL by split. The gap is test over search: a winner whose gap exceeds the baselines' has "
        "adapted to its search data.",
        ("Model", "Search", "Validate", "Test", "Gap"),
        tuple(rows),
    )


def levels_table(facts: Facts) -> Table:
    """How often each level was chosen."""
    layers, weights, stored = Counter[str](), Counter[str](), Counter[str]()
    for entry in facts.get("allocation") or ():
        layers[entry["level"]] += 1
        weights[entry["level"]] += entry["weights"]
        stored[entry["level"]] += entry["bits"]
    total = weights.total() or 1
    means = {level: stored[level] / max(weights[level], 1) for level in layers}
    rows = tuple(
        (level, f"{layers[level]:,}", percent(weights[level] / total), number(means[level], 2))
        for level in sorted(means, key=lambda level: (means[level], level))
    )
    return Table(
        "Chosen levels; weights are shares of the dense parameters in scope.",
        ("Level", "Layers", "Weights", "Effective bits"),
        rows,
    )


def cost_table(facts: Facts) -> Table:
    """What the search spent, in tokens and time."""
    tokens, seconds = dict(facts.get("tokens") or {}), dict(facts.get("seconds") or {})
    # Calibration's tokens are the database's; the sum belongs in the last row.
    pairs = [("Level database", tokens.pop("calibrate", None), seconds.pop("database", None))]
    total_tokens, total_seconds = (
        tokens.pop("total", None),
        sum((facts.get("seconds") or {}).values()),
    )
    known = ("teacher", "sensitivities", "linearization", "search", "verify")
    for key in dict.fromkeys((*known, *tokens, *seconds)):
        pairs.append((key.capitalize(), tokens.get(key), seconds.get(key)))
    pairs.append(("Total", total_tokens, total_seconds or None))
    rows = tuple(
        (name, number(count, 0), DASH if spent is None else duration(spent))
        for name, count, spent in pairs
        if (count, spent) != (None, None)
    )
    recording, held = facts.get("recording"), facts.get("peak_bytes")
    if recording is not None:
        rows += (("Recording, in the times above", DASH, duration(recording)),)
    if held is not None:
        rows += (("Most memory held", DASH, size(held)),)
    return Table(
        "Tokens through the model, those of gradients three times, and wall time.",
        ("Step", "Tokens", "Time"),
        rows,
    )


def setting_table(facts: Facts) -> Table:
    """Everything that a second run needs to give the same numbers."""
    model, machine, space = (facts.get(key) or {} for key in ("model", "machine", "space"))
    parameters, layers = model.get("parameters"), space.get("layers")
    levels = ", ".join(map(str, space.get("levels") or ()))
    rows = [
        ("Model", _joined(model.get("name"), parameters and f"{parameters:,} parameters")),
        ("Fingerprint", _joined(model.get("fingerprint"))),
        ("Search space", _joined(space.get("name"), layers and f"{layers} layers", levels)),
        ("Limit on the loss", _goal(facts.get("goal") or {})),
        *(("Budget", _budget(budget)) for budget in facts.get("budgets") or ()),
        ("File size", _joined(facts.get("file_bytes") and size(facts["file_bytes"]))),
        ("Dense size", _joined(facts.get("dense_bytes") and size(facts["dense_bytes"]))),
        ("Bits of the whole model", _joined(facts.get("model_bits") and bits(facts["model_bits"]))),
        ("Seed", _joined(facts.get("seed"))),
        ("Machine", _machine(machine)),
        ("Versions", _joined(*(f"{k} {v}" for k, v in (facts.get("versions") or {}).items()))),
    ]
    return Table(
        "Settings and environment of this run.",
        ("What", "Value"),
        tuple(row for row in rows if row[1]),
    )


def _joined(*parts: object) -> str:
    return ", ".join(str(part) for part in parts if part not in (None, ""))


def _budget(budget: Facts) -> str:
    limit, reached, cost = (budget.get(key) for key in ("limit", "reached", "cost"))
    unit, digits = {
        "latency": ("ms predicted", 2),
        "parameters": ("parameters of the layers in scope, the same share of their FLOPs", 0),
    }.get(str(cost), (cost or "", 0))
    return (
        f"{budget.get('text', DASH)}: {number(reached, digits)} of at most "
        f"{number(limit, digits)} {unit}".strip()
    )


def _goal(goal: Facts) -> str:
    if not goal:
        return ""
    return (
        f"{goal['text']}: {number(goal.get('reached'), 4)} of at most {number(goal['limit'], 4)} "
        f"nats per token on validation windows, with the least {goal['minimized']} found"
    )


def _machine(machine: Facts) -> str:
    units = {"cores": "{} cores", "threads": "{} threads", "memory_gib": "{:.0f} GiB"}
    measures = (unit.format(machine[key]) for key, unit in units.items() if machine.get(key))
    return _joined(machine.get("cpu"), *measures, machine.get("dtype"))


def layer_grid(entries: Sequence[Facts]) -> Grid:
    """Layers by block (first integer of the dotted name) and type (what follows it)."""
    blocks: dict[int, dict[str, Facts]] = {}
    others = []
    for entry in entries:
        match = re.match(r"(?:.*?\.)??(\d+)\.(.+)", entry["layer"])
        if match is None:
            others.append(entry)
        else:
            # Tied modules repeat the prefix after each '+'; without it, kinds match across blocks.
            prefix = entry["layer"][: match.start(2)]
            blocks.setdefault(int(match[1]), {})[match[2].replace(prefix, "")] = entry
    kinds = tuple(dict.fromkeys(kind for row in blocks.values() for kind in row))
    return Grid(kinds, dict(sorted(blocks.items())), tuple(others))


def layer_bits(entry: Facts) -> float:
    """Effective bits of one layer."""
    return float(entry["bits"]) / max(int(entry["weights"]), 1)
