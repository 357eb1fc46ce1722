import json
from dataclasses import replace
from pathlib import Path

import pytest

from autocompress.errors import LatencyError, OutputError
from autocompress.latency_store import (
    LatencyStore,
    ModelPart,
    Point,
    Timing,
    check_identity,
    store_folder,
)

HERE = {"cpu": "A", "threads": 2, "kernels": {"native": "1 avx2"}}
POINT = Point("native", "w4g64", (576, 1536), 1, "a8")
TIMING = Timing(20.0, 0.1, 0.09, 0.11, 7, 500_000, 19.0, False)
PART = ModelPart(2.5, 1.01, 50.0, 0.02, 0.99, "lean", ((3.0, 5.5), (6.0, 8.6)))


@pytest.fixture
def store(tmp_path):
    made = LatencyStore.open(HERE, tmp_path)
    made.timings[POINT.key] = TIMING
    made.models["m"] = PART
    made.save()
    return made


def edited(path: Path, change) -> Path:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_what_is_saved_is_read(store, tmp_path):
    again = LatencyStore.open(HERE, tmp_path)
    assert (again.timings, again.models) == (store.timings, store.models)
    assert again.timings[POINT.key].gb_per_s == 25.0
    assert again.identity == HERE


def test_every_identity_has_its_own_file(store, tmp_path):
    other = LatencyStore.open({**HERE, "threads": 1}, tmp_path)
    assert other.path != store.path and not other.timings


def test_the_folder_is_below_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path))
    assert store_folder() == tmp_path / "latency"
    monkeypatch.delenv("AUTOCOMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store_folder() == tmp_path / "xdg" / "autocompress" / "latency"


def set_us(content):
    content["timings"][POINT.key]["us"] = 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_us, "checksum differs: it was edited"),
        (lambda c: c["identity"].update(cpu="B"), "checksum differs"),
        (lambda c: c["models"]["m"].update(fixed_ms=0), "checksum differs"),
        (lambda c: c.update(extra=1), "checksum differs"),
        (lambda c: c.update(checksum="0"), "checksum differs"),
        (lambda c: c.pop("checksum"), "'checksum' is missing"),
        (lambda c: c.update(format=2), "its format is 2, not 1"),
    ],
)
def test_a_store_that_was_edited_by_hand(store, tmp_path, change, words):
    edited(store.path, change)
    with pytest.raises(LatencyError, match=words) as error:
        LatencyStore.open(HERE, tmp_path)
    assert str(store.path) in str(error.value) and "measure again" in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "1", "null", '{"format": 1}', '"x"', "\x00", "[" * 100_000]
)
def test_a_file_that_is_no_store(tmp_path, text):
    path = tmp_path / "store.json"
    path.write_text(text)
    with pytest.raises(LatencyError, match="must be as autocompress wrote it"):
        LatencyStore.read(path)


@pytest.mark.parametrize(
    "timing",
    [
        replace(TIMING, us=0.0),
        replace(TIMING, ratio=-1.0),
        replace(TIMING, low=0.0),
    ],
)
def test_timings_that_are_no_times(store, timing):
    """With a right checksum, too: the numbers themselves are checked."""
    store.timings[POINT.key] = timing
    store.save()
    with pytest.raises(LatencyError, match="positive and finite"):
        LatencyStore.read(store.path)


def test_a_model_part_that_is_no_latency(store):
    store.models["m"] = replace(PART, calibration=0.0)
    store.save()
    with pytest.raises(LatencyError, match="must be finite"):
        LatencyStore.read(store.path)


def test_a_missing_store(tmp_path):
    with pytest.raises(LatencyError, match=r"must be readable.*profile --export"):
        LatencyStore.read(tmp_path / "none.json")
    with pytest.raises(LatencyError, match="must be readable"):
        LatencyStore.read(tmp_path)


def test_another_machine_is_refused_and_named(store, tmp_path):
    other = LatencyStore.open({**HERE, "cpu": "B", "threads": 1}, tmp_path)
    other.path.write_bytes(store.path.read_bytes())  # a cache copied by hand
    with pytest.raises(LatencyError) as error:
        LatencyStore.open({**HERE, "cpu": "B", "threads": 1}, tmp_path)
    assert "cpu 'A' instead of 'B'; threads 2 instead of 1" in str(error.value)
    assert "--target FILE" in str(error.value) and "kernels" not in str(error.value)
    with pytest.raises(LatencyError, match="nothing None instead of 1"):
        check_identity(store, {**HERE, "nothing": 1})


def test_export_and_import(store, tmp_path):
    store.export(tmp_path / "copy.json")
    copied = LatencyStore.read(tmp_path / "copy.json")
    fresh = LatencyStore.open(HERE, tmp_path / "elsewhere")
    fresh.take(copied)
    assert (fresh.timings, fresh.models) == (store.timings, store.models)
    with pytest.raises(LatencyError, match=r"must end in '\.json'"):
        store.export(tmp_path / "copy.txt")
    foreign = LatencyStore.open({**HERE, "cpu": "B"}, tmp_path)
    with pytest.raises(LatencyError, match="cpu 'A' instead of 'B'"):
        foreign.take(copied)


def test_a_disk_that_refuses_leaves_the_former_store(store, tmp_path, monkeypatch):
    before = store.path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OutputError, match="must be writable"):
        store.save()
    assert store.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [store.path.name]
