"""The level database: resumable at any moment, never rebuilt, never trusted when damaged."""

import json
import signal
import subprocess
import sys

import pytest
import torch

import autocompress.build
import autocompress.solving
import autocompress.tracing
from autocompress.core import SearchSpace
from autocompress.database import LevelDatabase
from autocompress.errors import DatabaseError
from autocompress.files import exclusive
from autocompress.levels import parse_level
from autocompress.models import find_layers
from autocompress.operators import solve
from autocompress.tracing import input_groups

KEYS = ("w2g64", "w4g64")


def space_of(tiny, keys=KEYS, scope=("blocks", "embedding")):
    layers = find_layers(tiny.model, scope)
    return SearchSpace("test", layers, (tuple(map(parse_level, keys)),) * len(layers))


def contents(path):
    """Name -> bytes of everything the database wrote, its lock aside."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "lock"}


def all_entries(database):
    return {(m, key): e["error"] for m, row in database.entries.items() for key, e in row.items()}


@pytest.fixture
def no_forward(monkeypatch):
    """From here on any forward pass is a failure."""

    def refuse(*args):
        raise AssertionError("the model was run")

    for module in (autocompress.build, autocompress.tracing):
        monkeypatch.setattr(module, "hidden_states", refuse)


@pytest.fixture
def windows(tiny_windows):
    return tiny_windows.calibrate[:8]


@pytest.fixture
def built(tiny, windows, build_levels, tmp_path):
    """A complete database of `space_of(tiny)`."""
    return build_levels(tiny, space_of(tiny), windows, tmp_path / "database")


def test_the_database_holds_every_level_of_every_layer(tiny, built):
    space = space_of(tiny)
    assert set(built.entries) == {layer.name for layer in space.layers}
    for layer in space.layers:
        errors = [built.error(layer.name, level) for level in space.levels[0]]
        assert 1 > errors[0] > errors[1] > 0
        for level in space.levels[0]:
            packed = built.load(layer.name, level)
            assert (packed.level, packed.shape) == (level, layer.shapes[0])
            assert packed.bits == level.storage_bits(layer.shapes[0])
            cached = built.weight(layer.name, level, torch.float32)
            assert torch.equal(cached, packed.dense())


def test_modules_of_one_input_share_a_file(tiny, built):
    groups = input_groups(tiny.model, [layer.name for layer in find_layers(tiny.model)])
    for group in groups:
        assert len({built.entries[name][key]["file"] for name in group for key in KEYS}) == 1
    assert len(built.files) == len(groups) + 1  # and the embedding


def test_a_second_build_does_nothing(tiny, windows, built, build_levels, no_forward):
    before = contents(built.path)
    times = {file.name: file.stat().st_mtime_ns for file in built.path.glob("*.*")}
    again = build_levels(tiny, space_of(tiny), windows, built.path)
    assert contents(built.path) == before
    assert {file.name: file.stat().st_mtime_ns for file in built.path.glob("*.*")} == times
    assert again.entries == built.entries
    with pytest.raises(AssertionError, match="the model was run"):
        build_levels(tiny, space_of(tiny, (*KEYS, "w3g64")), windows, built.path)


def test_a_new_level_is_computed_alone(tiny, windows, built, build_levels, tmp_path, monkeypatch):
    before, solved = contents(built.path), []

    def spy(weights, statistics, levels, solver):
        solved.append([str(level) for level in levels])
        return solve(weights, statistics, levels, solver)

    monkeypatch.setattr(autocompress.solving, "solve", spy)
    wider = space_of(tiny, (*KEYS, "w6g64"))
    extended = build_levels(tiny, wider, windows, built.path)
    assert solved == [["w6g64"]] * len(built.files) == [["w6g64"]] * (len(extended.files) // 2)
    after = contents(built.path)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    at_once = build_levels(tiny, wider, windows, tmp_path / "at once")
    assert all_entries(extended) == pytest.approx(all_entries(at_once), rel=0.02)


KILLED_BUILD = """if True:
    import json, os, signal, sys
    from pathlib import Path
    import numpy as np, torch
    import autocompress.database as database
    from autocompress.build import build_database
    from autocompress.core import SearchSpace
    from autocompress.levels import parse_level
    from autocompress.models import find_layers, load_model
    from autocompress.operators import Solver

    path, fatal, left = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    job = json.loads((path.parent / "job.json").read_text())

    def die_at(moment):
        global left
        left -= moment == fatal
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    save_file, save = database.save_file, database.LevelDatabase._save

    def half_a_file(tensors, draft):
        Path(draft).write_bytes(b"half")
        die_at("in a file")
        save_file(tensors, draft)

    def no_manifest(self):
        die_at("before the manifest")
        save(self)

    database.save_file, database.LevelDatabase._save = half_a_file, no_manifest
    model = load_model(job["model"], torch.float32).model
    layers = find_layers(model, ("blocks", "embedding"))
    space = SearchSpace("test", layers, (tuple(map(parse_level, job["keys"])),) * len(layers))
    opened = database.LevelDatabase.open(path, job["identity"])
    prefix, windows = parse_level(job["identity"]["prefix"]), np.array(job["windows"])
    build_database(model, space, windows, opened, prefix=prefix, solver=Solver())
"""


def test_a_build_killed_twice_ends_like_one_that_was_not(
    tiny, tiny_folder, windows, built, build_levels, tmp_path
):
    job = {"model": str(tiny_folder), "keys": KEYS, "identity": built.identity}
    (tmp_path / "job.json").write_text(json.dumps(job | {"windows": windows.tolist()}))
    path = tmp_path / "killed"
    for moment, count, files in (("in a file", 3, 2), ("before the manifest", 4, 5)):
        child = [sys.executable, "-c", KILLED_BUILD, str(path), moment, str(count)]
        assert subprocess.run(child).returncode == -signal.SIGKILL
        half_built = LevelDatabase.open(path, built.identity)
        half_built.verify()
        assert len(half_built.files) == files
    assert len(contents(path)) == 1 + files + 1, "a file that the manifest does not know"
    build_levels(tiny, space_of(tiny), windows, path)
    assert contents(path) == contents(built.path)


def flip_a_byte(path):
    file = next(path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def lose_a_file(path):
    next(path.glob("*.safetensors")).unlink()


def truncate_the_manifest(path):
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text()[:-200])


def empty_the_manifest(path):
    (path / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, "its checksum differs"),
        (lose_a_file, "the file is gone"),
        (truncate_the_manifest, "manifest of a level database must be readable"),
        (empty_the_manifest, "manifest of a level database must be readable"),
    ],
)
def test_a_damaged_database_is_refused(
    damage, message, tiny, windows, built, build_levels, no_forward
):
    damage(built.path)
    with pytest.raises(DatabaseError, match=message) as error:
        build_levels(tiny, space_of(tiny), windows, built.path)
    assert str(built.path) in str(error.value)
    assert "Delete" in str(error.value)


def test_an_entry_that_cannot_be_read_is_a_database_error(tiny, built):
    layer = space_of(tiny).layers[-1].name
    file = built.path / built.entries[layer]["w4g64"]["file"]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DatabaseError, match=r"must be as it was built.*safetensors"):
        built.load(layer, parse_level("w4g64"))
    with pytest.raises(DatabaseError, match=r"must hold .* at w3g64"):
        built.load(layer, parse_level("w3g64"))


@pytest.mark.parametrize("key", ["model", "calibration", "prefix", "solver", "dtype", "versions"])
def test_a_foreign_database_is_refused_and_what_differs_is_named(built, key):
    with pytest.raises(DatabaseError, match=f"built with another {key}\\."):
        LevelDatabase.open(built.path, built.identity | {key: "other"})


def test_other_windows_or_another_prefix_are_another_database(
    tiny, windows, built, build_levels, no_forward
):
    other = windows.copy()
    other[0, 0] += 1
    for changed in (other, windows[:4], windows.reshape(-1, 32)):
        with pytest.raises(DatabaseError, match="another calibration"):
            build_levels(tiny, space_of(tiny), changed, built.path)
    with pytest.raises(DatabaseError, match="another prefix"):
        build_levels(tiny, space_of(tiny), windows, built.path, parse_level("w2g64"))


def test_two_builders_at_once_are_refused(tiny, windows, built, build_levels):
    with (
        exclusive(built.path / "lock", DatabaseError, "mine"),
        pytest.raises(DatabaseError, match="one process at a time"),
    ):
        build_levels(tiny, space_of(tiny, ("w3g64",)), windows, built.path)
    assert set(contents(built.path)) == {"manifest.json", *built.files}
