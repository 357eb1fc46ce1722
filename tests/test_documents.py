"""Text sources -> documents, and the sizes of splits."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.documents import SplitTokens, read_documents, split_text
from autocompress.errors import CalibrationError


def test_default_text_is_one_document_per_topic() -> None:
    from pydoc_data.topics import topics

    assert sorted(read_documents(None)) == sorted(topics.values())


def test_text_file_is_cut_at_double_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n \n\n".join(f"chapter {i}\n\nstill {i}" for i in range(9)))
    assert read_documents(str(path)) == [f"chapter {i}\n\nstill {i}" for i in range(9)]


@given(st.text(alphabet="ab é\n", max_size=300), st.integers(1, 150))
@settings(max_examples=50, deadline=None)
def test_blocks_lose_no_character(text: str, times: int) -> None:
    text = text.replace("\n\n\n", "\n\n") * times
    parts = split_text(text)
    if len(parts) < 8 or all(len(part) >= 4000 for part in parts[:-1]):
        assert "".join(parts) == text
        assert all(4000 <= len(part) <= 8010 for part in parts[:-1])


def test_blocks_end_at_a_blank_line_when_there_is_one() -> None:
    parts = split_text("word word\nword\n\n" * 1000)
    assert len(parts) >= 3
    assert all(part.endswith("\n\n") for part in parts)


def test_folder_reads_each_text_file_as_one_document(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one\n\n\n\ntwo")
    (tmp_path / "deep" / "b.md").write_text("three")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert sorted(read_documents(str(tmp_path))) == ["one\n\n\n\ntwo", "three"]


def test_jsonl_reads_text_or_the_only_string(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "other": "b"}\n\n{"body": "c\u2028\\ud800", "n": 1}\n')
    assert read_documents(str(path)) == ["a", "c\u2028?"]


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert read_documents(str(tmp_path / "a.txt")) == ["one"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2 must be one JSON object"),
        ("[1]", "line 2 must be a JSON object. Got list"),
        ('{"a": "x", "b": "y"}', "line 2 must have a string field 'text'.*Got a, b"),
        ('{"text": 3}', "line 2 .*Got no string field"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CalibrationError, match=message):
        read_documents(str(path))


def test_parquet_reads_text_or_the_only_string_column(tmp_path: Path) -> None:
    for name, table in {
        "text": {"text": ["a", None, " "], "other": ["x", "y", "z"]},
        "only": {"n": [1, 2, 3], "body": pa.array(["a", None, ""], pa.large_string())},
    }.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table(table), path)
        assert read_documents(str(path)) == ["a"]


def test_parquet_with_two_string_columns_or_damage_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), path)
    with pytest.raises(CalibrationError, match="Got a, b"):
        read_documents(str(path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CalibrationError, match="whole Parquet file"):
        read_documents(str(path))


def test_saved_dataset_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"body": ["a", "b"], "n": [1, 2]})
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"x": data, "y": data}).save_to_disk(tmp_path / "three")
    assert read_documents(str(tmp_path / "one")) == ["a", "b"]
    assert read_documents(str(tmp_path / "two")) == ["a", "b"]
    with pytest.raises(CalibrationError, match=r"exactly one split\. Got x, y"):
        read_documents(str(tmp_path / "three"))
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(CalibrationError, match=r"save_to_disk\. Got"):
        read_documents(str(tmp_path / "one"))


def test_hub_id_passes_name_and_config(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, config: str | None) -> object:
        asked.append((name, config))
        if name == "no/such":
            raise ConnectionError("offline")
        return {"train": datasets.Dataset.from_dict({"text": ["a"]})}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_documents("owner/name:part") == ["a"]
    assert read_documents("name") == ["a"]
    with pytest.raises(CalibrationError, match=r"'no/such' is no path.*offline"):
        read_documents("no/such")
    assert asked == [("owner/name", "part"), ("name", None), ("no/such", None)]


@pytest.mark.parametrize("name", ["gone.txt", "./gone", "/gone/x", "a/b/c", "gone.csv", "a b"])
def test_missing_file_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(CalibrationError, match="Nothing exists at"):
        read_documents(name)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"caf\xe9 x", r"must be UTF-8\. .*at byte 3"),
        ("a.txt", b" \n", "at least one word"),
        ("a.jsonl", b"", "at least one word"),
        ("a.csv", b"a,b", r"plain text, \.jsonl or \.parquet"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CalibrationError, match=message):
        read_documents(str(tmp_path / name))


def test_folder_without_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="a calibration folder must hold"):
        read_documents(str(tmp_path))


@pytest.mark.parametrize("size", [0, -512, True, 1.5])
def test_bad_split_size(size: int) -> None:
    with pytest.raises(CalibrationError, match="'test' must be an integer of at least 1"):
        SplitTokens(test=size)
