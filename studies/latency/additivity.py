"""Predicted against measured decode latency of random mixed allocations of the default model.

    python studies/latency/additivity.py [--allocations 20] [--space quant-2-8] [--json FILE]

Every allocation draws one of the space's levels for each layer. All models are timed in
interleaved rounds; weights are random, which changes no latency. The reference allocations of the
prediction take part: how much slower or faster they are than when levels were priced is the
machine's drift, and errors are given as they are and without it.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import median

import numpy as np

from autocompress.config import StudyConfig
from autocompress.core import Allocation, SearchSpace
from autocompress.latency import restrict
from autocompress.latency_model import random_source, reference_allocations
from autocompress.latency_setup import price
from autocompress.machine import compute_dtype
from autocompress.models import find_layers, load_model
from autocompress.progress import Lines
from autocompress.spaces import build_space, load_space


def main() -> None:
    """Price the space, draw, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--allocations", type=int, default=20)
    parser.add_argument("--space", default="quant-2-8")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure what the store knows")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = StudyConfig(space=arguments.space)
    chosen, loaded = load_space(config.space), load_model(None, compute_dtype("auto"))
    space = build_space(chosen, find_layers(loaded.model, chosen.scope), ())
    latency = price(loaded, space, config.parsed_target(), Lines(), again=arguments.again)
    drawn = draw(space, arguments.allocations, arguments.seed)
    references = reference_allocations(restrict(space, latency.dropped))
    both = [*references, *drawn]
    timed = latency.measure(loaded.model, space, both, random_source(loaded.model), Lines())
    before = [latency.table.total(allocation) for allocation in references]
    drift = median(m.ms / p for m, p in zip(timed[: len(before)], before, strict=True))
    measured = timed[len(before) :]
    predicted = [latency.table.total(allocation) for allocation in drawn]
    errors = [p / m.ms - 1 for p, m in zip(predicted, measured, strict=True)]
    steady = sorted(abs(drift * p / m.ms - 1) for p, m in zip(predicted, measured, strict=True))
    for p, m, error in zip(predicted, measured, errors, strict=True):
        print(f"predicted {p:.3f} ms, measured {m.ms:.3f} ({m.low:.3f}-{m.high:.3f}), {error:+.1%}")
    sizes = sorted(map(abs, errors))
    load = Path("/proc/loadavg").read_text().split()[0]
    print(
        f"{len(drawn)} allocations, decoder {measured[0].decoder}, {latency.target.describe()}, "
        f"{os.cpu_count()} cores, load {load}: absolute error median {median(sizes):.2%}, "
        f"worst {sizes[-1]:.2%}; machine {drift - 1:+.1%} since it was priced, without that "
        f"{median(steady):.2%}, {steady[-1]:.2%}; dense bf16 {latency.dense_ms:.2f} ms"
    )
    if arguments.json:
        rows = [
            {"predicted_ms": p, "measured_ms": m.ms, "low_ms": m.low, "high_ms": m.high}
            for p, m in zip(predicted, measured, strict=True)
        ]
        facts = {"rows": rows, "median": median(sizes), "worst": sizes[-1], "load": load}
        facts |= {"drift": drift, "steady_median": median(steady), "steady_worst": steady[-1]}
        arguments.json.write_text(json.dumps({**facts, **latency.facts()}, indent=1) + "\n")


def draw(space: SearchSpace, count: int, seed: int) -> list[Allocation]:
    """Allocations with a level drawn for every layer; each leans to few or to many bits."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        lean = rng.uniform(-1, 1)
        levels = []
        for layer, allowed in zip(space.layers, space.levels, strict=True):
            ranked = sorted(allowed, key=layer.storage_bits)
            weights = np.exp(lean * np.linspace(-1.5, 1.5, len(ranked)))
            levels.append(ranked[int(rng.choice(len(ranked), p=weights / weights.sum()))])
        found.append(Allocation(tuple(levels)))
    return found


if __name__ == "__main__":
    main()
