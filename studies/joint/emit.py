"""Write the packed model of a winner in results.jsonl, and compare its file with the cost table.

    python studies/joint/emit.py WORK OUT joint 2.5 --seed 0

WORK is that of `run.py WORK joint` or `latency.py`, whose database is used. OUT is then a result
like any other: `autocompress eval OUT`, `bench OUT`, `generate OUT`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from run import HERE, RESULTS

from autocompress.planning import build_plan
from autocompress.plans import FORMAT, VERSION
from autocompress.progress import Lines

from arena import open_arena  # isort: skip  (`run` makes it importable)


def main() -> None:
    """Plan, build, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("part", choices=["joint", "quantized", "joint-ms", "quantized-ms"])
    parser.add_argument("limit", type=float)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    wanted = (arguments.part, arguments.limit, arguments.seed)
    rows = map(json.loads, RESULTS.read_text().splitlines())
    row = next(it for it in rows if (it["part"], it["limit"], it["seed"]) == wanted)
    session = open_arena(arguments.work, space=str(HERE / "joint.toml")).session
    levels = {
        module: level
        for layer, level in zip(session.space.layers, row["levels"], strict=True)
        for module in layer.modules
    }
    plan = arguments.work / f"plan-{'-'.join(map(str, wanted))}.json"
    plan.write_text(json.dumps({"format": FORMAT, "version": VERSION, "levels": levels}, indent=1))
    build_plan(plan, arguments.out, run=arguments.work / "base.run", progress=Lines())
    size = sum(file.stat().st_size for file in arguments.out.glob("*.safetensors"))
    predicted = row["costs"]["bytes"]
    print(f"{size:,} bytes, predicted {predicted:,.0f}: {size / predicted - 1:+.3%}")


if __name__ == "__main__":
    main()
