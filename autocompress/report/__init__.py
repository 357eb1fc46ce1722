"""Writes the report of a search: `report.md` and `report.html` from the facts of its manifest."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from autocompress.files import write_atomically
from autocompress.report.facts import Facts
from autocompress.report.front import render_front
from autocompress.report.html import render_html
from autocompress.report.markdown import render_markdown


def write_report(facts: Facts, out: Path) -> None:
    """Write both forms of the report into `out`, each whole or not at all.

    Args:
        facts: the JSON of `autocompress.json`; missing parts are left out of the report.
        out: folder, created if it is missing.

    Raises:
        OutputError: the folder cannot be written.
    """
    pages = {"report.md": render_markdown(facts), "report.html": render_html(facts)}
    for name, text in pages.items():
        write_atomically(out / name, partial(_write, text))


def write_front_report(facts: Facts, out: Path) -> None:
    """Write the report of a front, `report.html`, into `out`.

    Args:
        facts: the JSON of `front.json`.
        out: folder, created if it is missing.

    Raises:
        OutputError: the folder cannot be written.
    """
    write_atomically(out / "report.html", partial(_write, render_front(facts)))


def _write(text: str, draft: Path) -> None:
    draft.write_text(text, encoding="utf-8")
