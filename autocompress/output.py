"""The output folder: only ours is written to, and its manifest comes last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autocompress.errors import ModelError, OutputError
from autocompress.files import write_json
from autocompress.folders import MANIFEST, MARK, describe_folder
from autocompress.gguf_files import describe_gguf, only_gguf
from autocompress.plans import PLAN, BuildPlan
from autocompress.result import FRONT


def check_output(out: Path) -> None:
    """Check that a result may be written to `out`; touches nothing.

    Raises:
        OutputError: something that autocompress did not write is there.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"--out must be a folder. Got the file '{out}'. Choose another.")
    names = {entry.name for entry in out.iterdir()}
    if names and not names & {MARK, MANIFEST}:
        raise OutputError(
            f"--out must be new, empty or a former result. Got '{out}', which holds "
            f"{sorted(names)[0]} and is not ours. Choose another folder."
        )


def claim_output(out: Path) -> None:
    """Make `out` ours and unfinished: a former result there no longer looks whole.

    Raises:
        OutputError: it is not ours, or the disk refuses.
    """
    check_output(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).touch()
        for whole in (MANIFEST, FRONT):
            (out / whole).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"'{out}' must be writable. Got: {error}. Choose another.") from error


def write_manifest(out: Path, facts: dict[str, Any]) -> None:
    """Write the manifest: from now on the folder is a whole result."""
    write_json(out / MANIFEST, facts)


def is_result(folder: Path) -> bool:
    """Whether a folder is, or means to be, a result of a search: not an export, not of others."""
    if not (folder / MANIFEST).exists():
        return not (folder / "config.json").exists() and only_gguf(folder) is None
    try:
        facts = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return True  # a damaged one
    return not (isinstance(facts, dict) and "export" in facts)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The facts of a result folder.

    Raises:
        ModelError: the folder is no finished result.
    """
    try:
        facts = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"a result folder must hold {MANIFEST}. Got '{folder}': {error}. "
            "Name a folder that `autocompress search` finished."
        ) from error
    if not isinstance(facts, dict) or "results" not in facts:
        raise ModelError(f"'{folder / MANIFEST}' must be a manifest of autocompress. Got another.")
    return facts


def describe(folder: Path) -> dict[str, Any]:
    """What is in a folder, a plan or a GGUF file: a result's manifest, or what its files hold.

    Raises:
        ModelError: neither, half-written or damaged.
    """
    file = only_gguf(folder)
    if file is not None:
        return describe_gguf(file)
    if folder.name == PLAN or (folder / PLAN).exists():
        return describe_plan(folder)
    return read_manifest(folder) if is_result(folder) else describe_folder(folder)


def describe_plan(path: Path) -> dict[str, Any]:
    """What a plan says: `file`, `scope`, `settings` and `plan`, rows of pattern and level.

    Raises:
        ConfigError: not readable.
    """
    plan = BuildPlan.read(path)
    return {
        "file": str(path),
        "scope": list(plan.scope),
        "settings": dict(plan.settings),
        "plan": [{"layers": pattern, "level": str(level)} for pattern, level in plan.levels],
    }
