"""The dashboard's largest answer, kept until the study changes.

At 3,000 trials the study as JSON takes more than a second of processor time, and a page asks for it
every few seconds.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

from autocompress.dashboard_pages import App
from autocompress.pareto import front

if TYPE_CHECKING:
    from optuna.study import StudyDirection
    from optuna.trial import FrozenTrial

Answer = tuple[str, list[tuple[str, str]], bytes]  # status, headers, body

FIRST = "after=0"  # what the page asks for when it is opened: trials from number 0 on

_STUDY = re.compile(r"/api/studies/\d+/?")


class Answers:
    """A WSGI application in front of optuna-dashboard's.

    Args:
        app: optuna-dashboard's.
        state: what the answers depend on; they are kept while it stays the same.
    """

    def __init__(self, app: App, state: Callable[[], object]) -> None:
        self._app, self._state = app, state
        self._kept: dict[tuple[str, str], Answer] = {}
        self._at: object = None  # the state that they belong to
        self._lock = threading.Lock()

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answer a request."""
        path, query = str(environ.get("PATH_INFO", "")), str(environ.get("QUERY_STRING", ""))
        if environ.get("REQUEST_METHOD") != "GET":
            with self._lock:
                self._kept.clear()  # a user changed something
            return self._app(environ, start_response)
        if not _STUDY.fullmatch(path):
            return self._app(environ, start_response)
        with self._lock:  # whoever asks while it is being made waits for it
            status, headers, body = self._answer((path, query), environ)
        start_response(status, headers)
        return [body]

    def warm(self, study: int) -> None:
        """Have the answer ready that a page asks for first."""
        environ = {"PATH_INFO": f"/api/studies/{study}", "QUERY_STRING": FIRST}
        setup_testing_defaults(environ)
        list(self(environ, lambda *answer: None))

    def _answer(self, key: tuple[str, str], environ: dict[str, Any]) -> Answer:
        state = self._state()
        if state != self._at:
            self._kept, self._at = {}, state
        if key not in self._kept:
            answer = _asked(self._app, environ)
            if not answer[0].startswith("200"):
                return answer
            self._kept[key] = answer
        return self._kept[key]


def best_trials(
    trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]
) -> list[FrozenTrial]:
    """The front of finished trials, in their order: what optuna-dashboard asks of every study.

    Its own way compares every trial with every other as soon as there are three objectives.
    """
    import numpy as np
    from optuna.study import StudyDirection
    from optuna.trial import TrialState

    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    signs = [-1.0 if it == StudyDirection.MAXIMIZE else 1.0 for it in directions]
    values = np.array([trial.values for trial in done]).reshape(-1, len(signs)) * signs
    return [trial for trial, kept in zip(done, front(values), strict=True) if kept]


def study_properties(memory: object, study: int, trials: Sequence[FrozenTrial]) -> Any:
    """What optuna-dashboard asks of all trials together: names and ranges of what they hold.

    Its own way compares every parameter of every trial with all before it, a second of processor
    time at 3,000 trials. They are of few kinds, so it is given the newest of every kind, and
    nothing that it remembers.
    """
    from optuna_dashboard._inmemory_cache import InMemoryCache, get_cached_extra_study_property

    newest: dict[object, FrozenTrial] = {}
    for trial in reversed(trials):
        newest.setdefault(_kind(trial), trial)
    return get_cached_extra_study_property(InMemoryCache(), study, [*newest.values()][::-1])


def _kind(trial: FrozenTrial) -> object:
    """What of a trial `study_properties` depend on."""
    parameters = tuple((name, repr(it)) for name, it in trial.distributions.items())
    attributes = tuple((name, type(value)) for name, value in trial.user_attrs.items())
    return trial.state, parameters, attributes, bool(trial.intermediate_values)


def _asked(app: App, environ: dict[str, Any]) -> Answer:
    """What an application answers, as a whole."""
    told: list[tuple[str, list[tuple[str, str]]]] = []

    def start_response(
        status: str, headers: list[tuple[str, str]], error: object = None
    ) -> Callable[[bytes], object]:
        told.append((status, headers))
        return lambda body: None

    body = b"".join(app(environ, start_response))
    return (*told[-1], body)
