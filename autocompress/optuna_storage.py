"""Optuna's storages: opened by an URL or the path of a journal file, and kept silent."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from autocompress.errors import StudyError

if TYPE_CHECKING:
    import optuna

JOURNAL = "optuna.journal"  # name of the default storage in a run folder
GRACE = 5  # seconds until a journal lock that a killed process left behind is taken over
DRIVERS = (
    "Run: pip install 'autocompress[grpc]' for grpc://, psycopg2-binary for PostgreSQL, "
    "mysqlclient for MySQL"
)
GRPC = "grpc://"  # what Optuna has no URL for: host:port of its storage proxy

_CREATED = b'{"op_code":0,'  # how a line begins that creates a study
_PASSWORD = re.compile(r"(://[^/@:]*:)[^@]*@")


def masked(storage: str | Path) -> str:
    """A storage as it may be shown and kept: without its password."""
    return _PASSWORD.sub(r"\1***@", str(storage))


def open_storage(storage: str | Path, *, repair: bool = True) -> optuna.storages.BaseStorage:
    """The storage of an URL (`sqlite:///study.db`, `grpc://host:port`), or of a journal file.

    Args:
        repair: drop what a killed process left half written; who only reads must not.

    Raises:
        StudyError: Optuna cannot open it.
    """
    try:
        with quiet():
            return _open(str(storage), repair)
    except Exception as error:  # every storage brings exceptions of its own
        todo = DRIVERS if isinstance(error, ImportError) else "Start its server"
        raise StudyError(
            f"storage must be a journal file or an Optuna storage URL such as sqlite:///study.db "
            f"that can be reached. Got '{masked(storage)}': {reason(error)}. {todo}, or leave "
            "--storage out."
        ) from error


def reason(error: Exception) -> str:
    """Why a storage failed, in one line and without its password."""
    details = getattr(error, "details", None)  # of gRPC; its text is a page
    text = str(details() if callable(details) else error)
    return masked(text.splitlines()[0].rstrip(".") if text else type(error).__name__)


def _open(storage: str, repair: bool) -> optuna.storages.BaseStorage:
    from optuna.storages import GrpcStorageProxy, get_storage

    if storage.startswith(GRPC):
        host, _, port = storage.removeprefix(GRPC).rpartition(":")
        if not host or not port.isdigit():
            raise ValueError("a host and a port must follow, grpc://host:13000")
        proxy = GrpcStorageProxy(host=host, port=int(port))
        proxy.get_all_studies()  # it connects when first asked
        return proxy
    return get_storage(storage) if "://" in storage else _open_journal(Path(storage), repair)


def _open_journal(path: Path, repair: bool) -> optuna.storages.BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    # The lock is a symbolic link to the file: with a relative path it would dangle, and waiting
    # for a lock that a killed process left behind would never end.
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    if repair:
        _cut_torn_line(path)
    lock = JournalFileSymlinkLock(str(path), grace_period=GRACE)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _cut_torn_line(path: Path) -> None:
    """Drop a last line that a kill tore: Optuna would append to it and never read past it."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def journal_studies(path: Path) -> list[int]:
    """Numbers of a journal's studies, which Optuna takes longer to read; none without a file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return list(range(sum(line.startswith(_CREATED) for line in file)))


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna without its messages and experimental warnings, here and nowhere else."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
