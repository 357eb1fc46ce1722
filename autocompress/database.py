"""The level database: every layer compressed at every level, once, resumable at any moment."""

from __future__ import annotations

import importlib.metadata
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autocompress.errors import DatabaseError
from autocompress.files import fingerprint, sha256, write_atomically, write_json
from autocompress.levels import GgufType, Level
from autocompress.memory import memory_free, memory_limit
from autocompress.operators import Solution, Solver
from autocompress.packed import Packed

FORMAT = 2
ROWS = "error"  # in place of a tensor's name: mean squared error of every output
KEPT = "kept"  # and which inputs or outputs a narrower weight keeps


def cache_bytes() -> int:
    """For dense weights: a quarter of the memory, and at most half of what is free.

    All 9 levels of the default model are 1.9 GB in bf16, 3.8 in float32.
    """
    return min(memory_limit() // 4, memory_free() // 2)


@dataclass(frozen=True)
class Written:
    """A file of solutions that the manifest does not know yet.

    Args:
        file: its name.
        errors: module -> level key -> relative squared output error.
        shapes: module -> (out, in).
        seconds: level key -> wall time.
    """

    file: str
    sha256: str
    errors: dict[str, dict[str, float]]
    shapes: dict[str, tuple[int, int]]
    seconds: dict[str, float]


@dataclass
class LevelDatabase:
    """Packed weights of every (module, level) on disk.

    Args:
        path: folder with manifest.json and one safetensors file per solved group.
        identity: what the entries depend on: model, calibration, solver, prefix, versions.
        entries: module -> level key -> {'file', 'error'}.
        files: file name -> sha256.
        shapes: module -> (out, in).
        seconds: level key -> wall time that its entries took in this process; not stored, so that
            a database that was built in parts is the same database.
        room: bytes of dense weights kept in memory at most.
    """

    path: Path
    identity: dict[str, Any]
    entries: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cache: OrderedDict[tuple[str, str, torch.dtype], Tensor] = field(default_factory=OrderedDict)
    cached: int = 0  # bytes in `cache`
    room: int = field(default_factory=cache_bytes)

    def __contains__(self, key: tuple[str, Level]) -> bool:
        module, level = key
        return str(level) in self.entries.get(module, {})

    def error(self, module: str, level: Level) -> float:
        """Relative squared output error of a module at a level on calibration inputs."""
        return float(self.entries[module][str(level)]["error"]) if (module, level) in self else 0.0

    def load(self, module: str, level: Level) -> Packed:
        """The stored form of one entry.

        Raises:
            DatabaseError: the entry is missing or its file is damaged.
        """
        tensors = self._read(module, level, lambda part: part != ROWS)
        kept = tensors.pop(KEPT, None)
        return Packed(level, self.shapes[module], tensors, kept)

    def kept(self, module: str, level: Level) -> Tensor:  # (in,) or (out,), bool
        """Which inputs or outputs a narrower weight keeps.

        Raises:
            DatabaseError: the entry is missing or its file is damaged.
        """
        return self._read(module, level, lambda part: part == KEPT)[KEPT]

    def row_errors(self, module: str, level: Level) -> Tensor:  # (out,), float32
        """Mean squared error of every output of a module at a level on calibration inputs.

        Raises:
            DatabaseError: the entry is missing or its file is damaged.
        """
        return self._read(module, level, lambda part: part == ROWS)[ROWS]

    def _read(self, module: str, level: Level, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """The tensors of an entry whose names are wanted."""
        if (module, level) not in self:
            raise DatabaseError(f"the database must hold {module} at {level}. Got none. Build it.")
        name = self.entries[module][str(level)]["file"]
        prefix = f"{module}|{level}|"
        try:
            with safe_open(self.path / name, "pt") as file:
                parts = [k.removeprefix(prefix) for k in file.keys() if k.startswith(prefix)]
                return {part: file.get_tensor(prefix + part) for part in filter(wanted, parts)}
        except (OSError, SafetensorError) as error:
            raise self._damaged(name, str(error)) from error

    def weight(self, module: str, level: Level, dtype: torch.dtype) -> Tensor:  # (out, in)
        """The dense weight of an entry, from memory while the cache's limit allows."""
        key = (module, str(level), dtype)
        if key in self.cache:
            self.cache.move_to_end(key)
            return self.cache[key]
        made = self.load(module, level).dense().to(dtype)
        self.cache[key] = made
        self.cached += made.nbytes
        while self.cached > self.room and len(self.cache) > 1:
            self.cached -= self.cache.popitem(last=False)[1].nbytes
        return made

    def verify(self) -> None:
        """Check every file against its recorded checksum.

        Raises:
            DatabaseError: a file is missing or changed.
        """
        for name, digest in self.files.items():
            if not (self.path / name).exists():
                raise self._damaged(name, "the file is gone")
            if sha256(self.path / name) != digest:
                raise self._damaged(name, "its checksum differs")

    def remove_drafts(self) -> None:
        """Delete what a killed build was just writing."""
        for name in (".*.safetensors.*", ".manifest.json.*"):
            for draft in self.path.glob(name):
                draft.unlink()

    def _damaged(self, name: str, why: str) -> DatabaseError:
        return DatabaseError(
            f"the level database must be as it was built. Got '{self.path / name}': {why}. "
            f"Delete '{self.path}' to build it again."
        )

    def bytes(self) -> int:
        """Size of all files."""
        return sum(f.stat().st_size for f in self.path.iterdir())

    def enter(self, written: Written) -> None:
        """Enter a file that was written in the manifest, atomically."""
        self.files[written.file] = written.sha256
        for module, errors in written.errors.items():
            for level, error in errors.items():
                entry = {"file": written.file, "error": error}
                self.entries.setdefault(module, {})[level] = entry
        self.shapes |= written.shapes
        for level, spent in written.seconds.items():
            self.seconds[level] = self.seconds.get(level, 0.0) + spent
        self._save()

    def _save(self) -> None:
        content = {
            "format": FORMAT,
            "identity": self.identity,
            "files": self.files,
            "shapes": self.shapes,
            "entries": self.entries,
        }
        write_json(self.path / "manifest.json", content)

    @classmethod
    def open(cls, path: Path, identity: dict[str, Any]) -> LevelDatabase:
        """The database at `path`, empty if there is none.

        Raises:
            DatabaseError: it is damaged, or belongs to another model, data or solver.
        """
        manifest = path / "manifest.json"
        if not manifest.exists():
            return cls(path, identity)
        try:
            content = json.loads(manifest.read_text())
            found = content["identity"]
            database = cls(path, identity, content["entries"], content["files"])
            database.shapes = {k: (v[0], v[1]) for k, v in content["shapes"].items()}
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DatabaseError(
                f"the manifest of a level database must be readable. Got '{manifest}': {error}. "
                f"Delete '{path}' to build it again."
            ) from error
        differing = sorted(_differing(found, identity))
        if differing or content.get("format") != FORMAT:
            raise DatabaseError(
                f"a level database must belong to this model, data and solver. Got '{path}', built "
                f"with another {', '.join(differing) or 'format'}. Choose another --run."
            )
        return database


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Names of what differs between two identities; what is in a table follows its name."""
    for name in found.keys() | wanted.keys():
        before, now = found.get(name, "none"), wanted.get(name, "none")
        if isinstance(before, dict) and isinstance(now, dict):
            yield from (f"{name} {part}" for part in _differing(before, now))
        elif before != now:
            yield name


def write_solutions(
    path: Path, solutions: Mapping[tuple[str, Level], Solution], seconds: dict[str, float]
) -> Written:
    """Write (module, level) -> solution to one file, whole or not at all.

    Raises:
        OutputError: the disk refused.
    """
    tensors = {
        f"{module}|{level}|{part}": tensor.contiguous()
        for (module, level), solution in solutions.items()
        for part, tensor in _parts(solution).items()
    }
    write_atomically(path, lambda draft: save_file(tensors, draft))
    errors: dict[str, dict[str, float]] = {}
    for (module, level), solution in solutions.items():
        errors.setdefault(module, {})[str(level)] = solution.error
    shapes = {module: solution.packed.shape for (module, _), solution in solutions.items()}
    return Written(path.name, sha256(path), errors, shapes, seconds)


def _parts(solution: Solution) -> dict[str, Tensor]:
    """Everything that is kept of a solution."""
    kept = solution.packed.kept
    more = {ROWS: solution.rows} if kept is None else {ROWS: solution.rows, KEPT: kept}
    return {**solution.packed.tensors, **more}


def database_identity(
    model_fingerprint: str,
    windows: np.ndarray,
    prefix: Level,
    solver: Solver,
    dtype: str,
    levels: Iterable[Level] = (),
) -> dict[str, Any]:
    """Everything that an entry's bytes depend on.

    Args:
        levels: of the entries; some depend on more than others.
    """
    tokens = np.ascontiguousarray(windows, dtype=np.int64)
    families = {type(level) for level in levels}
    packages = ("torch", "transformers", *(("libgguf",) if GgufType in families else ()))
    versions = {p: importlib.metadata.version(p) for p in packages if find_spec(p)}
    return {
        "model": model_fingerprint,
        "calibration": fingerprint([list(tokens.shape), tokens.tolist()]),
        "prefix": str(prefix),
        "solver": solver.identity(families),
        "dtype": dtype,
        "versions": versions,
    }
