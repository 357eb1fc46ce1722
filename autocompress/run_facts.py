"""The facts that a run folder began with: what was recorded under others is not continued."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autocompress.errors import StudyError
from autocompress.files import write_json
from autocompress.jsonl import Row
from autocompress.run_record import check_format

FACTS = "study.json"


def check_facts(path: Path, table: str, facts: Row) -> None:
    """Compare with the facts of the first run, or write them when this is it.

    Args:
        path: the run folder.
        table: file in it that is only valid under these facts.

    Raises:
        StudyError: they are others, damaged, or missing beside the table.
    """
    file = path / FACTS
    if not file.exists():
        if (path / table).exists() and (path / table).stat().st_size:
            raise StudyError(f"'{path}' must have {FACTS} beside {table}. Use another folder.")
        return write_json(file, facts)
    try:
        before = dict(json.loads(file.read_bytes()))
    except (TypeError, ValueError) as error:
        raise StudyError(f"'{file}' must be JSON. Got: {error}. Use another folder.") from error
    check_format(file, int(before.get("format") or 0), int(facts["format"]))
    other = sorted(key for key in before.keys() | facts.keys() if before.get(key) != facts.get(key))
    if other:
        changes = "; ".join(_changes(before, facts))
        raise StudyError(
            f"a study must continue with the facts it began with. Got other {', '.join(other)} "
            f"in '{path}' ({changes}). Use another folder, or the former settings."
        )
    return None


def _changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs between two values, a part of a table for itself."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _changes(before.get(key), now.get(key), f"{name} {key}".strip())
    elif before != now:
        long = isinstance(before, list) or isinstance(now, list)
        yield f"other {name}" if long else f"{name} {before!r} is now {now!r}"
