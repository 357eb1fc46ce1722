"""Kill a search at random moments (`kill -9`) and go on, until it has been killed often enough.

    python studies/resume/kills.py WORK --kills 100

Every round begins in a fresh run folder, is killed `--each` times, and is then left to finish. What
it found must be what an uninterrupted search finds; rows that stood in the table when it was
killed must stand there still, and no evaluation may come twice. Searches are forked from a process
that has imported everything, so that moments spread over the search and not over its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

CONFIG = """
dtype = "float32"
window = 64
spend = 3000
generations = 1
[tokens]
calibrate = 1024
search = 512
validate = 256
test = 256
"""
ASKED = ("--pareto", "bits=2.5..5", "--points", "3")
TABLE = "evaluations.jsonl"


def main() -> None:
    """Kill, resume, compare, and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--each", type=int, default=5, help="kills of one search")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    work, rng = arguments.work, random.Random(arguments.seed)
    model = tiny_model(work)
    start = time.monotonic()
    assert search(model, work / "whole", None) == 0
    whole, seconds = found(work / "whole"), time.monotonic() - start
    print(f"uninterrupted: {seconds:.1f} s, {len(rows(work / 'whole'))} rows", flush=True)
    places, rounds = Counter[str](), 0
    while places.total() < arguments.kills:
        out = work / f"round-{rounds}"
        for _ in range(arguments.each):
            if search(model, out, rng.uniform(0, seconds)) == 0:
                break  # it was done before the kill came
            places[place(out)] += 1
            check_table(out)
        assert search(model, out, None) == 0, f"{out} did not finish"
        check_table(out)
        assert found(out) == whole, f"{out} found something else"
        assert evaluations(out) == evaluations(work / "whole"), f"{out} evaluated something else"
        rounds += 1
        print(
            f"{places.total()} kills, {rounds} searches finished alike: {dict(places)}", flush=True
        )
    facts = {"kills": places.total(), "searches": rounds, "killed in": places, "seconds": seconds}
    (HERE / "results.json").write_text(json.dumps(facts, indent=1) + "\n")


def tiny_model(work: Path) -> Path:
    """The tests' tiny Llama, trained once; in a fork, since none may follow a backward pass."""
    from conftest import train_llama, train_tokenizer

    folder = work / "tiny"
    if not folder.exists():
        child = os.fork()
        if child == 0:
            tokenizer = train_tokenizer()
            tokenizer.save_pretrained(folder)
            train_llama(tokenizer).save_pretrained(folder)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    return folder


def search(model: Path, out: Path, life: float | None) -> int:
    """Run a search in a fork, killed after `life` seconds; its exit code, −9 if it was killed."""
    config = out.with_name("config.toml")
    config.write_text(f'model = "{model}"\n{CONFIG}')
    child = os.fork()
    if child == 0:
        run([*("search", "--config", str(config), "--out", str(out)), *ASKED])
    start = time.monotonic()
    while life is None or time.monotonic() - start < life:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(arguments: list[str]) -> None:
    """The command line in this process, which ends with it."""
    log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1)
    from autocompress.cli import main as command

    sys.argv = ["autocompress", *arguments]
    try:
        command()
        os._exit(0)
    except SystemExit as end:
        os._exit(int(end.code or 0))


def rows(out: Path) -> list[dict[str, Any]]:
    """Whole lines of the table."""
    path = out.with_name(f"{out.name}.run") / TABLE
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


SEEN: dict[Path, list[dict[str, Any]]] = {}  # rows of each table when it was last looked at


def check_table(out: Path) -> None:
    """What stood there must stand there still, and nothing may be evaluated twice."""
    now, before = rows(out), SEEN.get(out, [])
    assert now[: len(before)] == before, f"{out}: rows changed"
    keys = [(row["allocation"], json.dumps(row["fidelity"])) for row in now if "number" in row]
    assert len(keys) == len(set(keys)), f"{out}: an evaluation came twice"
    SEEN[out] = now


def evaluations(out: Path) -> list[dict[str, Any]]:
    """All that was evaluated, without times."""
    kept = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(out)]
    return [row for row in kept if "number" in row]


def found(out: Path) -> list[dict[str, Any]]:
    """Every point of the front: levels and losses on all splits."""
    return json.loads((out / "front.json").read_text())["points"]


def place(out: Path) -> str:
    """What a killed search was doing."""
    run = out.with_name(f"{out.name}.run")
    seen = {row["fidelity"]["split"] for row in rows(out) if "number" in row}
    if "test" in seen:
        return "test scores and writing"
    if "validate" in seen:
        return "validation race"
    if seen:
        return "search"
    return "dense model, sensitivities" if (run / TABLE).exists() else "loading, database"


if __name__ == "__main__":
    for module in ("autocompress.cli", "autocompress.pipeline"):
        import_module(module)  # before the forks
    main()
