"""The dashboard's page, served while the study behind it is still being read.

A browser takes a second or more to compile optuna-dashboard's script, which is about as long as it
takes to import Optuna and to read a study of thousands of trials. So both begin at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from autocompress.errors import ConfigError

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]  # WSGI

SCRIPT = "/static/bundle.js"
POLICY = (  # optuna-dashboard's own, of which a test compares every header
    "default-src 'self';img-src 'self' data: blob:;frame-src 'self';object-src 'none';"
    "connect-src 'self';style-src 'self' data: 'unsafe-inline';script-src 'self' 'unsafe-eval'"
)


class Pages:
    """A WSGI application in front of one that comes later.

    Until `take` it answers for the page and its script itself, and lets all other requests wait.

    Args:
        folder: of the package optuna-dashboard.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._app: App | None = None
        self._there = threading.Event()

    def take(self, app: App | None) -> None:
        """Leave everything to `app`; None if there will be none."""
        self._app = app
        self._there.set()

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answer a request."""
        early = None if self._there.is_set() else self._early(environ)
        if early is not None:
            headers, body = early
            start_response("200 OK", [*headers, ("Content-Length", str(len(body)))])
            return [body]
        self._there.wait()
        if self._app is None:
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return []
        return self._app(environ, start_response)

    def _early(self, environ: dict[str, Any]) -> tuple[list[tuple[str, str]], bytes] | None:
        """Headers and body of what needs no study; None for all else."""
        if environ.get("REQUEST_METHOD") != "GET":
            return None
        path = str(environ.get("PATH_INFO", ""))
        if path == "/dashboard" or path.startswith("/dashboard/"):
            headers = [("Content-Type", "text/html; charset=UTF-8")]
            page = self._folder / "index.html"
            return [*headers, ("Content-Security-Policy", POLICY)], page.read_bytes()
        if path == SCRIPT and "gzip" in str(environ.get("HTTP_ACCEPT_ENCODING", "")):
            script = self._folder / "public" / "bundle.js.gz"
            headers = [("Content-Type", "text/javascript; charset=UTF-8")]
            return [*headers, ("Content-Encoding", "gzip")], script.read_bytes()
        return None


def dashboard_folder() -> Path:
    """Where optuna-dashboard is installed; nothing of it is imported.

    Raises:
        ConfigError: it is not, or plotly is not.
    """
    _place("plotly")
    return _place("optuna_dashboard")


def _place(package: str) -> Path:
    """The folder of an installed package."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ConfigError(
            f"a dashboard must have the package '{package}', which is not installed. Run: "
            "pip install 'autocompress[dashboard]'"
        )
    return Path(found.origin).parent
