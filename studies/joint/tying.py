"""What it costs, by sensitivities, to give all linears of a sublayer or a block one level.

    python studies/joint/tying.py WORK/sensitivities-12288-0.json

The file is one that studies/search/run.py leaves: SmolLM2-135M at 2 to 8 bits in groups of 64. Rows
are budgets in bits; columns the least sum of sensitivities, in nats/token, of single linears, of
q/k/v and gate/up tied, of sublayers and of blocks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from autocompress.core import Budget, Layer, SearchSpace
from autocompress.cost import size_tables
from autocompress.levels import parse_level
from autocompress.strategies.ilp import solve

BLOCKS = 30
SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
TIES = (
    ((0,), (1,), (2,), (3,), (4,), (5,), (6,)),
    ((0, 1, 2), (3,), (4, 5), (6,)),
    ((0, 1, 2, 3), (4, 5, 6)),
    (tuple(range(7)),),
)
BUDGETS = (2.5, 3.0, 3.297, 3.5)


def main() -> None:
    """Print the table."""
    content = json.loads(Path(sys.argv[1]).read_text())
    rows = [{parse_level(key): value for key, value in row.items()} for row in content["mean"]]
    levels = tuple(rows[0])
    for bits in BUDGETS:
        sums = []
        for tie in TIES:
            members = [[7 * block + i for i in group] for block in range(BLOCKS) for group in tie]
            layers = tuple(
                Layer(str(one), tuple(map(str, one)), tuple(SHAPES[i % 7] for i in one))
                for one in members
            )
            prices = [
                {level: sum(rows[i][level] for i in one) for level in levels} for one in members
            ]
            space = SearchSpace("tied", layers, (levels,) * len(layers))
            budget = Budget("bits", int(bits * space.weights), f"{bits}bits")
            best = solve(space, size_tables(space, 0), [budget], prices)
            sums.append(sum(row[lv] for row, lv in zip(prices, best.levels, strict=True)))
        print(bits, *(f"{total:.4f} ({total / sums[0] - 1:+.1%})" for total in sums))


if __name__ == "__main__":
    main()
