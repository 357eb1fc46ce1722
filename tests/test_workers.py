"""Workers take jobs, die and are replaced; wrong settings are refused, and nothing is written."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from jobs import die, die_once, fail, square
from runs import command

from autocompress import workers as module
from autocompress.errors import WorkerError
from autocompress.workers import Pool, Workers, open_pool


@pytest.fixture(scope="module")
def pool():
    with open_pool(Workers(2)) as opened:
        yield opened


def test_results_come_in_order_from_other_processes(pool):
    found = pool.run(square, [(number,) for number in range(9)])
    assert [result for result, _ in found] == [number**2 for number in range(9)]
    assert os.getpid() not in {process for _, process in found}
    assert pool.run(square, []) == []


def test_the_job_of_a_killed_worker_is_given_to_another(pool, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(pool, "_say", said.append)
    tasks = [(tmp_path / "killed", number) for number in range(6)]
    assert pool.run(die_once, tasks) == list(range(6))
    assert len(said) == 1 and "a worker died" in said[0]


class Dying(Pool):
    """Workers of this process; one dies whenever two jobs are done and more are left."""

    def __init__(self) -> None:
        super().__init__({}, 2, 1, (EOFError,))
        self.asked: list[list[int]] = []

    def _results(self, job, tasks):
        self.asked.append([number for number, _ in tasks])
        yield from ((number, job(*task)) for number, task in tasks[:2])
        if len(tasks) > 2:
            raise EOFError("a worker is gone")


def test_what_was_finished_before_a_death_is_not_run_again():
    dying = Dying()
    assert dying.run(str, [(number,) for number in range(5)]) == list("01234")
    assert dying.asked == [[0, 1, 2, 3, 4], [2, 3, 4], [4]]


def test_workers_that_always_die_end_the_search(pool):
    with pytest.raises(WorkerError, match=r"3 deaths in a row.*Check their memory"):
        pool.run(die, [(1,), (2,)])
    assert pool.run(square, [(3,)])[0][0] == 9, "the next jobs get new workers"


def test_an_error_of_a_job_is_not_a_death(pool):
    with pytest.raises(ValueError, match="job 1 is wrong"):
        pool.run(fail, [(1,)])


def test_one_process_needs_no_pool():
    for workers in (Workers(), Workers(1)):
        with open_pool(workers) as opened:
            assert opened is None
    assert Workers().own_threads is None and Workers(1, threads=3).own_threads == 3


WRONG = {
    "workers must be at least 1. Got 0": ("--workers", 0),
    "worker_threads must be at least 1. Got 0": ("--workers", 2, "--worker-threads", 0),
    "worker_threads must go with workers": ("--worker-threads", 2),
    "Got 'dsak'. Did you mean 'dask'?": ("--workers", 2, "--backend", "dsak"),
    "Add --backend dask": ("--workers", 2, "--scheduler", "tcp://127.0.0.1:1"),
}


@pytest.mark.parametrize(("message", "flags"), WRONG.items())
@pytest.mark.parametrize("name", ["search", "build"])
def test_wrong_workers(name: str, message: str, flags: tuple[object, ...], tmp_path: Path) -> None:
    budget = ("--budget", "3bits") if name == "search" else ()
    ran = command(name, "--out", tmp_path / "out", *budget, *flags)
    assert ran.code == 2 and message in ran.err and ran.err.count("error:") == 1
    assert not list(tmp_path.iterdir())


def test_a_backend_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(module.PACKAGES, "ray", "no_such_package")
    ran = command(
        *("search", "--out", tmp_path / "out", "--budget", "3bits", "--workers", 2),
        *("--backend", "ray"),
    )
    assert ran.code == 2 and "pip install 'autocompress[ray]'" in ran.err
    assert not list(tmp_path.iterdir())


def test_a_scheduler_that_nobody_runs(monkeypatch, tmp_path):
    pytest.importorskip("distributed")
    monkeypatch.setattr(module, "REACH", "1s")
    ran = command(
        *("search", "--out", tmp_path / "out", "--budget", "3bits"),
        *("--backend", "dask", "--scheduler", "tcp://127.0.0.1:9"),
    )
    assert ran.code == 2 and "must be the address of a dask cluster" in ran.err
    assert ran.err.count("error:") == 1 and not list(tmp_path.iterdir())


def test_ctrl_c_is_heard_where_jobs_run_in_the_search_itself():
    """As joblib does where it cannot start processes."""
    before = signal.getsignal(signal.SIGINT)
    assert module._run(square, 4, (3,), os.getpid())[1][0] == 9
    assert signal.getsignal(signal.SIGINT) is before
