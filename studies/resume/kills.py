"""Kill a search at random moments (`kill -9`) and go on, until it has been killed often enough.

    python studies/resume/kills.py WORK --kills 100

Every round begins in a fresh run folder: a search for a front is killed `--each` times and then
left to finish, and so is the export of a point of that front. What a round found must be what an
uninterrupted one finds, down to the bytes of the packed models; rows that stood in the table when
it was killed must stand there still, and no evaluation may come twice. Commands are forked from a
process that has imported everything, so that moments spread over the search, not its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

CONFIG = """
dtype = "float32"
window = 64
spend = 9000
generations = 2
[tokens]
calibrate = 1024
search = 512
validate = 256
test = 256
"""
ASKED = ("--pareto", "bits=2.5..5", "--points", "3")
POINT = "3"  # of the front, which is exported
TABLE = "evaluations.jsonl"
IMPORTED = (  # before the forks: half of a search's time would go into imports otherwise
    *("autocompress.cli", "autocompress.pipeline", "autocompress.points", "optuna"),
    *("autocompress.dashboard", "autocompress.integration", "transformers.models.llama"),
)


def main() -> None:
    """Kill, resume, compare, and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--each", type=int, default=5, help="kills of one command")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = tiny_model(arguments.work)
    import_all(model)
    kills = Kills(arguments.work, model, arguments.each, random.Random(arguments.seed))
    while kills.places.total() < arguments.kills:
        kills.one_round()
    (HERE / "results.json").write_text(json.dumps(kills.facts(), indent=1) + "\n")


class Kills:
    """Rounds of kills, all compared with one that nobody disturbed.

    Attributes:
        places: how often what was killed.
    """

    def __init__(self, work: Path, model: Path, each: int, rng: random.Random) -> None:
        self.work, self.each, self.rng = work, each, rng
        self.places, self.rounds = Counter[str](), 0
        (work / "config.toml").write_text(f'model = "{model}"\n{CONFIG}')
        self.seconds: list[float] = []
        for command in self._commands(work / "whole"):
            start = spent_by_children()
            assert run(command, None) == 0
            self.seconds.append(spent_by_children() - start)
        self.whole = found(work / "whole")
        print(f"uninterrupted: {self.seconds} s, {len(rows(work / 'whole'))} rows", flush=True)

    def one_round(self) -> None:
        """Both commands on a fresh folder, killed and finished."""
        out = self.work / f"round-{self.rounds}"
        for command, seconds in zip(self._commands(out), self.seconds, strict=True):
            for _ in range(self.each):
                if run(command, self.rng.uniform(0, seconds)) == 0:
                    break  # it was done before the kill came
                self.places[place(out, command[0])] += 1
                check_table(out)
            assert run(command, None) == 0, f"{command} did not finish"
            check_table(out)
        assert found(out) == self.whole, f"{out} found something else"
        assert evaluations(out) == evaluations(self.work / "whole"), f"{out}: other evaluations"
        self.rounds += 1
        print(f"{self.places.total()} kills, {self.rounds} rounds alike: {dict(self.places)}")
        sys.stdout.flush()

    def facts(self) -> dict[str, Any]:
        """What was seen."""
        return {
            "kills": self.places.total(),
            "rounds": self.rounds,
            "killed in": dict(self.places),
            "seconds of each command": self.seconds,
            "evaluations": len(evaluations(self.work / "whole")),
        }

    def _commands(self, out: Path) -> list[list[str]]:
        config, folder = self.work / "config.toml", f"{out}.run"
        return [
            ["search", "--config", str(config), "--out", str(out), *ASKED],
            ["export", folder, "--point", POINT, "--out", f"{out}-point"],
        ]


def import_all(model: Path) -> None:
    """Everything that a command imports."""
    import torch

    for module in IMPORTED:
        import_module(module)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or it warns in every fork
    loaded = import_module("autocompress.models").load_model(str(model), torch.float32)
    assert loaded.tokenizer("warm")["input_ids"]


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


def run(command: list[str], life: float | None) -> int:
    """A command in a fork, killed after `life` seconds of processor time; −9 if it was killed.

    Processor time, so that moments spread over the work however busy the machine is.
    """
    child = os.fork()
    if child == 0:
        become(command)
    while life is None or spent(child) < life:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def spent(child: int) -> float:
    """Seconds of processor time of a living child, or one that waits to be asked for its end."""
    after_name = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def spent_by_children() -> float:
    """Seconds of processor time of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def become(command: list[str]) -> None:
    """The command line in this process, which ends with it; errors alone are shown."""
    from autocompress.cli import main as command_line

    silence = os.open(os.devnull, os.O_WRONLY)
    errors = os.dup(2)
    os.dup2(silence, 1), os.dup2(silence, 2)
    sys.argv = ["autocompress", *command]
    try:
        command_line()
        os._exit(0)
    except SystemExit as end:
        if end.code:
            os.write(errors, f"{command} ended with {end.code}\n".encode())
        os._exit(int(end.code or 0))
    except BaseException:
        os.write(errors, traceback.format_exc().encode())
        os._exit(1)


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


def found(out: Path) -> dict[str, Any]:
    """Every point of the front, levels and losses on all splits, and the bytes of all models."""
    models = sorted([*out.rglob("*.safetensors"), *Path(f"{out}-point").rglob("*.safetensors")])
    hashes = [sha256(model.read_bytes()).hexdigest() for model in models]
    points = json.loads((out / "front.json").read_text())["points"]
    return {"points": points, "models": hashes}


def place(out: Path, command: str) -> str:
    """What a killed command was doing."""
    if command == "export":
        return "export of a point"
    folder = out.with_name(f"{out.name}.run")
    seen = {row["fidelity"]["split"] for row in rows(out) if "number" in row}
    if out.exists():
        return "Pareto emission: packed models, test scores, report"
    if "validate" in seen:
        return "validation race"
    if seen:
        return "search"
    if (folder / "teacher-search.safetensors").exists():
        return "sensitivities"
    return "database" if (folder / "database").exists() else "loading"


if __name__ == "__main__":
    main()
