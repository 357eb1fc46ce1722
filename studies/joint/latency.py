"""Joint levels against quantization alone at equal decode times.

    python studies/joint/latency.py WORK price                          # on a quiet machine
    python studies/joint/latency.py WORK search --limits 4 5 --seeds 0 1 2
    python studies/joint/latency.py WORK measure                        # on a quiet machine

WORK is that of `run.py WORK joint`, whose database is used. Searches see the prices of the first
command, so that other processes do not disturb them; rows are appended to results.jsonl here.
`measure` prices again, times all winners in turns and writes measured.json here.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

from run import HERE, RESULTS, run

from autocompress.core import Allocation
from autocompress.latency import restrict
from autocompress.latency_setup import Latency, price
from autocompress.levels import parse_level
from autocompress.machine import describe_machine
from autocompress.progress import Lines
from autocompress.targets import Target

from arena import Arena, open_arena  # isort: skip  (`run` makes it importable)

SPACES = ("joint", "quantized")  # the larger one first: it builds for both
THREADS = 2
UNIFORM = ("w2g64", "w3g64", "w4g64", "w8g64", "s50+w3g64", "1:4+w3g64")  # printed beside prices


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("command", choices=["price", "search", "measure"])
    parser.add_argument("--limits", nargs="+", type=float, help="ms per token")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    if arguments.command == "price":
        show_prices(open_arena(arguments.work, space=str(HERE / "joint.toml")))
    elif arguments.command == "search":
        search(arguments)
    else:
        measure(open_arena(arguments.work, space=str(HERE / "joint.toml")))


def priced(arena: Arena, fresh: bool) -> Latency:
    """What levels take on this machine, from its store where it is known."""
    session = arena.session
    target = Target("cpu", threads=THREADS)
    return price(session.loaded, session.space, target, Lines(), fresh=fresh)


def show_prices(arena: Arena) -> None:
    """Price all levels again, and print what some take everywhere."""
    latency, space = priced(arena, True), arena.session.space
    for entry in latency.dropped:
        print(f"left out: {entry.level} of {len(entry.layers)} layers, {entry.reason}")
    for text in UNIFORM:
        print(f"{text}: {latency.table.total(space.uniform(parse_level(text))):.2f} ms per token")


def search(arguments: argparse.Namespace) -> None:
    """The default search of both spaces at every limit."""
    for name in SPACES:
        arena = open_arena(arguments.work, space=str(HERE / f"{name}.toml"))
        latency, session = priced(arena, False), arena.session
        timed = replace(
            session,
            space=restrict(session.space, latency.dropped),
            costs=(*session.costs, latency.table),
        )
        arena = replace(arena, session=timed)
        for seed, limit in itertools.product(arguments.seeds, arguments.limits):
            for row in run(arena, f"{name}-ms", limit, "auto", seed, f"{limit:g}ms"):
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(name, limit, seed, row["costs"], row["test"], flush=True)


def measure(arena: Arena) -> None:
    """Time all winners, packed, in interleaved rounds."""
    rows = [
        row for row in map(json.loads, RESULTS.read_text().splitlines()) if "-ms" in row["part"]
    ]
    winners = {
        tuple(row["levels"]): Allocation(tuple(map(parse_level, row["levels"]))) for row in rows
    }
    latency, session = priced(arena, True), arena.session  # its speed drifts
    found = latency.measure(
        session.loaded.model, session.space, list(winners.values()), session.database.load, Lines()
    )
    known = dict(zip(winners, found, strict=True))
    lines = []
    for row in rows:
        one = known[tuple(row["levels"])]
        keys = {key: row[key] for key in ("part", "limit", "seed")}
        searched, predicted = (
            row["costs"]["latency"],
            latency.table.total(winners[tuple(row["levels"])]),
        )
        timed = {"ms": one.ms, "low": one.low, "high": one.high}
        lines.append({**keys, "searched": searched, "predicted": predicted, **timed})
        print(lines[-1], flush=True)
    machine = describe_machine(session.loaded.model.dtype)
    text = json.dumps({"machine": machine, "winners": lines}, indent=1)
    (HERE / "measured.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
