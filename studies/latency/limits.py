"""Ten searches within a limit of size and one of latency: does every winner keep both?

    python studies/latency/limits.py FOLDER [--runs 10] [--generations 4]

The limits of latency lie evenly between what uniform 2 bits and uniform 8 bits are predicted to
take on this machine. All searches share one database in FOLDER.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from autocompress import search
from autocompress.config import StudyConfig
from autocompress.errors import BudgetError
from autocompress.latency_setup import price
from autocompress.levels import parse_level
from autocompress.machine import compute_dtype
from autocompress.models import find_layers, load_model
from autocompress.progress import Lines
from autocompress.spaces import build_space, load_space

BITS = "3.5bits"


def main() -> None:
    """Run the searches; one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--generations", type=int, default=1)
    arguments = parser.parse_args()
    fast, slow = uniform_ms("w2g64"), uniform_ms("w8g128")
    print(f"predicted: uniform w2g64 {fast:.2f} ms, w8g128 {slow:.2f} ms; {os.cpu_count()} cores")
    kept = 0
    for run in range(arguments.runs):
        limit = fast + (slow - fast) * (run + 1) / (arguments.runs + 1)
        try:
            facts = search(
                (BITS, f"{limit:.3f}ms"),
                run=arguments.folder / "run",
                out=arguments.folder / f"result-{run}",
                generations=arguments.generations,
                progress=Lines(),
            ).facts
        except BudgetError as error:
            print(f"{limit:.2f} ms: refused, {error}", flush=True)
            continue
        winner = facts["results"]["winner"]
        row = winner["latency"]
        held = row["measured_ms"] <= limit and facts["effective_bits"] <= 3.5
        kept += held
        print(
            f"{limit:.2f} ms: measured {row['measured_ms']:.2f} ({row['low_ms']:.2f}-"
            f"{row['high_ms']:.2f}), predicted {row['predicted_ms']:.2f}, "
            f"{facts['effective_bits']:.3f} bits, KL {winner['test']['kl']:.4f} on test windows, "
            f"searches {facts['latency']['tries']}: {'kept' if held else 'BROKEN'}",
            flush=True,
        )
    print(f"{kept} of {arguments.runs} within both limits")


def uniform_ms(text: str) -> float:
    """Predicted ms per token where every layer is at this level."""
    config, level = StudyConfig(), parse_level(text)
    chosen, loaded = load_space(config.space), load_model(None, compute_dtype("auto"))
    space = build_space(chosen, find_layers(loaded.model, chosen.scope), ())
    latency = price(loaded, space, config.parsed_target(), Lines(), fresh=True)
    assert np.isfinite(latency.table.total(space.uniform(level)))
    return latency.table.total(space.uniform(level))


if __name__ == "__main__":
    main()
