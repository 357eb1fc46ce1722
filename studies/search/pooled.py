"""What five searches know together: one answer to the mean of the prices that each ended with.

    python studies/search/pooled.py WORK --seeds 0 1 2 3 4

Every `auto@300000` of `run.py` refined its prices on gradients of its own windows and labels, which
WORK keeps: their descent is walked again at no cost. If the answer to all of them is hardly better
than that of each, more tokens of the same kind buy nothing.
"""

from __future__ import annotations

import argparse
import json
from functools import reduce
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from arena import Arena, effective, open_arena
from run import figures, rows

from autocompress.effort import plan
from autocompress.predictions import Estimate
from autocompress.strategies.ilp import solve
from autocompress.strategies.prices import mix
from autocompress.strategies.refinement import Refinement

STRATEGY, TOKENS, PAYLOAD = "auto@300000", 300_000, 3.0


def main() -> None:
    """Print what is found, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    arena = open_arena(arguments.work)
    runs = [
        row
        for row in rows(arena.model, arena.dtype)
        if (row["strategy"], row["payload"]) == (STRATEGY, PAYLOAD)
        and row["seed"] in arguments.seeds
    ]
    facts = {"apart": apart([row["levels"] for row in runs]), **pooled(arena, arguments.seeds)}
    print(json.dumps(facts, indent=1))


def apart(answers: list[list[str]]) -> float:
    """Layers in which two answers differ, median of all pairs."""
    return median(
        sum(a != b for a, b in zip(one, other, strict=True))
        for one, other in combinations(answers, 2)
    )


def pooled(arena: Arena, seeds: list[int]) -> dict[str, Any]:
    """The answer to all prices together, scored."""
    found: list[Estimate] = []
    for seed in seeds:
        name = f"{STRATEGY}-{PAYLOAD}-{seed}"
        with arena.problem(name, f"{effective(PAYLOAD)}bits", seed) as (problem, _):
            spending = plan(TOKENS, problem.window, problem.tokens)
            descent = Refinement(
                steps=spending.steps,
                sensitivity_tokens=spending.sensitivities,
                batch=spending.batch,
            )
            prices = problem.sensitivities(spending.sensitivities).mean
            start = solve(problem.space, problem.costs, problem.budgets, prices)
            found.append(descent.descend(problem, start)[0])
            every = mean(found)
            answer = solve(problem.space, problem.costs, problem.budgets, every.mean)
    return {"search": arena.score(answer, "search").loss, **figures(arena, answer, True)}


def mean(prices: list[Estimate]) -> Estimate:
    """All with equal weight."""
    return reduce(lambda a, b: mix(a, b[1], 1 / (b[0] + 1)), enumerate(prices[1:], 1), prices[0])


if __name__ == "__main__":
    main()
