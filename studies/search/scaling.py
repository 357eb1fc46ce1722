"""What the strategies themselves cost, against layers, levels and tokens.

    python studies/search/scaling.py [PART …]      # solver, layers, levels, tokens, samplers, plain

Evaluation is instant and its time subtracted, so what is timed is all that a search does beside
forward and backward passes, the study's table on disk included. Problems are synthetic: SmolLM2's
layer shapes, 2 to 8 bits in several group sizes, prices that fall fourfold with each bit times
log-normal noise (or uniformly random ones), a limit in bits (integers) and one in milliseconds
(floats that do not follow the bits). Times are CPU seconds; exponents are slopes in log-log.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from toys import SMOLLM2, toy_sensitivities, toy_space

from autocompress.core import (
    Allocation,
    Budget,
    CostTable,
    Fidelity,
    Problem,
    Score,
    SearchSpace,
    Strategy,
)
from autocompress.cost import size_tables
from autocompress.highs import _milp
from autocompress.knapsack import _objective, _row, solve_knapsack
from autocompress.predictions import Estimate, Linearization, Sensitivities
from autocompress.strategies.bayesian import Bayesian
from autocompress.strategies.evolution import Evolution
from autocompress.strategies.ilp import ILP
from autocompress.strategies.refinement import Refinement
from autocompress.strategies.samplers import SAMPLERS
from autocompress.strategies.spdy import SPDY
from autocompress.strategies.surrogate import SurrogateSearch
from autocompress.strategies.uniform import Uniform
from autocompress.study import Study

GROUPS = (64, 128, 32, 16, 256, 48, 96)
KEYS = tuple(f"w{bits}g{group}" for group in GROUPS for bits in (2, 3, 4, 5, 6, 8))
LAYERS, LEVELS = (125, 250, 500, 1000, 2000), (5, 10, 20, 40)
TOKENS = (8192, 32768, 131072, 524288)
WINDOW = 512
LIMIT = 120.0  # seconds of plain HiGHS

STRATEGIES: dict[str, tuple[Strategy, str]] = {
    "ilp": (ILP(), "solution"),
    "refinement, 1 step": (Refinement(Uniform(), steps=1), "step"),
    "evolution, 4 × 8": (Evolution(Uniform(), generations=4, offspring=8), "4 generations"),
    "surrogate, 2 × 6": (SurrogateSearch(generations=2), "2 generations"),
    "spdy, tpe, 12": (SPDY(candidates=12), "12 candidates"),
}


class Instant:
    """Losses without a model: the sum of prices, times noise of the windows; times itself."""

    def __init__(self, prices: Sensitivities) -> None:
        self.seconds = 0.0
        self._prices = prices

    def __call__(self, allocation: Allocation, fidelity: Fidelity, known: int = 0) -> Score:
        start = time.process_time()
        loss = sum(row[level] for row, level in zip(self._prices, allocation.levels, strict=True))
        rng = np.random.default_rng(fidelity.seed)
        losses = tuple((loss * rng.lognormal(0, 0.2, fidelity.tokens // WINDOW))[known:].tolist())
        self.seconds += time.process_time() - start
        return Score(losses, losses)


def synthetic(layers: int, levels: int, random: bool = False) -> Problem:
    """A problem with two limits, which evaluates nothing yet."""
    rng = np.random.default_rng(0)
    space = toy_space(-(-layers // len(SMOLLM2)), KEYS[:levels], shapes=SMOLLM2)
    space = SearchSpace("synthetic", space.layers[:layers], space.levels[:layers])
    prices = tuple(
        {level: rng.random() if random else v * rng.lognormal(0, 0.2) for level, v in row.items()}
        for row in toy_sensitivities(space)
    )
    bits, _ = size_tables(space, 0)
    speed = {level: rng.lognormal(-18.5, 0.3) for level in space.levels[0]}  # ms per stored bit
    rows = (
        {level: cost * speed[level] * rng.lognormal(0, 0.05) for level, cost in row.items()}
        for row in bits.entries
    )
    ms = CostTable("latency", "ms", 5.0, tuple(rows))
    budgets = (
        Budget("bits", int(_between(bits, 0.3)), ""),
        Budget("latency", _between(ms, 0.25), ""),
    )
    estimate = Estimate(prices, prices)
    linear = Linearization(estimate, tuple(dict.fromkeys(row, 0.0) for row in prices))
    return Problem(
        space=space,
        costs=(bits, ms),
        budgets=budgets,
        evaluate=lambda *_: [],
        sensitivities=lambda _: estimate,
        linearize=lambda *_: linear,
        window=WINDOW,
        tokens=TOKENS[-1],
    )


def _between(table: CostTable, share: float) -> float:
    """The cost a share of the way from the cheapest allocation to the dearest."""
    least = sum(min(row.values()) for row in table.entries)
    most = sum(max(row.values()) for row in table.entries)
    return table.base + least + share * (most - least)


def own_seconds(strategy: Strategy, problem: Problem) -> float:
    """CPU seconds of a whole run, evaluation subtracted."""
    loss = Instant(problem.sensitivities(0).mean)
    with (
        tempfile.TemporaryDirectory() as folder,
        Study(Path(folder) / "run", problem.space, problem.costs, {}, loss) as study,
    ):
        measured = replace(problem, evaluate=study.evaluate)
        start = time.process_time()
        for _ in strategy(measured, np.random.default_rng(0)):
            pass
        return time.process_time() - start - loss.seconds


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of seconds over sizes in log-log."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def table(name: str, sizes: Sequence[int], run: dict[str, Callable[[int], float]]) -> None:
    """Prints a row of seconds and its exponent per entry of `run`."""
    print(f"\n| CPU seconds, {name} | {' | '.join(map(str, sizes))} | exponent |")
    print(f"|---|{'---|' * (len(sizes) + 1)}")
    for label, measure in run.items():
        seconds = [measure(size) for size in sizes]
        cells = " | ".join(f"{value:.3f}" for value in seconds)
        print(f"| {label} | {cells} | {exponent(sizes, seconds):.2f} |", flush=True)


def solver() -> None:
    """`solve_knapsack`, wall-clock and gap, of the largest problems."""
    print("\n| layers × levels | prices | gap | seconds | above the best, at most |")
    print("|---|---|---|---|---|")
    for layers in (1000, 2000):
        for random in (False, True):
            problem = synthetic(layers, 40, random)
            prices = problem.sensitivities(0).mean
            limits = [(problem.table(b.cost), b.limit) for b in problem.budgets]
            best = None
            for gap in (1e-6, 1e-5, 1e-4, 1e-3):
                start = time.perf_counter()
                found = solve_knapsack(problem.space, limits, prices, gap=gap)
                seconds = time.perf_counter() - start
                assert found is not None and problem.fits(found)
                price = sum(p[level] for p, level in zip(prices, found.levels, strict=True))
                best = price if best is None else min(best, price)
                above = (price / best - 1) + 1e-6
                kind = "random" if random else "falling"
                print(
                    f"| {layers} × 40 | {kind} | {gap:g} | {seconds:.2f} | {above:.1e} |",
                    flush=True,
                )


def plain() -> None:
    """HiGHS on all picks, as `scipy.optimize.milp` gets them without a bound."""
    print("\n| layers × levels | prices | gap | seconds of plain HiGHS | above its bound |")
    print("|---|---|---|---|---|")
    for layers, random in ((1000, False), (1000, True), (2000, False)):
        problem = synthetic(layers, 40, random)
        picks = [(i, level) for i, row in enumerate(problem.space.levels) for level in row]
        rows = [
            _row(problem.space, (problem.table(b.cost), b.limit), picks) for b in problem.budgets
        ]
        prices = _objective(problem.sensitivities(0).mean, picks)
        start = time.perf_counter()
        answer = _milp(prices, np.array([i for i, _ in picks]), rows, 1e-3, LIMIT)
        seconds = time.perf_counter() - start
        assert answer is not None
        above = answer.price / answer.least - 1
        kind = "random" if random else "falling"
        print(f"| {layers} × 40 | {kind} | 0.001 | {seconds:.1f} | {above:.1e} |", flush=True)


def layers() -> None:
    """All strategies against layers, 40 levels."""
    runs = {
        f"{name} ({unit})": lambda size, it=it: own_seconds(it, synthetic(size, 40))
        for name, (it, unit) in STRATEGIES.items()
    }
    table("40 levels, by layers", LAYERS, runs)


def levels() -> None:
    """All strategies against levels, 1,000 layers."""
    runs = {
        f"{name} ({unit})": lambda size, it=it: own_seconds(it, synthetic(1000, size))
        for name, (it, unit) in STRATEGIES.items()
    }
    table("1,000 layers, by levels", LEVELS, runs)


def tokens() -> None:
    """What more tokens cost those that compare windows: 210 layers, 6 levels."""
    problem = synthetic(210, 6)
    runs = {
        "refinement, 1 step": lambda size: own_seconds(
            Refinement(Uniform(tokens=size), steps=1, tokens=size), problem
        ),
        "evolution, 4 × 8": lambda size: own_seconds(
            Evolution(Uniform(), generations=4, offspring=8, stages=((2, 1024), (1, size))), problem
        ),
        "spdy, tpe, 12": lambda size: own_seconds(SPDY(candidates=12, tokens=size), problem),
    }
    table("210 layers × 6 levels, by tokens", TOKENS, runs)


def samplers() -> None:
    """Seconds per candidate of each of Optuna's samplers, 60 candidates."""
    sizes, count = (14, 56, 210), 60

    def mean(family: type[SPDY] | type[Bayesian], sampler: str, size: int) -> float:
        return own_seconds(family(sampler=sampler, candidates=count), synthetic(size, 6)) / count

    for family in (SPDY, Bayesian):
        table(
            f"6 levels, per candidate of {count}, by layers",
            sizes,
            {
                f"{family.__name__.lower()}, {sampler}": (
                    lambda size, family=family, sampler=sampler: mean(family, sampler, size)
                )
                for sampler in SAMPLERS
            },
        )


PARTS = {part.__name__: part for part in (solver, layers, levels, tokens, samplers, plain)}

if __name__ == "__main__":
    warnings.simplefilter("ignore", UserWarning)  # of many layers, which is what is measured
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()
