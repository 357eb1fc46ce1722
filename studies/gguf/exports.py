"""Random allocations as GGUF files, read back; encoder types against llama.cpp's quantizer.

    python studies/gguf/exports.py RESULT DATABASE [--count N]

RESULT is a finished search with --runtime gguf, DATABASE the level database of a session whose
levels are drawn from. Every file is decoded by the `gguf` package and compared with the levels'
dense weights; every fortieth is read by transformers, too.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM

from autocompress.database import LevelDatabase
from autocompress.exporters.gguf import write_file
from autocompress.exporters.gguf_base import Rows, read_tensors, rows_of, write_base
from autocompress.exporters.source import Source
from autocompress.levels import Dense, Level, parse_level
from autocompress.packed import Packed

READ_EVERY = 40  # files that transformers reads, too


@dataclass
class Drawn(Source):
    """A result whose packed weights come from a database, at levels that were drawn."""

    database: LevelDatabase | None = None

    def packed(self, name: str) -> Packed:
        """A module's tensors from the database."""
        assert self.database is not None
        return self.database.load(name, self.level(name))


def open_database(path: Path) -> LevelDatabase:
    """A database as it lies on disk, whatever it was built from."""
    identity = json.loads((path / "manifest.json").read_text())["identity"]
    return LevelDatabase.open(path, identity)


def draw(rng: np.random.Generator, source: Source, database: LevelDatabase) -> dict[str, Level]:
    """A level of the database for every module in scope."""
    return {
        name: parse_level(str(rng.choice(sorted(database.entries[name])))) for name in source.scope
    }


def check(source: Source, plans: dict[str, Rows | None], path: Path) -> tuple[int, int]:
    """Tensors in scope that differ from the levels' weights, and bytes beyond the cost table."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    different, stored = 0, 0
    for name, plan in plans.items():
        if plan is None:
            continue
        tensor = tensors[name]
        value = dequantize(tensor.data, tensor.tensor_type)
        value = value.reshape(-1, value.shape[-1])
        expected = np.empty_like(value)
        for module in np.unique(plan.modules):
            here = plan.modules == module
            expected[here] = source.weight(source.scope[module]).numpy()[plan.rows[here]]
        different += not np.array_equal(value, expected)
        stored += int(tensor.n_bytes)
    shapes = {name: source.shape(name) for name in source.scope}
    promised = sum(source.level(name).storage_bits(shapes[name]) // 8 for name in source.scope)
    return different, stored - promised


def read_by_transformers(source: Source, path: Path) -> float:
    """The largest difference of a weight in scope in a fresh model."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return max(
        float((model.get_submodule(name).weight.detach() - source.weight(name)).abs().max())
        for name in source.scope
    )


def main() -> None:
    """Draw, write, read back."""
    parser = argparse.ArgumentParser(description="Random allocations as GGUF files.")
    parser.add_argument("result", type=Path)
    parser.add_argument("database", type=Path)
    parser.add_argument("--count", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    result, database = Source.open(given.result), open_database(given.database)
    rng = np.random.default_rng(0)
    different, beyond, largest, sizes = 0, 0, 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        base, path = write_base(result, result.scope, Path(folder)), Path(folder) / "model.gguf"
        widths = [result.shape(name)[1] for name in result.scope]
        plans = {n: rows_of(array, widths) for n, array in read_tensors(GGUFReader(base))}
        for number in range(given.count):
            levels = draw(rng, result, database)
            packed = {name: level for name, level in levels.items() if not isinstance(level, Dense)}
            drawn = Drawn(**{**vars_of(result), "levels": packed}, database=database)
            write_file(drawn, base, path)
            wrong, more = check(drawn, plans, path)
            different, beyond = different + wrong, beyond + (more != 0)
            sizes.append(path.stat().st_size)
            if number % READ_EVERY == 0:
                largest = max(largest, read_by_transformers(drawn, path))
    facts = {
        "files": given.count,
        "smallest_bytes": min(sizes),
        "largest_bytes": max(sizes),
        "tensors_that_differ": different,
        "files_of_other_size": beyond,
        "read_by_transformers": len(range(0, given.count, READ_EVERY)),
        "largest_difference": largest,
    }
    print(json.dumps(facts, indent=1))


def vars_of(source: Source) -> dict[str, Any]:
    """A source's own fields."""
    return {name: getattr(source, name) for name in Source.__dataclass_fields__}


if __name__ == "__main__":
    main()
