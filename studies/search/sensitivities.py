"""Ways to estimate sensitivities: what each costs, and how good the ILP's answer to it is.

    python studies/search/sensitivities.py WORK --windows 8 16 --seeds 0 1 2

WORK is the folder of run.py, whose level database is used. Rows are printed as they come and
appended to sensitivities.jsonl here; what is there is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from arena import Arena, effective, open_arena

from autocompress.core import Allocation, Fidelity
from autocompress.predictions import Estimate
from autocompress.sensitivity import METHODS, fisher_sensitivities
from autocompress.strategies.ilp import solve
from autocompress.strategies.uniform import nearest_uniform

RESULTS = Path(__file__).with_suffix(".jsonl")
PAYLOAD = 3.0  # bits


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--windows", nargs="+", type=int, default=[8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    arguments = parser.parse_args()
    arena = open_arena(arguments.work)
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    done = {tuple(json.loads(line)[key] for key in ("method", "windows", "seed")) for line in lines}
    for count, seed, method in itertools.product(
        arguments.windows, arguments.seeds, arguments.methods
    ):
        if (method, count, seed) not in done:
            row = one_row(arena, method, count, seed)
            print(json.dumps(row), flush=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")


def one_row(arena: Arena, method: str, count: int, seed: int) -> dict[str, Any]:
    """Estimate, solve, and score the answer on validation windows."""
    session = arena.session
    windows = session.windows.subset(Fidelity(count * session.config.window, seed))
    start = time.process_time()
    found = fisher_sensitivities(arena.evaluator.stitched, windows, seed, method)
    seconds = time.process_time() - start
    with arena.problem(f"sensitivities-{seed}", f"{effective(PAYLOAD)}bits", seed) as (problem, _):
        answer = solve(problem.space, problem.costs, problem.budgets, found.mean)
        uniform = nearest_uniform(problem)
    return {
        "method": method,
        "windows": count,
        "seed": seed,
        "cpu_seconds": round(seconds, 1),
        "predicted": total(found, answer),
        "predicted_uniform": total(found, uniform),
        "relative_stderr": round(float(np.median(relative_errors(found))), 4),
        "validate": arena.score(answer, "validate").loss,
        "validate_uniform": arena.score(uniform, "validate").loss,
        "levels": list(map(str, answer.levels)),
    }


def total(found: Estimate, allocation: Allocation) -> float:
    """Sum of sensitivities, nats/token."""
    return sum(row[level] for row, level in zip(found.mean, allocation.levels, strict=True))


def relative_errors(found: Estimate) -> list[float]:
    """Standard error over mean, of every level of every layer that loses anything."""
    return [
        errors[level] / mean
        for means, errors in zip(found.mean, found.stderr, strict=True)
        for level, mean in means.items()
        if mean > 0
    ]


if __name__ == "__main__":
    main()
