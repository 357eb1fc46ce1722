import math
import warnings
from dataclasses import replace

import optuna
import pytest
from toys import Memory, toy_space

from autocompress.core import Fidelity, Score
from autocompress.cost import size_tables
from autocompress.errors import StudyError
from autocompress.mirror import METRICS, Mirror
from autocompress.optuna_storage import open_storage

SPACE = toy_space(3, pins=(0,))
COSTS = size_tables(SPACE, 1000)
UNIFORM = [SPACE.uniform(level) for level in SPACE.uniform_levels()]


def open_mirror(storage):
    return Mirror.open(storage, "run", SPACE, COSTS)


def read(storage):
    return optuna.load_study(study_name="run", storage=open_storage(storage))


@pytest.fixture
def trials():
    return Memory(SPACE, COSTS)(UNIFORM, Fidelity(64), "uniform")


def test_optuna_reads_the_front_back(tmp_path, trials):
    storage = tmp_path / "run" / "optuna.journal"
    mirror = open_mirror(storage)
    for trial in trials:
        mirror.report(trial, "baseline")
    study = read(storage)
    assert study.metric_names == list(METRICS[:3])
    best = {trial.user_attrs["number"]: trial for trial in study.best_trials}
    assert set(best) == {trial.number for trial in trials}  # uniforms trade loss for bits
    for trial in trials:
        assert best[trial.number].values == [
            trial.loss,
            trial.costs[0] / SPACE.weights,
            trial.costs[1],
        ]
        assert best[trial.number].user_attrs == {
            "allocation": trial.allocation.key,
            "number": trial.number,
            "origin": "uniform",
            "role": "baseline",
            "perplexity": trial.perplexity,
            "split": "search",
            "tokens": 64,
            "seed": 0,
            "every": 1,
            "bits": trial.costs[0],
            "bytes": trial.costs[1],
        }


def test_parameters_are_few_and_say_what_the_allocation_does(tmp_path, trials):
    storage = tmp_path / "optuna.journal"
    low, high = UNIFORM[0], UNIFORM[-1]
    mixed = replace(trials[0], allocation=low.swap(11, high.levels[11]))  # last block's down_proj
    mirror = open_mirror(storage)
    mirror.report(mixed, "candidate")
    mirror.report(replace(trials[0], allocation=high), "candidate")
    one, all_high = (trial.params for trial in read(storage).trials)
    assert set(one) == {
        *("bits_attention", "bits_mlp", "bits_first", "bits_middle", "bits_last"),
    }
    assert one["bits_attention"] == one["bits_first"] < one["bits_mlp"] < one["bits_last"]
    assert one["bits_last"] < all_high["bits_last"]
    assert one["bits_first"] < all_high["bits_first"]


def test_no_trial_twice_not_even_after_reopening(tmp_path, trials):
    storage = tmp_path / "optuna.journal"
    for _ in range(2):
        mirror = open_mirror(storage)
        for role in ("baseline", "finalist"):
            for trial in trials[:2]:
                mirror.report(trial, role)
    mirror.report(replace(trials[0], fidelity=Fidelity(64, split="validate")), "finalist")
    assert [trial.user_attrs["role"] for trial in read(storage).trials] == [
        *("baseline", "baseline", "finalist")
    ]


def test_an_infinite_loss_has_no_place_on_the_front(tmp_path, trials):
    storage = tmp_path / "optuna.journal"
    open_mirror(storage).report(
        replace(trials[0], score=Score((math.inf,), (math.inf,))), "candidate"
    )
    study = read(storage)
    assert study.best_trials == []
    assert study.trials[0].user_attrs["perplexity"] is None
    assert "Infinity" not in storage.read_text()


def test_a_torn_journal_line_does_not_end_the_study(tmp_path, trials):
    storage = tmp_path / "optuna.journal"
    open_mirror(storage).report(trials[0], "baseline")
    with storage.open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    mirror = open_mirror(storage)
    mirror.report(trials[0], "baseline")
    mirror.report(trials[1], "baseline")
    assert len(read(storage).trials) == 2


def test_a_relative_path_is_the_same_file(tmp_path, monkeypatch, trials):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    open_mirror("run/optuna.journal").report(trials[0], "baseline")
    assert len(read(tmp_path / "run" / "optuna.journal").trials) == 1


def test_any_optuna_url(tmp_path, trials):
    url = f"sqlite:///{tmp_path}/study.db"
    open_mirror(url).report(trials[0], "baseline")
    open_mirror(url).report(trials[0], "baseline")
    assert len(read(url).trials) == 1


def test_a_storage_that_is_none(tmp_path):
    with pytest.raises(StudyError, match="storage must be"):
        open_mirror("nosuchdatabase://x")
    (tmp_path / "optuna.journal").mkdir()
    with pytest.raises(StudyError, match="storage must be"):
        open_mirror(tmp_path / "optuna.journal")


def test_optuna_stays_silent_here_and_as_it_was_elsewhere(tmp_path, trials, capfd):
    optuna.logging.set_verbosity(optuna.logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_mirror(tmp_path / "optuna.journal").report(trials[0], "baseline")
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == optuna.logging.INFO


def test_two_runs_of_one_name_have_a_study_each(tmp_path, trials):
    storage = f"sqlite:///{tmp_path / 'trials.db'}"
    names = ("run", "run 2", "run 3")
    first, second = (Mirror.create(storage, names, SPACE, COSTS) for _ in range(2))
    assert (first[1], second[1]) == ("run", "run 2")
    for mirror, _ in (first, second):
        mirror.report(trials[0], "baseline")
    assert len(read(storage).trials) == 1
    Mirror.open(storage, "run 2", SPACE, COSTS).report(trials[0], "baseline")
    assert len(optuna.load_study(study_name="run 2", storage=storage).trials) == 1
    with pytest.raises(StudyError, match="must have a name"):
        Mirror.create(storage, names[:2], SPACE, COSTS)
