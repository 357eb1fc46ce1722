"""Runs of the command line on the tiny model, inside the test process."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from autocompress.cli import main

BUDGET = "3.5bits"
TOKENS = {"calibrate": 1024, "search": 512, "validate": 256, "test": 256}
SETTINGS = {
    "dtype": "float32",
    "window": 64,
    "sensitivity_tokens": 128,
    "generations": 2,
    "offspring": 4,
}
CHANGING = ("seconds", "command", "recording", "peak_bytes")  # what two runs may differ in


class Ran(NamedTuple):
    """What a command returned and printed."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


def command(*arguments: object) -> Ran:
    """`autocompress ARGUMENTS` as a shell would run it."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["autocompress", *map(str, arguments)]
    with patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


def write_config(
    path: Path, model: Path, tokens: Mapping[str, int] = TOKENS, **changes: object
) -> Path:
    """A configuration file with small splits: flags cannot set those."""
    values = {"model": str(model), **SETTINGS, **changes}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    sizes = [f"{key} = {value}" for key, value in tokens.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "[tokens]", *sizes, ""]))
    return path


def finished(model: Path) -> Path:
    """A finished search of the tiny model at `BUDGET`, made once per session. Read only.

    `config.toml` stands beside it, its run folder is `result.run`.
    """
    out = model.parent / "finished" / "result"
    if not (out / "autocompress.json").exists():
        config = write_config(out.with_name("config.toml"), model)
        ran = command("search", "--config", config, "--budget", BUDGET, "--out", out)
        assert ran.code == 0, ran.err
    return out


def copied_run(model: Path, to: Path) -> Path:
    """A copy of the finished search's run folder."""
    shutil.copytree(finished(model).with_name("result.run"), to)
    return to


def lasting(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that a second run of the same search must repeat."""
    return {key: value for key, value in facts.items() if key not in CHANGING}


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def allocation_rows(space: Any, allocation: Any, prefix: str) -> list[dict[str, Any]]:
    """The allocation as a manifest lists it."""
    return [
        {
            "layer": layer.name,
            "modules": list(layer.modules),
            "level": str(level),
            "weights": layer.weights,
            "bits": layer.storage_bits(level),
            "prefix": prefix,
        }
        for layer, level in zip(space.layers, allocation.levels, strict=True)
    ]


def promised_bytes(model: Any, space: Any, allocation: Any) -> tuple[int, int]:
    """What layers of a space take by the cost table, and all else in 16 bits."""
    stored = sum(
        layer.storage_bits(level) // 8
        for layer, level in zip(space.layers, allocation.levels, strict=True)
    )
    whole = sum(p.numel() for p in model.parameters()) * 2
    return stored, whole - sum(2 * layer.weights for layer in space.layers)
