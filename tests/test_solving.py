"""A database that workers helped to build holds what one process solves, bit by bit."""

from __future__ import annotations

import json

import pytest
import torch
from jobs import Here, kill_a_worker
from runs import TOKENS, command, finished, write_config
from safetensors.torch import load_file

from autocompress.build import build_database
from autocompress.core import SearchSpace
from autocompress.database import LevelDatabase
from autocompress.levels import parse_level
from autocompress.models import find_layers
from autocompress.operators import Solver

KEYS = ("w2g64", "w4g64", "s50", "r8", "r8+w3g64")


def entries(database):
    """(module, level) -> its error and the bytes of its tensors."""
    files = {name: load_file(database.path / name) for name in database.files}
    return {
        (module, level): (
            entry["error"],
            {
                name: tensor.flatten().view(torch.uint8).numpy().tobytes()
                for name, tensor in files[entry["file"]].items()
                if name.startswith(f"{module}|{level}|")
            },
        )
        for module, row in database.entries.items()
        for level, entry in row.items()
    }


@pytest.mark.parametrize("prefix", ["w4g64", "s50", "dense"])
def test_any_number_of_workers_builds_the_same_entries(tiny, tiny_windows, tmp_path, prefix):
    layers = find_layers(tiny.model, ("blocks", "embedding"))
    space = SearchSpace("test", layers, (tuple(map(parse_level, KEYS)),) * len(layers))
    solver, windows = Solver(), tiny_windows.calibrate[:8]
    found = {}
    for name, size in (("alone", None), ("one", None), ("two", 2), ("five", 5)):
        pool = None if size is None else Here(size)
        database = build_database(
            tiny.model,
            space,
            windows,
            LevelDatabase(tmp_path / name, {}),
            prefix=parse_level(prefix),
            solver=solver,
            pool=pool,
            threads=None if name == "alone" else 1,
        )
        found[name] = entries(database)
        assert all(tensors for _, tensors in found[name].values())
        assert not list(database.path.glob(".*")), "no draft is left"
        assert pool is None or len(pool.jobs) > 5
    assert found["alone"] == found["one"] == found["two"] == found["five"]


def test_a_worker_that_dies_is_replaced(tiny_folder, tmp_path, monkeypatch):
    rounds = kill_a_worker(monkeypatch, 2)
    config = write_config(tmp_path / "config.toml", tiny_folder, TOKENS)
    ran = command("build", "--config", config, "--out", tmp_path / "out", "--workers", 2)
    assert ran.code == 0 and ran.err.count("a worker died") == 1, ran.err
    assert len(rounds) > 2
    monkeypatch.undo()
    before = finished(tiny_folder).with_name("result.run") / "database"
    one, other = (
        LevelDatabase.open(path, identity_of(path))
        for path in (before, tmp_path / "out.run" / "database")
    )
    assert one.identity == other.identity
    assert entries(one) == entries(other)


def identity_of(path):
    return json.loads((path / "manifest.json").read_text())["identity"]
