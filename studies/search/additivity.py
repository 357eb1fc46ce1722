"""Whether losses of layers add up: sums of sensitivities beside measured losses, by strategy.

    python studies/search/additivity.py WORK

WORK is the folder of run.py. Every allocation of every run there, on the most search windows it was
scored on; the sensitivities are those of a search of 30,000 tokens with the run's seed.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import correlation, median

from arena import Arena, effective, open_arena

from autocompress.effort import plan
from autocompress.result import additive_loss

TOKENS = 30_000
FEW = 8  # allocations, below which a correlation says little


def main() -> None:
    """A row per payload and strategy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    arena = open_arena(parser.parse_args().work)
    found = defaultdict(list)
    for folder in sorted((arena.work / "runs").iterdir()):
        if "@" in folder.name:
            name, payload, seed = folder.name.rsplit("-", 2)
            found[float(payload), name].append(pairs(arena, name, float(payload), int(seed)))
    print(
        "| Payload | Strategy | Runs | Allocations | Measured / predicted | Correlation (range) |"
    )
    print("|---|---|---|---|---|---|")
    for (payload, name), runs in sorted(found.items()):
        print(f"| {payload} | {name} | {len(runs)} | {cells(runs)} |")


def pairs(arena: Arena, name: str, payload: float, seed: int) -> list[tuple[float, float]]:
    """Predicted and measured loss of every allocation of a run, on the most windows it has."""
    with arena.problem(f"{name}-{payload}-{seed}", f"{effective(payload)}bits", seed) as opened:
        problem, study = opened
        gradients = plan(TOKENS, problem.window, problem.tokens).sensitivities
        predicted = problem.sensitivities(gradients).mean
        longest = {
            it.allocation: it for it in sorted(study.trials, key=lambda it: it.fidelity.tokens)
        }
    return [(additive_loss(predicted, key), trial.loss) for key, trial in longest.items()]


def cells(runs: list[list[tuple[float, float]]]) -> str:
    """Allocations per run, the ratio's and the correlation's median and range over runs."""
    ratio = median(loss / predicted for run in runs for predicted, loss in run)
    many = [correlation(*zip(*run, strict=True)) for run in runs if len(run) >= FEW]
    count = f"{median(map(len, runs)):g} | {ratio:.2f}"
    if not many:
        return f"{count} | –"
    return f"{count} | {median(many):.2f} ({min(many):.2f} to {max(many):.2f})"


if __name__ == "__main__":
    main()
