"""How near to an optimum is what a search found? Every promising exchange of two layers, measured.

    python studies/search/exchanges.py WORK --seed 3 --tokens 2048 8192 24576

Prices at the winner of `run.py`'s `auto@300000` come from gradients on the whole search split, more
than the search could pay for. All pairs of changes that keep the budget and promise a gain are
scored beside the winner on search windows, the best fifth of them on more, and so on. Those that
gained on the most are then made together, the best first, and both are scored on validation and
test windows.
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
KEPT = 5  # one in so many pairs goes on to more windows
SHOWN = 16  # pairs of a stage in the results


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


Gaps = dict[Pair, tuple[float, float]]  # mean difference to the winner and its standard error


def main() -> None:
    """One winner."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--strategy", default="auto@300000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 24576])
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
    print(json.dumps(found, indent=1))


def exchange(arena: Arena, winner: Allocation, arguments: argparse.Namespace) -> dict[str, Any]:
    """Promised and measured changes of every pair, and what all good ones bring together."""
    name, budget = f"exchanges-{arguments.seed}", f"{effective(PAYLOAD)}bits"
    with arena.problem(name, budget, arguments.seed) as (problem, _):
        sensitivities = problem.sensitivities(problem.tokens // 2)
        around = problem.linearize(winner, problem.tokens, 0)
        pairs = promising(problem, winner, prices_around(sensitivities, winner, around).mean)
        stages = []
        for tokens in arguments.tokens:
            gaps = measured(problem, winner, pairs, tokens)
            pairs = list(gaps)[: max(1, len(gaps) // KEPT)]
            stages.append(stage(gaps, tokens))
        together, taken = combined(winner, gaps)
        both = problem.evaluate([winner, together], problem.fidelity(tokens), "exchange")
    return {
        "stages": stages,
        "taken": taken,
        "search": [trial.loss for trial in both],
        "winner": figures(arena, winner, True),
        "together": figures(arena, together, True),
    }


def measured(problem: Problem, winner: Allocation, pairs: list[Pair], tokens: int) -> Gaps:
    """Each pair's change of the loss on search windows, the best first."""
    candidates = [winner, *(pair.of(winner) for pair in pairs)]
    trials = problem.evaluate(candidates, problem.fidelity(tokens), "exchange")
    scores = {trial.allocation: trial.score for trial in trials}
    gaps = {pair: gap(scores[pair.of(winner)], scores[winner]) for pair in pairs}
    return dict(sorted(gaps.items(), key=lambda it: it[1]))


def stage(gaps: Gaps, tokens: int) -> dict[str, Any]:
    """What the windows of a stage say of its pairs."""
    return {
        "tokens": tokens,
        "pairs": len(gaps),
        "better": sum(mean < 0 for mean, _ in gaps.values()),
        "surely_better": sum(mean < -2 * error for mean, error in gaps.values()),
        "surely_worse": sum(mean > 2 * error for mean, error in gaps.values()),
        "best": [
            {"promised": pair.promised, "measured": mean, "stderr": error, "changes": text(pair)}
            for pair, (mean, error) in list(gaps.items())[:SHOWN]
        ],
    }


def promising(problem: Problem, winner: Allocation, prices: Sensitivities) -> list[Pair]:
    """All pairs within the budget that promise a gain, the best first."""
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
    return [
        Pair(float(total[i, j]), (moves[i][:2], moves[j][:2]))
        for i, j in zip(first[order], second[order], strict=True)
    ]


def gap(one: Score, other: Score) -> tuple[float, float]:
    """Mean difference over windows and its standard error, nats/token."""
    gaps = np.subtract(one.losses, other.losses)
    return float(gaps.mean()), float(gaps.std(ddof=1) / len(gaps) ** 0.5)


def combined(winner: Allocation, gaps: Gaps) -> tuple[Allocation, int]:
    """Pairs that gained more than their error, the best first, no layer twice; and how many."""
    touched: set[int] = set()
    taken = 0
    for pair, (mean, error) in gaps.items():
        if mean < -error and not touched & pair.layers:
            winner, touched, taken = pair.of(winner), touched | pair.layers, taken + 1
    return winner, taken


def text(pair: Pair) -> list[str]:
    """'12 w3g64' of each change."""
    return [f"{layer} {level}" for layer, level in pair.changes]


if __name__ == "__main__":
    main()
