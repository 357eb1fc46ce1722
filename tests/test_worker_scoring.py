"""Workers find the scores and the winner that one process finds, bit by bit, even when killed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jobs import Here, kill_a_worker, workers_of
from runs import BUDGET, command, copied_run, finished, write_config
from test_prefix import W6, changed

from autocompress.core import Fidelity
from autocompress.errors import WorkerError
from autocompress.evaluator import Evaluator
from autocompress.jsonl import read_rows
from autocompress.progress import Silent
from autocompress.worker_scoring import Setup, SharedEvaluator, score_share, share_out


@pytest.fixture
def evaluator(tiny, tiny_space, tiny_database, tiny_windows, tmp_path):
    made = Evaluator(tiny.model, tiny_space, tiny_database, tiny_windows, tmp_path, Silent())
    yield made
    made.stitched.restore()


@pytest.fixture
def setup(tiny, tiny_folder, tiny_space, tiny_database, tmp_path):
    return Setup(
        key=str(tmp_path),
        model=str(tiny_folder),
        dtype="float32",
        fingerprint=tiny.fingerprint,
        space=tiny_space,
        database=tiny_database.path,
        identity=tiny_database.identity,
        folder=tmp_path,
        share=2,
    )


@pytest.fixture
def candidates(tiny_space):
    base = tiny_space.uniform(W6)
    names = [layer.name for layer in tiny_space.layers][:4]
    return [base, *(changed(base, name, tiny_space) for name in names)]


@pytest.mark.parametrize("fidelity", [Fidelity(64 * 14, 3), Fidelity(64 * 9, 0, every=4)])
def test_shares_have_the_scores_of_the_whole(evaluator, setup, candidates, fidelity):
    for known in (0, 3):
        alone = evaluator.together(candidates, fidelity, known)
        for size in (2, 3, 11):
            pool = Here(size)
            assert (
                SharedEvaluator(evaluator, setup, pool).together(candidates, fidelity, known)
                == alone
            )
            assert 2 <= len(pool.jobs) <= size


def test_windows_are_shared_out_first_and_in_whole_batches():
    whole, last = slice(0, 6), slice(8, 10)
    assert share_out(6, 10, 4, 1) == [(whole, slice(0, 10))]
    assert share_out(6, 10, 4, 3) == [(whole, slice(0, 4)), (whole, slice(4, 8)), (whole, last)]
    assert share_out(6, 3, 4, 2) == [(slice(0, 3), slice(0, 3)), (slice(3, 6), slice(0, 3))]
    assert len(share_out(6, 8, 4, 5)) == 4
    assert share_out(1, 1, 4, 8) == [(slice(0, 1), slice(0, 1))]


def test_another_model_is_refused(setup, candidates):
    other = replace(setup, key="other", fingerprint="f" * 32)
    with pytest.raises(WorkerError, match="must load the search's model"):
        score_share(other, 1, candidates, Fidelity(64), [0])


def found(result: Path) -> tuple[Any, Any]:
    """What a search found, and all its trials."""
    facts = json.loads((result / "autocompress.json").read_text())
    rows = read_rows(result.with_name("result.run") / "evaluations.jsonl")
    scored = [row for row in rows if "number" in row]
    trials = [{key: value for key, value in row.items() if key != "seconds"} for row in scored]
    return (facts["results"], facts["allocation"], facts["sha256"]), trials


def search(tiny_folder: Path, folder: Path, *flags: object) -> tuple[Path, str]:
    """A search that knows nothing but its database, and what it said."""
    run = copied_run(tiny_folder, folder / "result.run")
    (run / "evaluations.jsonl").unlink()
    config = write_config(folder / "config.toml", tiny_folder)
    asked = ("--config", config, "--budget", BUDGET, "--out", folder / "result")
    ran = command("search", *asked, *flags)
    assert ran.code == 0, ran.err
    return folder / "result", ran.err


def test_one_worker_changes_no_bit(tiny_folder, tmp_path):
    result, _ = search(tiny_folder, tmp_path, "--workers", 1)
    assert found(result) == found(finished(tiny_folder))


def test_three_workers_of_which_one_is_killed_change_no_bit(tiny_folder, tmp_path, monkeypatch):
    finished(tiny_folder)
    killing = kill_a_worker(monkeypatch, 3)
    result, said = search(tiny_folder, tmp_path, "--workers", 3)
    assert found(result) == found(finished(tiny_folder))
    assert said.count("a worker died") == 1 and len(killing) > 3
    assert not workers_of(os.getpid()), "they end with the search"


def test_a_dask_cluster_of_two_processes_changes_no_bit_when_one_is_killed(
    tiny_folder, tmp_path, monkeypatch
):
    distributed = pytest.importorskip("distributed")
    finished(tiny_folder)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        processes = list(client.run(os.getpid).values())
        rounds = kill_a_worker(monkeypatch, 3, lambda: processes)
        flags = ("--backend", "dask", "--scheduler", cluster.scheduler_address)
        result, _ = search(tiny_folder, tmp_path, *flags)
        after = client.run(os.getpid).values()
    assert found(result) == found(finished(tiny_folder))
    assert len(rounds) > 3 and max(rounds) == 2
    assert processes[0] not in after and processes[1] in after
