"""Searches that share a real PostgreSQL server: none of their trials is lost, none is there twice.

    apt-get install -y postgresql && pip install 'autocompress[postgres]'
    python studies/postgres/run.py WORK

A server of its own is started in a temporary folder, as the user `postgres` where root runs this,
on a free port of 127.0.0.1, and ends with the script. Searches are of the tests' tiny model:

- one search with four worker processes;
- four searches at once, of seeds 0 to 3, whose run folders have one name.

What the storage must hold is what the same command reports to a journal file when it is run again,
which replays all trials from the run folder and scores nothing. Writes WORK/results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))  # whose tiny model is searched
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
SEARCH = "from autocompress.cli import main; main()"
IDENTITY = ("allocation", "tokens", "seed", "split", "every")


def main() -> None:
    """Run both, check, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work.resolve()
    model = tiny_model(work / "tiny")
    with server() as url:
        results = {
            "server": version(url),
            "four workers": four_workers(work, model, url),
            "four searches": four_searches(work, model, url),
        }
    (work / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def tiny_model(folder: Path) -> Path:
    """The tests' tiny Llama, trained once (25 s)."""
    from conftest import train_llama, train_tokenizer

    if not folder.exists():
        tokenizer = train_tokenizer()
        train_llama(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def server() -> Iterator[str]:
    """A server that lives while inside, and the URL of an empty database in it."""
    if not BINARIES:
        raise SystemExit("PostgreSQL must be installed. Run: apt-get install -y postgresql")
    binaries = BINARIES[-1].parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    user = [] if os.getuid() else ["runuser", "-u", "postgres", "--"]  # it refuses to run as root
    if user:
        shutil.chown(folder, "postgres")
    data, options = folder / "data", f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"

    def run(name: str, *arguments: str | Path) -> None:
        asked = [*user, str(binaries / name), *map(str, arguments)]
        subprocess.run(asked, check=True, cwd=folder, stdout=subprocess.DEVNULL)

    try:
        run("initdb", "-D", data, "-U", "searcher", "-A", "trust")
        run("pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start")
        try:
            run("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "searcher", "trials")
            yield f"postgresql+psycopg://searcher@127.0.0.1:{port}/trials"
        finally:
            run("pg_ctl", "-D", data, "-w", "-m", "fast", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def version(url: str) -> str:
    """What answers there."""
    import sqlalchemy

    with sqlalchemy.create_engine(url).connect() as connection:
        return str(connection.execute(sqlalchemy.text("show server_version")).scalar())


def four_workers(work: Path, model: Path, url: str) -> dict[str, Any]:
    """One search whose candidates four processes score."""
    start = time.perf_counter()
    folder = work / "workers"
    finish(folder, begin(folder, model, 0, url, "--workers", "4"))
    return {"seconds": round(time.perf_counter() - start, 1), **check(folder, model, 0, url)}


def four_searches(work: Path, model: Path, url: str) -> dict[str, Any]:
    """Four searches that begin at once and write into one storage."""
    start = time.perf_counter()
    folders = {seed: work / f"seed-{seed}" for seed in range(4)}
    running = {seed: begin(it, model, seed, url) for seed, it in folders.items()}
    for seed, process in running.items():
        finish(folders[seed], process)
    seconds = round(time.perf_counter() - start, 1)
    found = {f"seed {seed}": check(it, model, seed, url) for seed, it in folders.items()}
    names = {row["study"] for row in found.values()}
    assert len(names) == 4, f"each search must have a study of its own. Got {names}."
    return {"seconds": seconds, **found}


def begin(
    folder: Path, model: Path, seed: int, storage: str, *flags: str
) -> subprocess.Popen[bytes]:
    """A search in a process of its own; the run folder is always called result.run."""
    from runs import write_config

    config = write_config(folder / "config.toml", model)
    asked = ["search", "--config", str(config), "--budget", "3.5bits", "--seed", str(seed)]
    asked += ["--out", str(folder / "result"), "--storage", storage, *flags]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-c", SEARCH, *asked], stdout=log, stderr=log)


def finish(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait for a search, which must succeed."""
    if process.wait() != 0:
        raise SystemExit(f"a search must succeed. Got:\n{(folder / 'log').read_text()[-2000:]}")


def check(folder: Path, model: Path, seed: int, url: str) -> dict[str, Any]:
    """Compare what the storage holds of a search with what the search reports when replayed."""
    run = folder / "result.run"
    name = json.loads((run / "run.json").read_text())["study"]
    evaluations = sum('"number"' in line for line in (run / "evaluations.jsonl").open())
    held = identities(url, name)
    journal = folder / "replayed.journal"
    finish(folder, begin(folder, model, seed, str(journal)))
    after = sum('"number"' in line for line in (run / "evaluations.jsonl").open())
    assert after == evaluations, "a replay scores nothing"
    wanted = identities(str(journal), name)
    doubled = sum(count - 1 for count in held.values())
    lost, foreign = len(wanted.keys() - held.keys()), len(held.keys() - wanted.keys())
    assert not (doubled or lost or foreign), (doubled, lost, foreign)
    return {
        "study": name,
        "evaluations": evaluations,
        "trials in the storage": held.total(),
        "lost": lost,
        "doubled": doubled,
    }


def identities(storage: str, name: str) -> Counter[tuple[Any, ...]]:
    """What makes each trial of a study itself, and how often it is there."""
    import optuna

    from autocompress.optuna_storage import open_storage

    study = optuna.load_study(study_name=name, storage=open_storage(storage))
    return Counter(tuple(it.user_attrs[key] for key in IDENTITY) for it in study.trials)


if __name__ == "__main__":
    main()
