"""A run in the browser: optuna-dashboard on its study, with plots that follow the run folder."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from autocompress.dashboard_pages import Pages, dashboard_folder
from autocompress.errors import ConfigError
from autocompress.optuna_storage import JOURNAL, journal_studies, open_storage, quiet
from autocompress.run_record import find_run, read_record

if TYPE_CHECKING:
    import optuna

    from autocompress.dashboard_answers import Answers

REFRESH = 3.0  # seconds between looks at the run folder
OPENING = 6.0  # seconds until the first plots: a page that opens now has the processors until then
PLOTS = ("front", "allocations", "losses")  # in the order in which they are shown


class View:
    """A run's Optuna study with plots and a note, which are kept in memory.

    Trials are read from the run's own storage whenever the page asks, so they are those of now;
    what is drawn anew every few seconds does not fill the journal of a search that is going on.

    Args:
        path: the run folder.
        storage: of the Optuna study; None is the one that the run remembers.

    Raises:
        StudyError: it is no run folder, or its storage cannot be reached.
    """

    def __init__(self, path: Path, storage: str | None = None) -> None:
        self.path = find_run(path)
        record = read_record(self.path)
        where = storage or record["settings"].get("storage") or self.path / JOURNAL
        self.storage = overlaid(open_storage(where, repair=False))
        self._name, self._drawn = str(record["study"]), -1

    def studies(self) -> list[int]:
        """Numbers of the run's studies in its storage."""
        found = self.storage.get_all_studies()
        return [it._study_id for it in found if it.study_name.startswith(self._name)]

    def state(self) -> object:
        """What the page depends on: trials of every study, and when plots were drawn."""
        numbers = [it._study_id for it in self.storage.get_all_studies()]
        return self._drawn, numbers, [self.storage.get_n_trials(number) for number in numbers]

    def refresh(self) -> bool:
        """Draw the plots anew if there is something new; whether there was."""
        from autocompress.evaluations import TABLE

        table = self.path / TABLE
        size = table.stat().st_size if table.exists() else 0
        if size == self._drawn:
            return False
        with quiet():
            self._draw()
        self._drawn = size
        return True

    def _draw(self) -> None:
        from optuna import load_study
        from optuna_dashboard import save_note, save_plotly_graph_object

        from autocompress.dashboard_plots import allocation_plot, front_plot, loss_plot, note
        from autocompress.runs import open_run

        run = open_run(self.path)
        if not run.evaluations.trials:
            return
        plots = (front_plot(run), allocation_plot(run), loss_plot(run))
        for number in self.studies():
            name = self.storage.get_study_name_from_id(number)
            study = load_study(study_name=name, storage=self.storage)
            save_note(study, note(run))
            for plot, figure in zip(PLOTS, plots, strict=True):
                save_plotly_graph_object(study, figure, graph_object_id=plot)


def own_journal(run: Path, storage: str | None) -> Path | None:
    """The journal in a run folder, if that is where its study is.

    Raises:
        StudyError: it is no run folder.
    """
    elsewhere = storage or read_record(run)["settings"].get("storage")
    return None if elsewhere else run / JOURNAL


def overlaid(storage: optuna.storages.BaseStorage) -> optuna.storages.BaseStorage:
    """The same storage, except that what is set of a study stays in memory."""
    from optuna.storages import BaseStorage

    held: dict[int, dict[str, Any]] = {}

    def hold(self: BaseStorage, study_id: int, key: str, value: Any) -> None:
        held.setdefault(study_id, {})[key] = value

    def attributes(self: BaseStorage, study_id: int) -> dict[str, Any]:
        return {**storage.get_study_system_attrs(study_id), **held.get(study_id, {})}

    def studies(self: BaseStorage) -> list[Any]:
        found = storage.get_all_studies()
        for study in found:
            study.system_attrs = {**study.system_attrs, **held.get(study._study_id, {})}
        return found

    def passed(name: str) -> Callable[..., Any]:
        return lambda self, *args, **settings: getattr(storage, name)(*args, **settings)

    methods = {name: passed(name) for name in dir(BaseStorage) if not name.startswith("_")}
    own = {
        "set_study_system_attr": hold,
        "get_study_system_attrs": attributes,
        "get_all_studies": studies,
    }
    return type("Overlaid", (BaseStorage,), {**methods, **own})()  # type: ignore[no-any-return]


def serve(
    path: Path, storage: str | None, host: str, port: int, say: Callable[[str], None]
) -> None:
    """Serve a run until Ctrl-C.

    Args:
        port: 0 takes a free one; `say` is told the address.

    Raises:
        ConfigError: optuna-dashboard is not installed, or the address is taken.
        StudyError: see `View`.
    """
    pages, run = Pages(dashboard_folder()), find_run(path)
    opened = cache(partial(_open, run, storage))
    journal = own_journal(run, storage)
    numbers = journal_studies(journal) if journal else opened()[0].studies()
    try:
        server = make_server(host, port, pages, _Server, _Quiet)
    except OSError as error:
        raise ConfigError(
            f"--host and --port must be an address that is free. Got {host}:{port}: "
            f"{error.strerror}. Choose another port, or 0."
        ) from error
    page = f"studies/{numbers[-1]}" if numbers else ""
    say(f"http://{host}:{server.server_port}/dashboard/{page} shows {run}; Ctrl-C ends it")
    with _beside(server, pages, opened, say):
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("ended")


@contextmanager
def _beside(
    server: WSGIServer,
    pages: Pages,
    opened: Callable[[], tuple[View, Answers]],
    say: Callable[[str], None],
) -> Iterator[None]:
    """While inside, a thread opens the study and follows the run; what it fails of is raised."""
    ended, failed = threading.Event(), []

    def follow() -> None:
        try:
            view, app = opened()
        except Exception as error:
            failed.append(error)
            pages.take(None)
            server.shutdown()
            return
        pages.take(app)
        _follow(view, app, ended, say)

    threading.Thread(target=follow, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        server.server_close()
    if failed:
        raise failed[0]


def _open(run: Path, storage: str | None) -> tuple[View, Answers]:
    """The study, and optuna-dashboard in front of it."""
    with without("sklearn"):
        from optuna_dashboard import _app, wsgi
    from autocompress.dashboard_answers import Answers, best_trials, study_properties

    # Where one of these names is gone, optuna-dashboard's own serves.
    _app.get_pareto_front_trials = best_trials
    _app.get_cached_extra_study_property = study_properties
    view = View(run, storage)
    return view, Answers(wsgi(view.storage), view.state)


@contextmanager
def without(package: str) -> Iterator[None]:
    """While inside, a package that is not imported yet looks as if it were not installed.

    optuna-dashboard's imports lead to scikit-learn and pandas, for a measure of importance that it
    does not use: half of the time until it serves.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def _follow(view: View, app: Answers, ended: threading.Event, say: Callable[[str], None]) -> None:
    """Refresh until the end; a look that fails, say at a storage that restarts, is repeated.

    Trials come first: plots are drawn when a page that was opened at once shows them already.
    """
    failed, first = False, True
    while True:
        try:
            if first or view.refresh():
                for study in view.studies():
                    app.warm(study)
            failed = False
        except Exception as error:
            if not failed:
                say(f"not up to date: {error}")
            failed = True
        if ended.wait(OPENING if first else REFRESH):
            return
        first = False


class _Server(ThreadingMixIn, WSGIServer):
    """The page asks for several things at once."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    """No line per request."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""
