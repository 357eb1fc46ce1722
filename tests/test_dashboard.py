"""The dashboard's answers: made once, and again when the study or a user changed something."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import numpy as np
import optuna
from runs import finished

from autocompress.dashboard import View, without
from autocompress.dashboard_answers import Answers, best_trials


class Counting:
    """An application that tells how often it was asked."""

    def __init__(self, status: str = "200 OK") -> None:
        self.asked, self.status = 0, status

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        self.asked += 1
        start_response(self.status, [("X", "y")])
        return [f"{self.asked} {environ['PATH_INFO']}".encode()]


def ask(app: Any, path: str, query: str = "", method: str = "GET") -> tuple[str, bytes]:
    environ = {"PATH_INFO": path, "QUERY_STRING": query, "REQUEST_METHOD": method}
    setup_testing_defaults(environ)
    told: list[str] = []
    body = b"".join(app(environ, lambda status, headers, error=None: told.append(status)))
    return told[0], body


def test_a_study_is_serialized_once_until_it_changes() -> None:
    state, app = [0], Counting()
    answers = Answers(app, lambda: state[0])
    answers.warm(0)
    assert ask(answers, "/api/studies/0", "after=0") == ("200 OK", b"1 /api/studies/0")
    assert app.asked == 1, "a page finds its answer ready"
    assert ask(answers, "/api/studies/0", "after=7")[1] == b"2 /api/studies/0"
    assert ask(answers, "/api/studies/1", "after=0")[1] == b"3 /api/studies/1"
    state[0] += 1
    assert ask(answers, "/api/studies/0", "after=0")[1] == b"4 /api/studies/0"
    ask(answers, "/api/studies/0/note", method="PUT")
    assert ask(answers, "/api/studies/0", "after=0")[1] == b"6 /api/studies/0", "a user wrote"


def test_nothing_else_is_kept() -> None:
    app = Counting()
    answers = Answers(app, lambda: 0)
    for path in ("/api/studies", "/api/studies/0/param_importances", "/dashboard/studies/0"):
        assert ask(answers, path)[1] != ask(answers, path)[1]
    failing = Counting("404 Not Found")
    answers = Answers(failing, lambda: 0)
    assert ask(answers, "/api/studies/9")[1] != ask(answers, "/api/studies/9")[1]


def test_a_new_trial_is_shown_at_once(tiny_folder: Path, tmp_path: Path) -> None:
    from autocompress.optuna_storage import open_storage

    journal = tmp_path / "copy.journal"
    run = finished(tiny_folder).with_name("result.run")
    journal.write_bytes((run / "optuna.journal").read_bytes())
    view = View(run, str(journal))
    before = view.state()
    assert view.state() == before
    (name,) = optuna.get_all_study_names(open_storage(journal))
    study = optuna.load_study(study_name=name, storage=open_storage(journal))
    study.add_trial(study.trials[0])
    after = view.state()
    assert after != before
    assert view.refresh() and view.state() != after and not view.refresh()


def test_the_best_trials_are_those_of_the_dashboard() -> None:
    from optuna.study import StudyDirection
    from optuna_dashboard import _app
    from optuna_dashboard._pareto_front import _get_pareto_front_trials_nd

    rng = np.random.default_rng(0)
    trials = [
        optuna.trial.create_trial(values=list(map(float, row)))
        for row in rng.integers(0, 40, (200, 3))  # some are equal
    ]
    trials.append(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
    directions = [StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    found = best_trials(trials, directions)
    assert found == _get_pareto_front_trials_nd(trials, directions) and len(found) > 3
    assert best_trials([], directions) == []
    assert callable(_app.get_pareto_front_trials), "the name that ours takes the place of"


def test_a_package_that_is_hidden_for_a_while() -> None:
    import wave  # any module of the standard library that is imported already

    with without("wave"):
        assert sys.modules["wave"] is wave, "what is there stays"
    with without("no_such_package"):
        assert sys.modules["no_such_package"] is None
    assert "no_such_package" not in sys.modules
