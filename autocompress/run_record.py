"""What a run folder remembers of its searches: settings, model and space, as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from autocompress.config import StudyConfig, read_settings
from autocompress.core import CostTable, Layer, SearchSpace
from autocompress.errors import ConfigError, StudyError
from autocompress.files import write_json
from autocompress.levels import Level, Role, parse_level
from autocompress.optuna_storage import masked

RECORD = "run.json"
FORMAT = 1
AIMS = ("budgets", "pareto")  # settings that say what is searched for
MACHINE = ("run", "workers", "worker_threads", "backend", "scheduler")  # where, not what: forgotten
MINIMIZE = "minimize"  # goes with an aim: another one does not inherit it
PATHS = ("model", "space", "calibration", "target", "storage", "out")  # that may be paths

Record = Mapping[str, Any]


def write_record(
    config: StudyConfig,
    space: SearchSpace,
    costs: Sequence[CostTable],
    model: Record,
    windows: str,
    study: str,
) -> None:
    """Remember a search, so that `--run` alone goes on from it.

    Args:
        space: of the run folder: all levels that its database has.
        costs: of its trials.
        model: facts of the dense model.
        windows: fingerprint of the text.
        study: name of the Optuna study.
    """
    settings = {
        name: _plain(name, value)
        for name, value in asdict(config).items()
        if value is not None and name not in MACHINE
    }
    rows = zip(space.layers, space.levels, strict=True)
    layers = [_layer(layer, levels) for layer, levels in rows]
    record = {
        "format": FORMAT,
        "settings": settings,
        "model": model,
        "space": {"name": space.name, "layers": layers},
        "costs": [_table(table) for table in costs],
        "windows": windows,
        "study": study,
    }
    write_json(config.run_folder / RECORD, record)


def _layer(layer: Layer, levels: Sequence[Level]) -> dict[str, Any]:
    """A layer and its levels; sets are sorted lists."""
    roles = [
        {name: sorted(it) if isinstance(it, frozenset) else it for name, it in asdict(role).items()}
        for role in layer.roles
    ]
    return {**asdict(layer), "roles": roles, "levels": list(map(str, levels))}


def _read_layer(row: Mapping[str, Any]) -> Layer:
    roles = (
        Role(
            role["writes"],
            frozenset(role["readers"]),
            frozenset(role["feeders"]),
            role.get("channels", 1),
        )
        for role in row["roles"]
    )
    shapes = tuple((int(rows), int(width)) for rows, width in row["shapes"])
    return Layer(row["name"], tuple(row["modules"]), shapes, tuple(roles))


def _table(table: CostTable) -> dict[str, Any]:
    entries = [
        {str(level): cost if math.isfinite(cost) else None for level, cost in row.items()}
        for row in table.entries
    ]
    return {"name": table.name, "unit": table.unit, "base": table.base, "entries": entries}


def _plain(name: str, value: Any) -> Any:
    """A setting as JSON; a path is absolute, so that it is found from anywhere."""
    if name in PATHS and ("/" in str(value) or Path(value).exists() or name == "out"):
        known = Path(value).expanduser()
        if "://" not in str(value) and (known.exists() or name in ("out", "storage")):
            return str(known.absolute())
    return masked(value) if name == "storage" else value


def find_run(path: Path) -> Path:
    """The run folder that `path` names: itself, or the one beside a result.

    Where neither is one, `read_record` says so.
    """
    beside = path.with_name(f"{path.name}.run")
    return beside if not (path / RECORD).exists() and (beside / RECORD).exists() else path


def read_record(run: Path) -> dict[str, Any]:
    """What a run folder remembers.

    Raises:
        StudyError: nothing, something damaged, or what a newer version wrote.
    """
    path = run / RECORD
    try:
        record = dict(json.loads(path.read_bytes()))
        known = int(record["format"])
    except FileNotFoundError as error:
        raise StudyError(
            f"a run folder must hold {RECORD}. Got '{run}', which does not. Name the folder of "
            "a search that has begun, OUT.run unless --run named another."
        ) from error
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise StudyError(f"'{path}' must be JSON with a format. Got: {error}.") from error
    check_format(path, known, FORMAT)
    return record


def check_format(path: Path, got: int, newest: int) -> None:
    """Check that this version can read a file.

    Raises:
        StudyError: a newer version wrote it.
    """
    if got > newest:
        raise StudyError(
            f"a run folder must be of this version of autocompress or an earlier one. Got "
            f"'{path}' in format {got}; {newest} is the newest that this version knows. Upgrade "
            "autocompress, or use another folder."
        )


def recorded_space(record: Record) -> SearchSpace:
    """The space of a run folder.

    Raises:
        StudyError: the record is damaged.
    """
    try:
        space = record["space"]
        layers = tuple(map(_read_layer, space["layers"]))
        levels = tuple(tuple(map(parse_level, row["levels"])) for row in space["layers"])
        return SearchSpace(space["name"], layers, levels)
    except (KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{RECORD} must hold the run's space. Got: {error}. Delete it.") from error


def recorded_costs(record: Record) -> tuple[CostTable, ...]:
    """The cost tables of a run folder's trials.

    Raises:
        StudyError: the record is damaged.
    """
    try:
        return tuple(
            CostTable(
                table["name"],
                table["unit"],
                table["base"],
                tuple(
                    {parse_level(k): math.inf if v is None else v for k, v in row.items()}
                    for row in table["entries"]
                ),
            )
            for table in record["costs"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{RECORD} must hold the run's costs. Got: {error}. Delete it.") from error


def recorded_study(run: Path) -> str | None:
    """Name of a run folder's Optuna study; None where no search has begun."""
    return str(read_record(run)["study"]) if (run / RECORD).exists() else None


def known_space(run: Path, space: SearchSpace) -> SearchSpace:
    """The run folder's space where `space` is a part of it, so that all it knows stays known."""
    if not (run / RECORD).exists():
        return space
    before = recorded_space(read_record(run))
    if before.layers != space.layers:
        return space
    pairs = zip(space.levels, before.levels, strict=True)
    return before if all(set(levels) <= set(known) for levels, known in pairs) else space


def recalled(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run folder's last search, with those of `given` in their place.

    A search for other budgets gets a folder of its own beside the run folder, unless `out` is
    given, and spends a part of what the first one did, unless an effort is given: the rest of what
    that paid for is known.

    Args:
        given: fields of `StudyConfig`, typed; without a `run` that remembers they are returned.

    Raises:
        StudyError: the run folder cannot be read, or was written by a newer version.
        ConfigError: the storage it used needs a password, which is never kept.
    """
    run = given.get("run")
    if run is None or not (Path(run) / RECORD).exists():
        return dict(given)
    where = f"{Path(run) / RECORD}: "
    known = {field.name for field in fields(StudyConfig)}
    settings = read_record(Path(run)).get("settings", {})
    before = read_settings({k: v for k, v in settings.items() if k in known}, where)
    if "***@" in str(before.get("storage", "")) and "storage" not in given:
        raise ConfigError(
            f"--storage must be given again, because passwords are not kept. Got none; it was "
            f"'{before['storage']}'."
        )
    aims = {name: given[name] for name in AIMS if given.get(name)}
    if aims and aims != {name: before[name] for name in AIMS if before.get(name)}:
        before["out"] = _beside(Path(run), aims)
        before["warm"] = before.get("warm") or StudyConfig(**before).full_tokens
    if aims:
        before = {name: it for name, it in before.items() if name not in (*AIMS, MINIMIZE)}
    if "effort" in given or "spend" in given:  # which stand in place of each other
        before = {k: v for k, v in before.items() if k not in ("effort", "spend", "warm")}
    return {**before, **given}


def _beside(run: Path, aims: Mapping[str, Any]) -> Path:
    """'results/qwen-3.0bits' beside 'results/qwen.run'."""
    texts = [*aims.get("budgets", ()), *filter(None, [aims.get("pareto")])]
    words = [re.sub(r"[^\w.=]+", "-", text.strip().replace("..", "-")) for text in texts]
    stem = run.name.removesuffix(".run") or run.name
    return run.with_name("-".join([stem, *words]))
