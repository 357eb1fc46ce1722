"""Jobs that tests give to workers, which must find them by name."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def square(number: int) -> tuple[int, int]:
    """The square, and who computed it."""
    return number * number, os.getpid()


def die_once(marker: Path, number: int) -> int:
    """Kills its process the first time, whoever is asked."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return number
    os.kill(os.getpid(), signal.SIGKILL)
    return -1


def die(number: int) -> None:
    """Kills its process."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number: int) -> None:
    """Fails as a job may, which no other worker mends."""
    raise ValueError(f"job {number} is wrong")
