"""Ctrl-C: inside a search at the next safe point, elsewhere at once, but never inside an import."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HEARD = (
    "stopping: the step that is under way is finished, then the best so far is scored and written. "
    "Ctrl-C again stops at once, without"
)
DONE = "the search itself is done: its result is being written. Ctrl-C again stops at once, without"

IMPORTS = "<frozen importlib._bootstrap>"  # the file of the frames that import
AGAIN_AFTER = 0.05  # seconds


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler of SIGINT that waits for the end of an import that is under way.

    C++ libraries may abort the process where the exception passes through their initialisation.

    Raises:
        KeyboardInterrupt: nothing is being imported.
    """
    while frame is not None:
        if frame.f_code.co_filename == IMPORTS:
            thread = threading.main_thread().ident
            threading.Timer(AGAIN_AFTER, signal.pthread_kill, [thread, number]).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


class Stopped(Exception):  # noqa: N818
    """The search was asked to end, at a point where nothing is lost."""


class Stop:
    """Whether a search shall end, and where it may.

    Attributes:
        requested: by Ctrl-C.
        searching: whether `check` may end anything: scores of finalists must be finished.
        searched: whether a search has come to its end, or was ended.
        ended: whether one was ended before it was done.
    """

    def __init__(self) -> None:
        self.requested = self.searching = self.searched = self.ended = False

    def check(self) -> None:
        """A safe point.

        Raises:
            Stopped: the search shall end here.
        """
        if self.requested and self.searching:
            raise Stopped

    @contextmanager
    def search(self) -> Iterator[None]:
        """While inside, a safe point may end the search; leaves quietly when one does."""
        self.searching = True
        try:
            yield
        except Stopped:
            self.ended = True
        finally:
            self.searching, self.searched = False, True

    @contextmanager
    def on_interrupt(self, say: Callable[[str], None]) -> Iterator[None]:
        """While inside, the first Ctrl-C asks for an end; the second is what it always is.

        Signals reach the main thread alone: in another, nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def heard(number: int, frame: FrameType | None) -> None:
            if self.requested:
                interrupt(number, frame)
                return
            self.requested = True
            say(DONE if self.searched and not self.searching else HEARD)

        before = signal.signal(signal.SIGINT, heard)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
