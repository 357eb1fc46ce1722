"""Progress on standard error: bars with time left on a terminal, lines elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int, int], None]  # done, total


class Progress(Protocol):
    """Where a long run says what it is doing."""

    def say(self, message: str) -> None:
        """One line."""

    def task(self, what: str) -> AbstractContextManager[Advance]:
        """A context that yields `advance(done, total)`."""


class Silent:
    """Says nothing: the default of the Python API."""

    def say(self, message: str) -> None:
        """Nothing."""

    @contextmanager
    def task(self, what: str) -> Iterator[Advance]:
        """Nothing."""
        yield lambda done, total: None


class Lines:
    """A line at the start, the end and every half minute: for logs."""

    every = 30.0  # seconds

    def say(self, message: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)

    @contextmanager
    def task(self, what: str) -> Iterator[Advance]:
        start = last = time.monotonic()

        def advance(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= self.every and done:
                left = (now - start) * (total - done) / done
                self.say(f"{what}: {done}/{total}, about {left:.0f} s left")
                last = now

        yield advance
        if time.monotonic() - start > 1:
            self.say(f"{what}: done in {time.monotonic() - start:.0f} s")


class Bars:
    """Bars with time left, drawn by rich."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False)

    @contextmanager
    def task(self, what: str) -> Iterator[Advance]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def terminal_progress() -> Progress:
    """Bars on a terminal, lines otherwise."""
    return Bars() if sys.stderr.isatty() else Lines()
