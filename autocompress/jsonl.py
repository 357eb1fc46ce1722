"""JSON lines that only grow and survive a kill and a full disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from autocompress.errors import OutputError, StudyError

Row = dict[str, Any]  # one line: strict JSON, no NaN and no Infinity


class JsonLines:
    """A file of rows that a reader only ever sees whole, whatever interrupted a write.

    Args:
        path: created when missing.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.touch()
            self._file = path.open("r+b", buffering=0)
        except OSError as error:
            raise _refused(path, error) from error
        self._end = path.stat().st_size  # bytes of whole lines

    def load(self) -> list[Row]:
        """All rows; a last line that was torn by a kill is left out, and the next append cuts it.

        Raises:
            StudyError: a line before the last is damaged.
        """
        content = self.path.read_bytes()
        self._end = content.rfind(b"\n") + 1
        return _parse(self.path, content[: self._end])

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows through to the disk; after an error none of them counts.

        Raises:
            OutputError: the disk refused.
        """
        content = "".join(map(write_row, rows)).encode()
        try:
            self._file.truncate(self._end)  # a torn line, or what an append that failed has left
            self._file.seek(self._end)
            _write(self._file, content)
        except OSError as error:
            with suppress(OSError):  # if even this fails, the next load cuts the torn line off
                self._file.truncate(self._end)
            raise _refused(self.path, error) from error
        self._end += len(content)

    def close(self) -> None:
        """Close the file; every row is on the disk already."""
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """The whole lines of a file that another process may be appending to; none if it is missing.

    Raises:
        StudyError: a line is damaged.
    """
    content = path.read_bytes() if path.exists() else b""
    return _parse(path, content[: content.rfind(b"\n") + 1])


def _parse(path: Path, content: bytes) -> list[Row]:
    rows = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (TypeError, ValueError) as error:
            raise damaged(path, number, error) from error
    return rows


def write_row(row: Mapping[str, Any]) -> str:
    """One line of strict JSON; a NaN or an infinity in it is a ValueError."""
    return json.dumps(row, allow_nan=False) + "\n"


def damaged(path: Path, line: int, error: Exception) -> StudyError:
    """The error of a line that no run wrote like this."""
    return StudyError(
        f"'{path}' must hold one JSON row per line. Got damage at line {line}: {error}. "
        "Delete the lines from there on to evaluate them again, or use another folder."
    )


class _RawFile(Protocol):
    def write(self, content: bytes, /) -> int | None: ...
    def fileno(self) -> int: ...


def _write(file: _RawFile, content: bytes) -> None:
    """Write and sync; an unbuffered file may take only the part that the disk has room for."""
    while content:
        content = content[file.write(content) or 0 :]
    os.fsync(file.fileno())


def _refused(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"a run must be able to write '{path}'. Got: {error}. Make room or choose another "
        "folder; the same command continues where this one stopped."
    )
