"""A run in the browser: optuna-dashboard on its study, with plots that follow the run folder."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from autocompress.errors import ConfigError
from autocompress.evaluations import TABLE
from autocompress.mirror import JOURNAL
from autocompress.optuna_storage import open_storage, quiet
from autocompress.run_record import read_record
from autocompress.runs import find_run, open_run

if TYPE_CHECKING:
    import optuna

REFRESH = 3.0  # seconds between looks at the run folder
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

    def refresh(self) -> None:
        """Draw the plots anew if there is something new."""
        table = self.path / TABLE
        size = table.stat().st_size if table.exists() else 0
        if size != self._drawn:
            with quiet():
                self._draw()
            self._drawn = size

    def _draw(self) -> None:
        from optuna import load_study
        from optuna_dashboard import save_note, save_plotly_graph_object

        from autocompress.dashboard_plots import allocation_plot, front_plot, loss_plot, note

        run = open_run(self.path)
        if not run.evaluations.trials:
            return
        plots = (front_plot(run), allocation_plot(run), loss_plot(run))
        for known in self.storage.get_all_studies():
            if known.study_name.startswith(self._name):
                study = load_study(study_name=known.study_name, storage=self.storage)
                save_note(study, note(run))
                for name, figure in zip(PLOTS, plots, strict=True):
                    save_plotly_graph_object(study, figure, graph_object_id=name)


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
    try:
        from optuna_dashboard import wsgi
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a dashboard must have the package '{error.name}', which is not installed. Run: "
            "pip install 'autocompress[dashboard]'"
        ) from error
    view = View(path, storage)
    try:
        server = make_server(host, port, wsgi(view.storage), _Server, _Quiet)
    except OSError as error:
        raise ConfigError(
            f"--host and --port must be an address that is free. Got {host}:{port}: "
            f"{error.strerror}. Choose another port, or 0."
        ) from error
    ended = threading.Event()
    threading.Thread(target=_follow, args=(view, ended, say), daemon=True).start()
    say(f"http://{host}:{server.server_port}/dashboard/ shows {view.path}; Ctrl-C ends it")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("ended")
    finally:
        ended.set()
        server.server_close()


def _follow(view: View, ended: threading.Event, say: Callable[[str], None]) -> None:
    """Refresh until the end; a look that fails, say at a storage that restarts, is repeated."""
    failed = False
    while True:
        try:
            view.refresh()
            failed = False
        except Exception as error:
            if not failed:
                say(f"not up to date: {error}")
            failed = True
        if ended.wait(REFRESH):
            return


class _Server(ThreadingMixIn, WSGIServer):
    """The page asks for several things at once."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    """No line per request."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""
