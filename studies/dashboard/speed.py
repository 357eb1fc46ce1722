"""How long the dashboard takes to open a study, and what recording a trial costs.

    python studies/dashboard/speed.py WORK --trials 3000
    python studies/dashboard/speed.py WORK --recorded    # opens what is there once more

Trials are random allocations of SmolLM2-135M's 210 layers with made-up losses: what is measured is
writing, reading and drawing them.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from autocompress.config import StudyConfig
from autocompress.core import Allocation, Fidelity
from autocompress.cost import size_tables
from autocompress.mirror import Mirror
from autocompress.optuna_storage import JOURNAL
from autocompress.run_record import write_record
from autocompress.study import Study

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))  # whose toys stand in for a model
DRAWN = "document.querySelectorAll('.scatterlayer .points path').length"
SHOWN = {  # what the page shows -> when it does
    "trials": f"document.body.innerText.includes('Pareto Front') && {DRAWN} > 1000",
    "plots": "document.body.innerText.includes('Effective bits of every layer')",
}
MODEL = {"name": "SmolLM2-135M (made-up losses)", "fingerprint": "x", "source": None}


def main() -> None:
    """Record, open, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--trials", type=int, default=3000)
    parser.add_argument("--recorded", action="store_true", help="open what WORK holds")
    arguments = parser.parse_args()
    run = arguments.work / "many.run"
    recorded = {} if arguments.recorded else record(run, arguments.trials)
    facts = {"trials": arguments.trials, **recorded, **asyncio.run(opening(run))}
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


async def opening(run: Path) -> dict[str, Any]:
    """Seconds from the command until it serves, the page shows the trials, and the plots, too.

    The browser is running already, with an empty page.
    """
    command = "from autocompress.cli import main; main()"
    asked = (sys.executable, "-c", command, "dashboard", str(run), "--port", "0")
    async with browser() as page:
        start = time.perf_counter()
        server = await asyncio.create_subprocess_exec(*asked, stderr=subprocess.PIPE)
        try:
            assert server.stderr is not None
            line = (await server.stderr.readline()).decode()
            ready = time.perf_counter() - start
            address = line.split("/dashboard/")[0]
            await page.call("Page.navigate", url=f"{address}/dashboard/studies/0")
            found = {"ready_s": ready}
            for name, condition in SHOWN.items():
                await page.until(condition)
                found[f"{name}_s"] = time.perf_counter() - start
                await page.picture(run.with_name(f"{name}.png"))
            return found
        finally:
            server.terminate()
            await server.wait()


class Page:
    """A page of Chromium, through its DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._calls = socket, 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method and wait for what it returns."""
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": parameters})
        while True:
            answer = json.loads((await self._socket.receive()).data)
            if answer.get("id") == self._calls:
                return dict(answer["result"])

    async def until(self, condition: str) -> None:
        """Wait until an expression in JavaScript holds."""
        held = False
        while not held:
            answer = await self.call("Runtime.evaluate", expression=condition)
            held = bool(answer["result"].get("value"))
            await asyncio.sleep(0.02)

    async def picture(self, path: Path) -> None:
        """Take a screenshot."""
        answer = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """Chromium with an empty page."""
    with tempfile.TemporaryDirectory() as profile:
        flags = ("--no-sandbox", "--remote-debugging-port=0", "--window-size=1400,900")
        process = await asyncio.create_subprocess_exec(
            *("chromium", "--headless", *flags, f"--user-data-dir={profile}", "about:blank"),
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        try:
            async with aiohttp.ClientSession() as session:
                async for line in process.stderr:
                    if b"DevTools listening on ws://" in line:
                        break
                host = line.decode().split("ws://")[1].split("/")[0]
                async with session.get(f"http://{host}/json/list") as answer:
                    target = next(it for it in await answer.json() if it["type"] == "page")
                at = target["webSocketDebuggerUrl"]
                async with session.ws_connect(at, max_msg_size=0) as socket:
                    yield Page(socket)
        finally:
            process.terminate()
            await process.wait()


if __name__ == "__main__":
    main()
