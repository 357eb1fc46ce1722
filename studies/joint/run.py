"""Searched sparsity against published rules, and joint levels against quantization alone.

    python studies/joint/run.py WORK sparsity --limits 70 60 50 --seeds 0 1 2
    python studies/joint/run.py WORK joint --limits 2.5 3.0 3.5 --seeds 0

What is finished is not run again: rows are appended to results.jsonl here. Every run has a study of
its own; databases are in WORK. A limit is the share of weights that are dropped in percent, or
effective bits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "search"))

from arena import Arena, open_arena  # noqa: E402  (a script's neighbour)

from autocompress.core import Allocation, Problem, Strategy  # noqa: E402
from autocompress.documents import SplitTokens  # noqa: E402
from autocompress.effort import plan  # noqa: E402
from autocompress.outlier_scores import outlier_shares  # noqa: E402
from autocompress.strategies.auto import Auto  # noqa: E402
from autocompress.strategies.evopress import EvoPress, RoundedUp  # noqa: E402
from autocompress.strategies.ratios import (  # noqa: E402
    Arithmetic,
    OutlierWeighed,
    RandomRatios,
)
from autocompress.strategies.uniform import nearest_uniform  # noqa: E402

RESULTS = HERE / "results.jsonl"
TOKENS = 30_000  # of every search
SCORED = 1024  # tokens that a rule's answer is looked at on; it decides nothing
ROOM = 1.0005  # of the budget that `evopress-even` may use
OUTLIER_TOKENS = 4096  # of the calibrate split
SEEDED = ("auto", "evopress", "evopress-even", "random-ratios")  # the others give one answer

Make = Callable[[Arena, Problem], Strategy]


def auto(arena: Arena, problem: Problem) -> Strategy:
    """The default search."""
    return Auto(plan(TOKENS, problem.window, problem.tokens))


def evopress(arena: Arena, problem: Problem) -> Strategy:
    """EvoPress with its stages scaled down: its own take 1.2 million tokens a generation."""
    return EvoPress(
        start=RoundedUp(tokens=SCORED),
        generations=None,
        offspring=8,
        stages=((2, 512), (1, 1024)),
        tokens=TOKENS,
    )


def evopress_even(arena: Arena, problem: Problem) -> Strategy:
    """The same on even steps, s40 to s90, and `ROOM` over the budget, so that exchanges fit.

    Counts of kept weights are rounded, which alone puts an exchange of equal steps over the limit.
    """
    even = tuple(
        tuple(level for level in allowed if str(level).endswith("0"))
        for allowed in problem.space.levels
    )
    space = replace(problem.space, levels=even)
    budgets = tuple(replace(it, limit=ROOM * it.limit) for it in problem.budgets)
    other = replace(problem, space=space, budgets=budgets)
    return lambda _, rng: evopress(arena, other)(other, rng)


def owl(arena: Arena, problem: Problem) -> Strategy:
    """OWL with the settings of the paper for LLaMA: multiple 5, lambda 0.08."""
    windows = arena.session.windows.calibrate[: OUTLIER_TOKENS // problem.window]
    model = arena.evaluator.stitched.restore()
    return OutlierWeighed(outlier_shares(model, problem.space, windows), tokens=SCORED)


SPARSITY: dict[str, Make] = {
    "auto": auto,
    "owl": owl,
    "arithmetic": lambda arena, problem: Arithmetic(tokens=SCORED),
    "random-ratios": lambda arena, problem: RandomRatios(candidates=8, tokens=SCORED),
    "evopress": evopress,
    "evopress-even": evopress_even,
}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("part", choices=["sparsity", "joint"])
    parser.add_argument("--limits", nargs="+", type=float, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--strategies", nargs="+", default=list(SPARSITY))
    arguments = parser.parse_args()
    part = sparsity if arguments.part == "sparsity" else joint
    for row in part(arguments):
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row["part"], row["limit"], row["strategy"], row["seed"], row["test"], flush=True)


def sparsity(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every strategy at every share of dropped weights."""
    arena = open_arena(
        arguments.work,
        space=str(HERE / "sparsity.toml"),
        run=arguments.work / "sparsity.run",
        prefix="s50",
        tokens=SplitTokens(calibrate=16384, search=12288, validate=4096, test=8192),
        budgets=("100%",),  # adds the table of parameters
    )
    for seed, limit, name in itertools.product(
        arguments.seeds, arguments.limits, ("uniform", *arguments.strategies)
    ):
        yield from run(arena, "sparsity", limit, name, seed, f"{100 - limit:g}%")


def joint(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The default search over quantized and over joint levels, on one database."""
    for name in ("joint", "quantized"):  # the larger space first: it builds for both
        arena = open_arena(arguments.work, space=str(HERE / f"{name}.toml"))
        for seed, limit in itertools.product(arguments.seeds, arguments.limits):
            yield from run(arena, name, limit, "auto", seed, f"{limit:g}bits")


def run(
    arena: Arena, part: str, limit: float, name: str, seed: int, budget: str
) -> Iterator[dict[str, Any]]:
    """The row of one strategy, where it is missing."""
    seed = seed if name in SEEDED else 0
    if (arena.dtype, part, limit, name, seed) in finished():
        return
    start = time.perf_counter()
    with arena.problem(f"{part}-{limit:g}-{name}-{seed}", budget, seed) as (problem, _):
        if name == "uniform":
            last, tokens = nearest_uniform(problem), 0
        else:
            strategy = SPARSITY[name](arena, problem)
            trials = list(strategy(problem, np.random.default_rng(seed)))
            last, tokens = trials[-1].allocation, problem.spent()
        costs = {table.name: table.total(last) for table in problem.costs}
    yield {
        "dtype": arena.dtype,
        "part": part,
        "limit": limit,
        "strategy": name,
        "seed": seed,
        "tokens": tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "costs": costs,
        "effective_bits": costs["bits"] / arena.session.space.weights,
        **{split: figures(arena, last, split) for split in ("validate", "test")},
        "counts": Counter(map(str, last.levels)),
        "levels": list(map(str, last.levels)),
    }


def figures(arena: Arena, allocation: Allocation, split: str) -> dict[str, float]:
    """KL to the dense model in nats/token, its standard error over windows, perplexity."""
    score = arena.score(allocation, split)
    return {"kl": score.loss, "stderr": score.stderr, "perplexity": score.perplexity}


def finished() -> set[tuple[str, str, float, str, int]]:
    """What is in the results."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    rows = map(json.loads, lines)
    keys = ("dtype", "part", "limit", "strategy", "seed")
    return {tuple(row[key] for key in keys) for row in rows}  # type: ignore[misc]


if __name__ == "__main__":
    main()
