"""Workers that tests watch and kill, and jobs, which workers must find by name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from autocompress.workers import Pool


def square(number: int) -> tuple[int, int]:
    """The square, and who computed it."""
    return number * number, os.getpid()


def die_once(marker: Path, number: int) -> int:
    """Kills its process the first time, whoever is asked."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return number
    os.kill(os.getpid(), signal.SIGKILL)
    return -1


def die(number: int) -> None:
    """Kills its process."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number: int) -> None:
    """Fails as a job may, which no other worker mends."""
    raise ValueError(f"job {number} is wrong")


class Here(Pool):
    """Workers that are this process, one after the other."""

    def __init__(self, size: int) -> None:
        super().__init__({}, size, 1, ())
        self.jobs: list[Sequence[Any]] = []

    def run(self, job: Callable[..., Any], tasks: Sequence[Sequence[Any]]) -> list[Any]:
        self.jobs += tasks
        return [job(*task) for task in tasks]


def workers_of(parent: int) -> list[int]:
    """Processes of loky's pool."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if above == parent and b"popen_loky" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it ended
            continue
    return found


def kill_a_worker(
    monkeypatch: pytest.MonkeyPatch,
    when: int,
    find: Callable[[], Sequence[int]] = lambda: workers_of(os.getpid()),
) -> list[int]:
    """So many rounds of jobs from now a worker dies; the others stand still until it is gone.

    It dies when it has been given jobs: the pool replaces one that dies before without a word.

    Args:
        find: the workers.

    Returns:
        How many jobs each round has, filled as they come.
    """
    rounds: list[int] = []
    original = Pool._results

    def kill(victim: int, others: Sequence[int]) -> None:
        os.kill(victim, signal.SIGKILL)
        for process in others:
            with suppress(ProcessLookupError):  # loky has ended it
                os.kill(process, signal.SIGCONT)

    def given(tasks: Sequence[Any]) -> Iterator[Any]:
        them = find()
        for process in them:
            os.kill(process, signal.SIGSTOP)
        yield from tasks
        Timer(0.5, kill, (them[0], them[1:])).start()

    def results(self: Pool, job: Any, tasks: Any) -> Any:
        rounds.append(len(tasks))
        watched: Any = given(tasks) if len(rounds) == when else tasks
        return original(self, job, watched)

    monkeypatch.setattr(Pool, "_results", results)
    return rounds
