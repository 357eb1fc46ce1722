"""Writing files so that a crash or a full disk never leaves half of one that looks whole."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from autocompress.errors import AutocompressError, OutputError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a draft path beside `path`, then move the draft into place.

    Raises:
        OutputError: the disk refused; `path` is then what it was before.
    """
    handle, name = -1, ""
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            os.close(handle)
            draft = Path(name)
            write(draft)
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
            draft.chmod(0o644)
            draft.replace(path)
        except BaseException:  # an interrupt, too, leaves no draft
            with suppress(OSError):
                Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a disk's refusal, however a library words it, into one error about `path`.

    Raises:
        OutputError: the disk refused.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, AutocompressError) or not _is_disk_error(error):
            raise
        raise OutputError(
            f"'{path}' must be writable. Got: {error}. Free disk space or choose another folder; "
            "nothing half-written looks whole."
        ) from error


def _is_disk_error(error: Exception) -> bool:
    # safetensors has its own SafetensorError, 'I/O error: …'; tokenizers a plain Exception,
    # 'No space left on device (os error 28)'.
    return isinstance(error, OSError) or "I/O error" in str(error) or "(os error" in str(error)


def write_json(path: Path, content: Any) -> None:
    """Strict JSON (no NaN), written whole or not at all."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"

    def write(draft: Path) -> None:
        draft.write_text(text)

    write_atomically(path, write)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(content: Any) -> str:
    """Digest of a JSON-able value (128 bits, hex)."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def exclusive(path: Path, error: type[AutocompressError], message: str) -> Iterator[None]:
    """Hold the lock file at `path`; the system frees it however the process ends.

    Raises:
        error: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as blocked:
            raise error(message) from blocked
        yield
