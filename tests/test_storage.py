"""Storages that die while a search reports to them, come back, or cannot be reached at all."""

from __future__ import annotations

import socket
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from runs import BUDGET, command, copied_run
from toys import Memory, toy_space

from autocompress import mirror as mirrors
from autocompress.core import Fidelity, Trial
from autocompress.cost import size_tables
from autocompress.errors import StudyError
from autocompress.mirror import RETRY, Mirror
from autocompress.optuna_storage import open_storage, quiet

SPACE = toy_space(3, pins=(0,))
COSTS = size_tables(SPACE, 1000)


@pytest.fixture
def trials() -> list[Trial]:
    uniform = [SPACE.uniform(level) for level in SPACE.uniform_levels()]
    return Memory(SPACE, COSTS)(uniform, Fidelity(64), "uniform")


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def report_through_a_failure(
    storage: str, trials: list[Trial], fail: Any, mend: Any, clock: Clock
) -> list[str]:
    """Report all trials while the storage is away in the middle; the warnings."""
    mirror = Mirror.open(storage, "run", SPACE, COSTS)
    mirror._clock = clock
    mirror.report(trials[0], "candidate")
    fail()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mirror.report(trials[1], "candidate")
        mirror.report(trials[2], "candidate")
        mirror.flush()
        mend()
        clock.now += RETRY + 1
        mirror.report(trials[3], "candidate")
    return [str(it.message) for it in caught if issubclass(it.category, UserWarning)]


def numbers(storage: str) -> list[int]:
    study = optuna.load_study(study_name="run", storage=open_storage(storage))
    return [trial.user_attrs["number"] for trial in study.trials]


def test_a_database_file_that_is_moved_away_and_comes_back(
    tmp_path: Path, trials: list[Trial]
) -> None:
    path, away = tmp_path / "study.db", tmp_path / "away.db"
    url = f"sqlite:///{path}"
    said = report_through_a_failure(
        url, trials, lambda: path.rename(away), lambda: away.rename(path), Clock()
    )
    assert numbers(url) == [0, 1, 2, 3], "in order, none lost, none doubled"
    assert len(said) == 2, said
    assert "must stay reachable" in said[0] and "lacks 2 trials" in said[1]


@contextmanager
def proxy(path: Path, port: int) -> Iterator[None]:
    """Optuna's gRPC proxy in front of a journal file, until it dies."""
    import grpc
    from optuna.storages._grpc.server import make_server

    server = make_server(open_storage(path), "127.0.0.1", port, ThreadPoolExecutor(2))
    assert isinstance(server, grpc.Server)
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()


def test_a_proxy_that_dies_and_is_started_again(tmp_path: Path, trials: list[Trial]) -> None:
    pytest.importorskip("grpc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path, url = tmp_path / "optuna.journal", f"grpc://127.0.0.1:{port}"
    running = [proxy(path, port)]
    running[0].__enter__()

    def restart() -> None:
        running.append(proxy(path, port))
        running[-1].__enter__()
        for _ in range(100):  # its client waits a while between attempts
            try:
                open_storage(url).get_all_studies()
                break
            except Exception:
                time.sleep(0.1)

    try:
        with quiet():
            said = report_through_a_failure(
                url, trials, lambda: running[0].__exit__(None, None, None), restart, Clock()
            )
    finally:
        running[-1].__exit__(None, None, None)
    assert numbers(str(path)) == [0, 1, 2, 3]
    assert "must stay reachable" in said[0] and "RPC that terminated" not in said[0], said
    with pytest.raises(StudyError, match=r"reached. Got .grpc://127.0.0.1"):
        open_storage(url)


def test_a_receipt_that_is_lost_doubles_nothing(
    tmp_path: Path, trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "optuna.journal")
    add = optuna.Study.add_trial

    def deaf(self: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        add(self, trial)
        raise ConnectionError("the answer was lost")

    report_through_a_failure(
        url,
        trials,
        lambda: monkeypatch.setattr(optuna.Study, "add_trial", deaf),
        lambda: monkeypatch.setattr(optuna.Study, "add_trial", add),
        Clock(),
    )
    assert numbers(url) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("grpc://127.0.0.1:1", "Start its server"),
        ("grpc://nowhere", "a host and a port must follow"),
        ("sqlite:////no/such/folder/x.db", "unable to open database file"),
        ("postgresql://me:secret@127.0.0.1:1/x", "me:***@127.0.0.1"),
    ],
)
def test_what_cannot_be_reached_is_one_error(url: str, words: str) -> None:
    with pytest.raises(StudyError) as caught:
        open_storage(url)
    text = str(caught.value)
    assert words in text and "that can be reached" in text
    assert "secret" not in text and "\n" not in text


def test_a_search_goes_on_without_its_storage_and_the_next_one_catches_up(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, db = copied_run(tiny_folder, tmp_path / "demo.run"), tmp_path / "study.db"
    asked = ("search", "--run", run, "--budget", BUDGET, "--out", tmp_path / "out")
    asked = (*asked, "--storage", f"sqlite:///{db}")
    send, calls = Mirror._send, []

    def dying(self: Mirror) -> None:
        calls.append(None)
        if len(calls) == 3:
            db.rename(tmp_path / "away.db")
        send(self)

    monkeypatch.setattr(mirrors.Mirror, "_send", dying)
    ran = command(*asked)
    assert ran.code == 0, ran.err
    assert "must stay reachable" in ran.err and "The same command reports them" in ran.err
    (tmp_path / "away.db").rename(db)
    assert command(*asked).code == 0
    (study,) = optuna.get_all_study_summaries(open_storage(f"sqlite:///{db}"))
    loaded = optuna.load_study(study_name=study.study_name, storage=f"sqlite:///{db}")
    keys = [(it.user_attrs["number"], it.user_attrs["split"]) for it in loaded.trials]
    journal = open_storage(run / "optuna.journal")
    first = optuna.load_study(study_name=study.study_name, storage=journal)
    assert len(keys) == len(set(keys)) == len(first.trials) > 8
