"""Your own hardware: a cost table from a CSV that was measured elsewhere.

    python examples/own_target.py examples/board.csv

A line of the CSV is a level and what it takes there, in ns per thousand weights; a level that is
not in it cannot run there and leaves the search space.
"""

import csv
import math
import sys
from pathlib import Path

import autocompress

FIXED = 0.8  # ms per token outside the layers, measured on the same board


def register(path: Path, name: str = "board") -> None:
    """Make the CSV at `path` the target `name`."""
    with path.open(newline="") as file:
        prices = {row["level"]: float(row["ns_per_1000_weights"]) for row in csv.DictReader(file)}

    @autocompress.register_target(name)
    def board(space, target):
        entries = tuple(
            {lv: layer.weights * prices.get(str(lv), math.inf) / 1e9 for lv in allowed}
            for layer, allowed in zip(space.layers, space.levels, strict=True)
        )
        return autocompress.CostTable("latency", "ms", FIXED, entries)


if __name__ == "__main__":
    register(Path(sys.argv[1]))
    result = autocompress.search(["4ms", "3.5bits"], target="board", out="results/board")
    print(result.path, result.facts["budgets"])
