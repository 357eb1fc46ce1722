"""The report's headline: what a search achieved, in two honest sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import hypot

from autocompress.report.facts import Facts, bits, label, loss, percent, rivals, size


def title(facts: Facts) -> str:
    """'SmolLM2-135M-Instruct at 3.50 bits per weight'."""
    name = (facts.get("model") or {}).get("name") or "A model"
    reached = facts.get("effective_bits")
    return name if reached is None else f"{name} at {reached:.2f} bits per weight"


def verdict(facts: Facts) -> str:
    """What was achieved on test windows; losing to uniform or to the ILP is said first."""
    found = rivals(facts)
    winner = found.get("winner")
    if not winner or _test_loss(winner) is None:
        return "The winner was not scored on test windows: nothing can be said about its quality."
    kl = f"its KL to the dense model is {loss(winner['test'])} nats per token on test windows"
    origin = str(winner.get("origin") or "")
    if facts.get("goal"):
        return _smallest(facts, found)
    if winner.get("level") or origin.startswith("uniform"):
        name = f"uniform {winner.get('level') or origin.removeprefix('uniform').strip()}".strip()
        return f"No searched allocation beat {name}, which therefore won: {kl}."
    if origin.startswith("mix "):
        return f"No searched allocation beat {label('mix', winner)}, which therefore won: {kl}."
    if origin == "ends":
        return f"No searched allocation beat more bits for the first and last blocks: {kl}."
    uniform = found.get("uniform")
    names = {"uniform": f"uniform {(uniform or {}).get('level') or ''}".strip()}
    if "mix" in found:
        names["mix"] = label("mix", found["mix"])
    if not origin.startswith("ilp"):
        names["ilp"] = "the ILP"
    comparisons = [
        _comparison(winner, found[rival], name)
        for rival, name in names.items()
        if rival in found and _test_loss(found[rival])
    ]
    against = f", {' and '.join(comparisons)}" if comparisons else ""
    return f"{_lead(winner, uniform, origin)}{kl}{against}.{_caveat(winner, uniform)}"


def _smallest(facts: Facts, found: Mapping[str, Facts]) -> str:
    """What was made small under a limit on the loss, beside what else keeps it."""
    goal, winner = facts["goal"], found["winner"]
    measure, unit = _measure(goal["minimized"])
    ours = measure(winner) or 0.0
    against = []
    for rival, name in (("uniform", "the smallest uniform"), ("ilp", "the smallest by the ILP")):
        row = found.get(rival) or {}
        theirs, loss_there = measure(row), (row.get("validate") or {}).get("kl")
        if rival == "uniform" and row.get("level"):
            name = f"{name}, {row['level']}"
        if theirs is None or loss_there is None:
            continue
        if loss_there > goal["limit"]:
            against.append(
                f"no uniform level keeps it ({row.get('level') or 'mixed'} loses {loss_there:.4f})"
            )
        else:
            against.append(f"{percent(1 - ours / theirs)} less than {name} ({unit(theirs)})")
    return (
        f"The smallest found that keeps {goal['text']} on validation windows (it loses "
        f"{goal['reached']:.4f}) takes {unit(ours)}: {'; '.join(against)}. On test windows its KL "
        f"to the dense model is {loss(winner['test'])} nats per token."
    )


def _measure(minimized: str) -> tuple[Callable[[Facts], float | None], Callable[[float], str]]:
    """How a result's size or time is read, and how it is written."""
    if minimized == "latency":
        return (
            lambda row: (row.get("latency") or {}).get("predicted_ms"),
            lambda value: f"{value:.3f}\N{NO-BREAK SPACE}ms per token, predicted",
        )
    return lambda row: row.get("total_bytes"), size


def _test_loss(result: Facts) -> float | None:
    return (result.get("test") or {}).get("kl")


def _lead(winner: Facts, uniform: Facts | None, origin: str) -> str:
    if uniform and (_test_loss(uniform) or float("inf")) < winner["test"]["kl"]:
        return "The search lost to uniform on text that it never saw: "
    if origin.startswith("ilp"):
        return "The integer programme won, the search found nothing better: "
    return "The searched allocation won: "


def _comparison(winner: Facts, rival: Facts, name: str) -> str:
    """'21 % below uniform w3g64 (0.3010 at 3.30 bits)'."""
    ours, theirs = winner["test"], rival["test"]
    change = ours["kl"] / theirs["kl"] - 1
    side = "below" if change < 0 else "above"
    at = rival.get("effective_bits")
    where = f"{theirs['kl']:.4f}" + (f" at {at:.2f} bits" if at is not None else "")
    noise = hypot(ours.get("kl_stderr") or 0, theirs.get("kl_stderr") or 0)
    doubt = ", within the standard error" if abs(ours["kl"] - theirs["kl"]) < noise else ""
    return f"{abs(change) * 100:.0f}\N{NO-BREAK SPACE}% {side} {name} ({where}{doubt})"


def _caveat(winner: Facts, uniform: Facts | None) -> str:
    """Says so when the uniform rival is smaller, because part of the gain is then the budget's."""
    mine, theirs = winner.get("effective_bits"), (uniform or {}).get("effective_bits")
    if mine is None or theirs is None or mine - theirs < 0.05:
        return ""
    return (
        f" No uniform level comes closer to the budget: it stores {bits(theirs)} bits per weight, "
        f"the winner {bits(mine)}, so part of the difference is size."
    )
