"""Your own strategy: a frozen dataclass that proposes allocations and yields the best so far.

    python examples/own_strategy.py

This one swaps levels of random layers and keeps what is better. A strategy sees numbers, never a
model: space, costs, budgets and `evaluate`."""

from dataclasses import dataclass

import autocompress
from autocompress.strategies.uniform import nearest_uniform


@autocompress.register_strategy("hill-climbing")
@dataclass(frozen=True)
class HillClimbing:
    """Settings are fields; what happens during a run is in local variables."""

    steps: int = 30
    tokens: int = 4096

    def __call__(self, problem, rng):
        space, fidelity = problem.space, problem.fidelity(self.tokens)
        (best,) = problem.evaluate([nearest_uniform(problem)], fidelity, "hill-climbing")
        yield best
        for _ in range(self.steps):
            proposed = best.allocation
            for index in rng.choice(len(space.layers), 2, replace=False):
                levels = space.levels[index]
                proposed = proposed.swap(index, levels[rng.integers(len(levels))])
            if problem.fits(proposed):  # within every budget
                (trial,) = problem.evaluate([proposed], fidelity, "hill-climbing")
                if trial.loss < best.loss:
                    best = trial
                    yield best


if __name__ == "__main__":
    result = autocompress.search("3.5bits", strategy="hill-climbing", out="results/climbing")
    print({name: row["validate"]["kl"] for name, row in result.results.items()})
