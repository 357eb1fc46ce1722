"""Ten searches within a limit of size and one of latency: does every winner keep both?

    python studies/latency/limits.py FOLDER [--space quant-2-8] [--ends w2g64 w8g128]
        [--runs 10] [--first 0] [--effort quick] [--score 2048]

The limits of latency lie evenly between what uniform 2 bits and uniform 8 bits take on this
machine, priced just before each search, because its speed drifts. All searches share one
database in FOLDER; `--first` goes on with the runs from there. Finalists are raced on `--score`
tokens of validation and scored on as many of test, few, because limits are the question here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from autocompress import search
from autocompress.config import DEFAULT_SPACE, StudyConfig
from autocompress.documents import SplitTokens
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
    parser.add_argument("--space", default=DEFAULT_SPACE)
    parser.add_argument("--ends", nargs=2, default=("w2g64", "w8g128"), metavar="LEVEL")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--effort", default="quick")
    parser.add_argument("--score", type=int, default=2048)
    arguments = parser.parse_args()
    tokens = SplitTokens(validate=arguments.score, test=arguments.score)
    kept = 0
    for run in range(arguments.first, arguments.runs):
        fast, slow = uniform_ms(arguments.space, arguments.ends)
        limit = fast + (slow - fast) * (run + 1) / (arguments.runs + 1)
        print(
            f"{arguments.ends[0]} {fast:.2f} ms, {arguments.ends[1]} {slow:.2f} ms, limit ", end=""
        )
        known = (arguments.folder / "run" / "run.json").exists()
        effort = {} if known else {"effort": arguments.effort}  # later ones pay an eighth of it
        try:
            facts = search(
                (BITS, f"{limit:.3f}ms"),
                space=arguments.space,
                run=arguments.folder / "run",
                out=arguments.folder / f"result-{run}",
                **effort,
                tokens=tokens,
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
    print(f"{kept} of {arguments.runs - arguments.first} within both limits")


def uniform_ms(name: str, ends: Sequence[str]) -> tuple[float, float]:
    """Predicted ms per token of both ends, at the machine's present speed."""
    config = StudyConfig(space=name)
    chosen, loaded = load_space(name), load_model(None, compute_dtype("auto"))
    space = build_space(chosen, find_layers(loaded.model, chosen.scope), ())
    latency = price(loaded, space, config.parsed_target(), Lines(), fresh=True)
    fast, slow = (latency.table.total(space.uniform(parse_level(text))) for text in ends)
    assert fast < slow < float("inf")
    return fast, slow


if __name__ == "__main__":
    main()
