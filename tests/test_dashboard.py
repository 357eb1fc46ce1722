"""The dashboard's answers: made once, and again when the study or a user changed something."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import numpy as np
import optuna
import pytest
from runs import finished

from autocompress.dashboard import View, without
from autocompress.dashboard_answers import Answers, best_trials, study_properties
from autocompress.dashboard_pages import SCRIPT, Pages, dashboard_folder
from autocompress.optuna_storage import journal_studies, open_storage


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


def test_the_properties_are_those_of_the_dashboard() -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    from optuna_dashboard import _app
    from optuna_dashboard._inmemory_cache import InMemoryCache, get_cached_extra_study_property

    trials = [made_trial(number) for number in range(40)]
    expected = get_cached_extra_study_property(InMemoryCache(), 0, trials)
    assert study_properties(None, 0, trials) == expected
    both, union, attributes, intermediate = expected
    assert dict(both) == {"bits": FloatDistribution(0.0, 39.0)}, "the case has several kinds"
    assert len(union) == 2 and isinstance(dict(union)["kind"], CategoricalDistribution)
    assert ("perplexity", False) in attributes and ("tokens", True) in attributes and intermediate
    assert study_properties(None, 0, [])[1] == []
    assert callable(_app.get_cached_extra_study_property), "the name that ours takes the place of"


def made_trial(number: int) -> optuna.trial.FrozenTrial:
    """Trials of several kinds: another range, parameter, type, state, attribute."""
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    values = {"bits": 1.0, **({"kind": "a"} if number % 3 else {})}
    ranges: dict[str, BaseDistribution] = {"bits": FloatDistribution(0.0, max(2.0, number))}
    ranges |= {"kind": CategoricalDistribution(["a", "b"])} if number % 3 else {}
    failed = number % 7 == 0
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE,
        value=None if failed else float(number),
        params=values,
        distributions=ranges,
        user_attrs={"perplexity": None if number == 11 else 1.5, "tokens": number},
        intermediate_values={0: 1.0} if number == 20 else None,
    )


@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/studies/3", SCRIPT])
def test_an_early_page_is_the_one_of_the_dashboard(path: str) -> None:
    from optuna_dashboard import wsgi

    pages = Pages(dashboard_folder())
    early = fetched(pages, path)
    assert early == fetched(wsgi(optuna.storages.InMemoryStorage()), path) and len(early[2]) > 1000
    pages.take(Counting())
    assert fetched(pages, path)[2].startswith(b"1 "), "once it is there, all is the dashboard's"


def fetched(app: Any, path: str) -> tuple[str, dict[str, str], bytes]:
    """Status, headers and body, without what is about the file on the disk."""
    environ: dict[str, Any] = {"PATH_INFO": path, "HTTP_ACCEPT_ENCODING": "gzip, deflate"}
    setup_testing_defaults(environ)
    told: list[Any] = []
    body = b"".join(app(environ, lambda *answer: told.extend(answer)))
    file = ("Last-Modified", "Accept-Ranges", "Etag", "Date")
    return told[0], {name: it for name, it in told[1] if name not in file}, body


def test_what_needs_a_study_waits_for_it() -> None:
    pages = Pages(dashboard_folder())
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, pages, "/api/studies/0")
        with pytest.raises(TimeoutError):
            asked.result(0.05)
        pages.take(Counting())
        assert asked.result(10) == ("200 OK", b"1 /api/studies/0")
    hopeless = Pages(dashboard_folder())
    hopeless.take(None)
    assert ask(hopeless, "/api/studies/0") == ("503 Service Unavailable", b"")


def test_studies_of_a_journal_are_counted_without_reading_it(tmp_path: Path) -> None:
    journal = tmp_path / "optuna.journal"
    assert journal_studies(journal) == []
    storage = open_storage(journal)
    for name in ("a", "b"):
        optuna.create_study(storage=storage, study_name=name).add_trial(made_trial(1))
    assert journal_studies(journal) == [it._study_id for it in storage.get_all_studies()] == [0, 1]


def test_a_package_that_is_hidden_for_a_while() -> None:
    import wave  # any module of the standard library that is imported already

    with without("wave"):
        assert sys.modules["wave"] is wave, "what is there stays"
    with without("no_such_package"):
        assert sys.modules["no_such_package"] is None
    assert "no_such_package" not in sys.modules
