"""Ctrl-C outside of a search."""

from __future__ import annotations

import importlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autocompress.interrupt import AGAIN_AFTER, Stop, interrupt

LIBRARY = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
    whole = True
except KeyboardInterrupt:
    whole = False  # and not the end of pytest
"""


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, interrupt)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A library during whose import Ctrl-C comes."""
    (tmp_path / "interrupted_library.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "interrupted_library", raising=False)
    return "interrupted_library"


def test_ctrl_c_is_heard_at_once():
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_waits_for_the_end_of_an_import(module: str):
    assert importlib.import_module(module).whole
    with pytest.raises(KeyboardInterrupt):
        time.sleep(100 * AGAIN_AFTER)


def test_a_second_ctrl_c_in_a_search_waits_for_the_end_of_an_import(module: str):
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt), Stop().on_interrupt(said.append):
        signal.raise_signal(signal.SIGINT)
        assert importlib.import_module(module).whole
        time.sleep(100 * AGAIN_AFTER)
    assert len(said) == 1
