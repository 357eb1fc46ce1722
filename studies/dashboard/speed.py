"""How long the dashboard takes to open a study, and what recording a trial costs.

    python studies/dashboard/speed.py WORK --trials 3000

Trials are random allocations of SmolLM2-135M's 210 layers with made-up losses: what is measured is
writing, reading and drawing them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.config import StudyConfig
from autocompress.core import Allocation, Fidelity
from autocompress.cost import size_tables
from autocompress.mirror import JOURNAL, Mirror
from autocompress.run_record import write_record
from autocompress.study import Study

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))  # whose toys stand in for a model
PORT = 8177
MODEL = {"name": "SmolLM2-135M (made-up losses)", "fingerprint": "x", "source": None}


def main() -> None:
    """Record, open, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--trials", type=int, default=3000)
    arguments = parser.parse_args()
    run = arguments.work / "many.run"
    facts = {"trials": arguments.trials, **record(run, arguments.trials), **opening(run)}
    print(json.dumps(facts, indent=1))
    (HERE / "results.json").write_text(json.dumps(facts, indent=1) + "\n")


def record(run: Path, trials: int) -> dict[str, float]:
    """Milliseconds per trial for the table and for the mirror; a table that is there is kept."""
    from toys import SMOLLM2, ToyLoss, toy_space

    space = toy_space(30, shapes=SMOLLM2)
    costs = size_tables(space, 10**8)
    config = StudyConfig(budgets=("3.5bits",), out=run.with_name("many"), run=run)
    rng = np.random.default_rng(0)
    with Study(run, space, costs, {"made": "up"}, ToyLoss(space)) as study:
        write_record(config, space, costs, MODEL, "x", "many")
        mirror = Mirror.open(run / JOURNAL, "many", space, costs)
        for number in range(trials):
            picks = rng.integers(0, 5, len(space.layers))
            levels = zip(space.levels, picks, strict=True)
            allocation = Allocation(tuple(allowed[pick] for allowed, pick in levels))
            split = "validate" if number % 10 == 0 else "search"
            (trial,) = study.evaluate([allocation], Fidelity(256, 0, split), f"phase {number % 5}")
            mirror.report(trial, "candidate")
        return {
            "table_ms_per_trial": 1e3 * study.recording / trials,
            "mirror_ms_per_trial": 1e3 * mirror.seconds / trials,
        }


def opening(run: Path) -> dict[str, Any]:
    """Seconds from the command to the study as data, and to the page in a browser."""
    start = time.perf_counter()
    command = "from autocompress.cli import main; main()"
    asked = ("dashboard", str(run), "--port", str(PORT))
    server = subprocess.Popen([sys.executable, "-c", command, *asked], stderr=subprocess.PIPE)
    try:
        assert server.stderr is not None and b"dashboard" in server.stderr.readline()
        ready = time.perf_counter() - start
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/api/studies/0") as answer:
            size = len(answer.read())
        data = time.perf_counter() - start
        return {"ready_s": ready, "data_s": data, "data_bytes": size, **page()}
    finally:
        server.terminate()
        server.wait()


def page() -> dict[str, float]:
    """Seconds that Chromium takes to draw the page."""
    browser = shutil.which("chromium")
    if browser is None:
        return {}
    start = time.perf_counter()
    shown = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--virtual-time-budget=5000", "--dump-dom"),
            f"http://127.0.0.1:{PORT}/dashboard/studies/0",
        ],
        capture_output=True,
        text=True,
    ).stdout
    assert "Pareto Front" in shown and "Effective bits of every layer" in shown
    return {"page_s": time.perf_counter() - start}


if __name__ == "__main__":
    main()
