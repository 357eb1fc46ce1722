"""How near to an optimum is what a search found? The best exchanges of two layers, measured.

    python studies/search/exchanges.py WORK --seed 0 --pairs 24 --tokens 12288

Prices at the winner of `run.py`'s `auto@300000` come from gradients on the whole search split, more
than the search could pay for. Of all pairs of changes that keep the budget the ones that promise
most, each layer at most twice, are scored beside the winner on search windows. Those that gained
are then made together, the best first, and both are scored on validation and test windows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from arena import Arena, effective, open_arena
from run import figures, rows

from autocompress.core import Allocation, Problem, Score
from autocompress.levels import Level, parse_level
from autocompress.predictions import Sensitivities
from autocompress.strategies.prices import prices_around

RESULTS = Path(__file__).with_suffix(".jsonl")
PAYLOAD = 3.0
OFTEN = 2  # pairs that a layer may be in


class Pair(NamedTuple):
    """Two changes of an allocation.

    Args:
        promised: change of the loss, nats/token.
        changes: (layer, level) of each.
    """

    promised: float
    changes: tuple[tuple[int, Level], tuple[int, Level]]

    def of(self, allocation: Allocation) -> Allocation:
        """The allocation with both changes."""
        for layer, level in self.changes:
            allocation = allocation.swap(layer, level)
        return allocation

    @property
    def layers(self) -> set[int]:
        """Which it touches."""
        return {layer for layer, _ in self.changes}


def main() -> None:
    """One winner."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--strategy", default="auto@300000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=12288)
    arguments = parser.parse_args()
    arena = open_arena(arguments.work)
    key = (arguments.strategy, PAYLOAD, arguments.seed)
    row = next(
        it
        for it in rows(arena.model, arena.dtype)
        if (it["strategy"], it["payload"], it["seed"]) == key
    )
    winner = Allocation(tuple(map(parse_level, row["levels"])))
    found = exchange(arena, winner, arguments)
    found = {"strategy": arguments.strategy, "seed": arguments.seed, "dtype": arena.dtype, **found}
    with RESULTS.open("a") as file:
        file.write(json.dumps(found) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name != "pairs"}, indent=1))


def exchange(arena: Arena, winner: Allocation, arguments: argparse.Namespace) -> dict[str, Any]:
    """Promised and measured changes of every pair, and what all good ones bring together."""
    name, budget = f"exchanges-{arguments.seed}", f"{effective(PAYLOAD)}bits"
    with arena.problem(name, budget, arguments.seed) as (problem, _):
        sensitivities = problem.sensitivities(problem.tokens // 2)
        around = problem.linearize(winner, problem.tokens, 0)
        prices = prices_around(sensitivities, winner, around).mean
        count, pairs = promising(problem, winner, prices)
        chosen = varied(pairs, arguments.pairs)
        candidates = [winner, *(pair.of(winner) for pair in chosen)]
        fidelity = problem.fidelity(arguments.tokens)
        trials = problem.evaluate(candidates, fidelity, "exchange")
        scores = {trial.allocation: trial.score for trial in trials}
        gaps = [gap(scores[pair.of(winner)], scores[winner]) for pair in chosen]
        together, taken = combined(winner, chosen, gaps)
        after = problem.evaluate([together], fidelity, "exchange")[0].loss
    return {
        "promising": count,
        "tokens": fidelity.tokens,
        "better": sum(mean < 0 for mean, _ in gaps),
        "surely_better": sum(mean < -2 * error for mean, error in gaps),
        "surely_worse": sum(mean > 2 * error for mean, error in gaps),
        "taken": taken,
        "search": [scores[winner].loss, after],
        "winner": figures(arena, winner, True),
        "together": figures(arena, together, True),
        "pairs": [
            {"promised": pair.promised, "measured": mean, "stderr": error, "changes": text(pair)}
            for pair, (mean, error) in zip(chosen, gaps, strict=True)
        ],
    }


def promising(
    problem: Problem, winner: Allocation, prices: Sensitivities
) -> tuple[int, list[Pair]]:
    """All pairs within the budget that promise a gain, the best first, and how many there are."""
    (budget,) = problem.budgets
    table = problem.table(budget.cost)
    slack = budget.limit - table.total(winner)
    moves = [
        (layer, level, row[level] - row[own], costs[level] - costs[own])
        for layer, (row, own, costs) in enumerate(
            zip(prices, winner.levels, table.entries, strict=True)
        )
        for level in row
        if level != own
    ]
    layers, gains, sizes = (np.array([move[i] for move in moves]) for i in (0, 2, 3))
    total = gains[:, None] + gains[None]
    allowed = (sizes[:, None] + sizes[None] <= slack) & (layers[:, None] < layers[None])
    first, second = np.nonzero(allowed & (total < 0))
    order = np.argsort(total[first, second])
    best = order[:200_000]
    found = [
        Pair(float(total[i, j]), (moves[i][:2], moves[j][:2]))
        for i, j in zip(first[best], second[best], strict=True)
    ]
    return len(order), found


def varied(pairs: list[Pair], count: int) -> list[Pair]:
    """The first pairs, each layer in `OFTEN` of them at most."""
    used: dict[int, int] = {}
    chosen: list[Pair] = []
    for pair in pairs:
        if len(chosen) < count and all(used.get(layer, 0) < OFTEN for layer in pair.layers):
            chosen.append(pair)
            used |= {layer: used.get(layer, 0) + 1 for layer in pair.layers}
    return chosen


def gap(one: Score, other: Score) -> tuple[float, float]:
    """Mean difference over windows and its standard error, nats/token."""
    gaps = np.subtract(one.losses, other.losses)
    return float(gaps.mean()), float(gaps.std(ddof=1) / len(gaps) ** 0.5)


def combined(
    winner: Allocation, pairs: list[Pair], gaps: list[tuple[float, float]]
) -> tuple[Allocation, int]:
    """Pairs that gained more than their error, the best first, no layer twice; and how many."""
    touched: set[int] = set()
    taken = 0
    for (mean, error), pair in sorted(zip(gaps, pairs, strict=True), key=lambda it: it[0][0]):
        if mean < -error and not touched & pair.layers:
            winner, touched, taken = pair.of(winner), touched | pair.layers, taken + 1
    return winner, taken


def text(pair: Pair) -> list[str]:
    """'12 w3g64' of each change."""
    return [f"{layer} {level}" for layer, level in pair.changes]


if __name__ == "__main__":
    main()
