"""The latency store: what was measured on one machine, in one file that knows which machine."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from autocompress.errors import LatencyError
from autocompress.files import fingerprint, write_json
from autocompress.levels import Shape

FORMAT = 1

Identity = Mapping[str, Any]  # what timings depend on: hardware, threads, versions


@dataclass(frozen=True, slots=True)
class Point:
    """One thing that can be timed: a weight of `shape` at `level`, times `rows` inputs.

    Args:
        backend: 'native', 'aten', 'dense', 'dequantize'.
        level: its key; 'dense' is the reference that others are compared with.
        shape: (out, in).
        rows: of the input, M.
        mode: activations inside the kernel: 'a8', 'a16', 'a32'.
    """

    backend: str
    level: str
    shape: Shape
    rows: int
    mode: str

    @property
    def key(self) -> str:
        """'native w4g64 576x1536 m1 a8'."""
        rows, width = self.shape
        return f"{self.backend} {self.level} {rows}x{width} m{self.rows} {self.mode}"


@dataclass(frozen=True, slots=True)
class Timing:
    """One point's measured time, weights cold.

    Args:
        us: median time of a call, µs: `ratio` times the reference's median time.
        ratio: median over rounds of time / time of the reference in the same round.
        low: lower end of the ratio's 95 % interval.
        high: upper end.
        rounds: samples, one per round.
        bytes: that one call reads of the packed weight.
        cpu_us: median CPU time of a call, µs, all threads of the process.
        noisy: the interval stayed wide, or other processes took the CPU.
    """

    us: float
    ratio: float
    low: float
    high: float
    rounds: int
    bytes: int
    cpu_us: float
    noisy: bool

    @property
    def gb_per_s(self) -> float:
        """Weight bytes per second, in 10**9."""
        return self.bytes / self.us / 1e3


@dataclass(frozen=True, slots=True)
class ModelPart:
    """One model's measured latency at one target, and what the table does not explain of it.

    Args:
        fixed_ms: per token, outside the table; may be negative where calls overlap.
        scale: that the table's sums are multiplied with; weights in a model may be warmer than
            the profiler's.
        dense_ms: of the dense model in bfloat16, per token; None if it was not measured.
        spread: largest relative difference of prediction and measurement among the references.
        calibration: measured / predicted of the last searched models; multiplies predictions.
        decoder: that ran it.
        references: predicted table sum and measured latency of each, ms per token.
    """

    fixed_ms: float
    scale: float
    dense_ms: float | None
    spread: float
    calibration: float = 1.0
    decoder: str = ""
    references: tuple[tuple[float, float], ...] = ()


@dataclass
class LatencyStore:
    """Timings of one machine under one setting.

    Args:
        path: its JSON file.
        identity: hardware, threads, versions; a store is only good for its own.
        timings: `Point.key` -> timing.
        models: model and target fingerprint -> part.
    """

    path: Path
    identity: dict[str, Any]
    timings: dict[str, Timing] = field(default_factory=dict)
    models: dict[str, ModelPart] = field(default_factory=dict)

    def save(self) -> None:
        """Write the file, whole or not at all.

        Raises:
            OutputError: the disk refused.
        """
        write_json(self.path, _sealed(self))

    def export(self, path: Path) -> None:
        """Write a copy for another machine to search with (`--target path.json`).

        Raises:
            LatencyError: the name does not end in '.json'.
            OutputError: the disk refused.
        """
        if path.suffix != ".json":
            raise LatencyError(f"an exported store must end in '.json'. Got '{path}'.")
        write_json(path, _sealed(self))

    def take(self, other: LatencyStore) -> None:
        """Take in what another store of the same identity knows; it wins where both know.

        Raises:
            LatencyError: the other's identity differs; says where.
        """
        check_identity(other, self.identity)
        self.timings |= other.timings
        self.models |= other.models

    @classmethod
    def read(cls, path: Path) -> Self:
        """The store in a file.

        Raises:
            LatencyError: not readable, not a store, of another format, or changed by hand.
        """
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']}, not {FORMAT}")
            if content["checksum"] != _checksum(content):
                raise ValueError("its checksum differs: it was edited or damaged")
            store = cls(path, dict(content["identity"]))
            store.timings = {k: _timing(v) for k, v in content["timings"].items()}
            store.models = {k: _part(v) for k, v in content["models"].items()}
        except OSError as error:
            raise LatencyError(
                f"a latency store must be readable. Got '{path}': {error.strerror}. "
                "Export one: autocompress profile --export FILE."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise LatencyError(
                f"a latency store must be as autocompress wrote it. Got '{path}': {why}. "
                "Delete it and measure again: autocompress profile."
            ) from error
        return store

    @classmethod
    def open(cls, identity: Identity, folder: Path | None = None) -> Self:
        """The store of this machine, empty if nothing was measured yet.

        Args:
            identity: of this machine; names the file.
            folder: of all stores; default `store_folder()`.

        Raises:
            LatencyError: the file is damaged or holds another machine's timings.
        """
        path = (folder or store_folder()) / f"{fingerprint(identity)}.json"
        if not path.exists():
            return cls(path, dict(identity))
        store = cls.read(path)
        check_identity(store, identity)
        return store


def store_folder() -> Path:
    """Where this user's stores are: below `$AUTOCOMPRESS_CACHE` or the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "autocompress"
    return Path(os.environ.get("AUTOCOMPRESS_CACHE", default)) / "latency"


def check_identity(store: LatencyStore, expected: Identity) -> None:
    """Check that a store was measured on the machine and under the settings that are expected.

    Raises:
        LatencyError: it was not; says what differs.
    """
    names = sorted({*store.identity, *expected})
    differing = [
        f"{name} {store.identity.get(name)!r} instead of {expected.get(name)!r}"
        for name in names
        if store.identity.get(name) != expected.get(name)
    ]
    if differing:
        raise LatencyError(
            f"a latency store must be of this machine and its versions. Got '{store.path}' with "
            f"{'; '.join(differing)}. To search for that machine, name the file: --target FILE."
        )


def _sealed(store: LatencyStore) -> dict[str, Any]:
    content = {
        "format": FORMAT,
        "identity": store.identity,
        "timings": {key: asdict(timing) for key, timing in sorted(store.timings.items())},
        "models": {key: asdict(part) for key, part in sorted(store.models.items())},
    }
    return {**content, "checksum": _checksum(content)}


def _checksum(content: Mapping[str, Any]) -> str:
    """Of everything but itself, as a reader of the file will see it."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return fingerprint(json.loads(json.dumps(rest)))


def _timing(row: Mapping[str, Any]) -> Timing:
    timing = Timing(**_known(row, Timing))
    numbers = (timing.us, timing.ratio, timing.low, timing.high)
    if not all(math.isfinite(value) and value > 0 for value in numbers):
        raise ValueError(f"a timing must be positive and finite, not {numbers}")
    return timing


def _part(row: Mapping[str, Any]) -> ModelPart:
    part = ModelPart(**_known(row, ModelPart))
    numbers = (part.fixed_ms, part.scale, part.spread, part.calibration)
    if not all(math.isfinite(value) for value in numbers) or min(part.scale, part.calibration) <= 0:
        raise ValueError(f"a model's latency must be finite, not {numbers}")
    return part


def _known(row: Mapping[str, Any], family: Any) -> dict[str, Any]:
    """A row with exactly the fields of a dataclass; lists become tuples."""
    names = {entry.name for entry in fields(family)}
    if set(row) != names:
        raise ValueError(f"{family.__name__} must have {', '.join(sorted(names ^ set(row)))}")
    return {
        key: tuple(map(tuple, value)) if isinstance(value, list) else value
        for key, value in row.items()
    }
