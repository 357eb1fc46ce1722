"""Strict reading of TOML tables: unknown keys and wrong types are errors with the nearest name."""

from __future__ import annotations

import difflib
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from autocompress.errors import AutocompressError

Problem = type[AutocompressError]  # the error class the caller's user should see


def read_toml(path: Path, problem: Problem) -> tuple[dict[str, Any], str]:
    """The table and the text of a TOML file.

    Raises:
        AutocompressError: of class `problem`; not readable, not UTF-8 or not TOML (with the line).
    """
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except OSError as error:
        raise problem(
            f"a TOML file must be readable. Got '{path}': {error.strerror}. Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise problem(
            f"'{path}' must be UTF-8. Got {error.reason} at byte {error.start}."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise problem(f"'{path}' must be TOML. Got: {error}.") from error


def check_keys(
    table: Mapping[str, Any], known: Iterable[str], problem: Problem, where: str = ""
) -> None:
    """Check that every key is known.

    Raises:
        AutocompressError: of class `problem`; names the nearest known key.
    """
    known = list(known)
    for key in table:
        if key not in known:
            raise problem(
                f"{where}a key must be one of {', '.join(known)}. "
                f"Got '{key}'.{did_you_mean(key, known)}"
            )


def read_strings(value: Any, key: str, problem: Problem) -> tuple[str, ...]:
    """A list of one or more distinct, non-blank strings.

    Raises:
        AutocompressError: of class `problem`; not such a list.
    """
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise problem(f"'{key}' must be a list of strings that are not blank. Got {value!r}.")
    if not value:
        raise problem(f"'{key}' must hold at least one entry. Got [].")
    if twice := [item for item, count in Counter(value).items() if count > 1]:
        raise problem(f"'{key}' must not repeat an entry. Got '{twice[0]}' twice.")
    return tuple(value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean …?' with the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
