"""Loss over tokens of strategies, on the same database, windows and tokens.

    python studies/search/run.py WORK --strategies auto@30000 evopress@30000 --seeds 0 1 2
    python studies/search/run.py WORK --score ALLOCATION.txt   # EvoPress's text format, too

What is finished is not run again: rows are appended to results.jsonl here. `auto@30000` is `auto`
with 30,000 tokens; `contenders.py` says what others do with theirs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from arena import Arena, effective, open_arena, read_allocation
from contenders import contender

from autocompress.core import Allocation, Problem, Score, Trial
from autocompress.strategies.racing import ranked
from autocompress.strategies.uniform import nearest_uniform

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--strategies", nargs="+", default=["auto@300000", "auto@30000"])
    parser.add_argument("--payloads", nargs="+", type=float, default=[3.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--model", help="a folder or GGUF file; default SmolLM2. Its own WORK")
    parser.add_argument("--score", type=Path, help="an allocation to score on all splits")
    parser.add_argument("--no-test", action="store_true", help="leave test windows alone")
    arguments = parser.parse_args()
    arena = open_arena(arguments.work, model=arguments.model)
    model, dtype = arena.model, arena.dtype
    if arguments.score:
        print(json.dumps(figures(arena, read_allocation(arguments.score, arena), True), indent=1))
        return
    done = {(row["strategy"], row["payload"], row["seed"]) for row in rows(model, dtype)}
    for key in itertools.product(arguments.seeds, arguments.payloads, arguments.strategies):
        seed, payload, name = key
        if (name, payload, seed) not in done:
            row = one_run(arena, name, payload, seed, not arguments.no_test)
            with RESULTS.open("a") as file:
                file.write(json.dumps({"model": model, "dtype": dtype, **row}) + "\n")


def rows(model: str | None = None, dtype: str | None = None) -> list[dict[str, Any]]:
    """All finished runs, or those of one model, or of one number format of its forward passes."""
    found = list(map(json.loads, RESULTS.read_text().splitlines())) if RESULTS.exists() else []
    return [row for row in found if model in (None, row["model"]) and dtype in (None, row["dtype"])]


def one_run(arena: Arena, name: str, payload: float, seed: int, test: bool) -> dict[str, Any]:
    """Incumbents over tokens, and the figures of first and last on data no search saw."""
    start, path = time.perf_counter(), []
    budget = f"{effective(payload)}bits"
    with arena.problem(f"{name}-{payload}-{seed}", budget, seed) as (problem, study):
        resumed = bool(study.trials)  # what an earlier process did took no time in this one
        problem, clock = clocked(problem)
        for trial in contender(name, problem)(problem, np.random.default_rng(seed)):
            path.append((problem.spent(), trial))
            print(
                f"{name} {payload} {seed}: {problem.spent():,} tokens, {trial.origin}", flush=True
            )
        uniform, spent = nearest_uniform(problem), problem.spent()
        seconds = time.perf_counter() - start
    finals = {"uniform": uniform, "start": path[0][1].allocation, "found": path[-1][1].allocation}
    validated = {
        role: replace(path[-1][1], score=arena.score(allocation, "validate"))
        for role, allocation in finals.items()
    }
    finals["winner"] = finals[ranked(validated, {"uniform", "start"})[0]]  # as a search chooses
    return {
        "strategy": name,
        "payload": payload,
        "seed": seed,
        "tokens": spent,
        "seconds": None if resumed else round(seconds, 1),
        "model_seconds": None if resumed else round(clock["model"], 1),
        "path": [
            {**step(spent, trial), "validate": arena.score(trial.allocation, "validate").loss}
            for spent, trial in milestones(path)
        ],
        **{role: figures(arena, it, test and role != "found") for role, it in finals.items()},
        "levels": list(map(str, finals["winner"].levels)),
    }


def milestones(path: Sequence[tuple[int, Trial]]) -> list[tuple[int, Trial]]:
    """The points of a curve to score: the first of each phase, every doubling, the last."""
    chosen = [path[0]]
    for spent, trial in path[1:]:
        if trial.origin != chosen[-1][1].origin or spent >= 2 * chosen[-1][0]:
            chosen.append((spent, trial))
    return chosen if path[-1][1].allocation == chosen[-1][1].allocation else [*chosen, path[-1]]


def step(spent: int, trial: Trial) -> dict[str, Any]:
    """A point of the curve."""
    return {
        "spent": spent,
        "origin": trial.origin,
        "loss": trial.loss,
        "on": trial.fidelity.tokens,
        "seed": trial.fidelity.seed,
        "allocation": trial.allocation.key,
    }


def figures(arena: Arena, allocation: Allocation, test: bool) -> dict[str, Any]:
    """KL on validation and, where wanted, test windows."""
    splits = ("validate", "test") if test else ("validate",)
    return {split: brief(arena.score(allocation, split)) for split in splits}


def brief(score: Score) -> dict[str, float]:
    """Mean, standard error over windows, perplexity."""
    return {"kl": score.loss, "stderr": score.stderr, "perplexity": score.perplexity}


def clocked(problem: Problem) -> tuple[Problem, Counter[str]]:
    """The same problem, and the seconds that its models take: all but the strategy's own work."""
    spent: Counter[str] = Counter()

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                spent["model"] += time.perf_counter() - start  # type: ignore[assignment]

        return timing

    calls = ("evaluate", "sensitivities", "linearize")
    return replace(problem, **{name: timed(getattr(problem, name)) for name in calls}), spent


if __name__ == "__main__":
    main()
