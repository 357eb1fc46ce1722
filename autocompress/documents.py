"""Documents: the texts that calibration splits, read from wherever the user keeps them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from autocompress.errors import CalibrationError

SPLITS = ("calibrate", "search", "validate", "test")
TEXT_SUFFIXES = (".txt", ".md", ".rst")  # what a folder is searched for
UNREAD_SUFFIXES = (".json", ".csv", ".tsv")  # structured, but which field is the text?
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet", *UNREAD_SUFFIXES)  # a file, never a Hub id
BLOCK = 4000  # characters; about 1,000 tokens, so 80 blocks fill the default splits
MIN_SECTIONS = 8  # fewer sections than this cannot be dealt evenly to four splits


@dataclass(frozen=True, slots=True)
class SplitTokens:
    """Tokens wanted per split, each at least 1 and a multiple of the window.

    The defaults take 81,920 of the 91 k tokens that SmolLM2 finds in the built-in text once its
    repeated passages are dropped; the rest is room for tokenizers with longer tokens.

    Raises:
        CalibrationError: a size is not a positive integer.
    """

    calibrate: int = 32768  # tokens the Hessians see
    search: int = 24576  # tokens candidates are compared on
    validate: int = 8192  # tokens finalists are raced on
    test: int = 16384  # tokens only the report sees

    def __post_init__(self) -> None:
        for split, size in self.sizes().items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise CalibrationError(
                    f"tokens of split '{split}' must be an integer of at least 1. Got {size!r}."
                )

    def sizes(self) -> dict[str, int]:
        """Split -> tokens, in the order of `SPLITS`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def check_window(self, window: int) -> None:
        """Check that every split is a whole number of windows.

        Args:
            window: tokens per window.

        Raises:
            CalibrationError: `window` is less than 2 or does not divide a split.
        """
        if window < 2:
            raise CalibrationError(f"window must be at least 2 tokens. Got {window}.")
        for split, size in self.sizes().items():
            if size % window:
                raise CalibrationError(
                    f"tokens of split '{split}' must be a multiple of the window, {window}. "
                    f"Got {size}. Use {max(1, size // window) * window}."
                )


def read_documents(source: str | None) -> list[str]:
    """The texts of `source`, blank ones left out.

    Args:
        source: one of
            - None: the built-in default, one document per topic of `pydoc_data.topics`;
            - a text file: cut at runs of two or more blank lines or, when that gives fewer than
              8 sections, into blocks of about 4,000 characters that end at a blank line, a line
              end or a space (whichever comes first, in that order of preference);
            - a folder: one document per .txt, .md or .rst file below it;
            - a .jsonl file: field `text`, or else the only string field of each line;
            - a .parquet file: column `text`, or else the only string column;
            - a folder made by `datasets.save_to_disk`: its split `train` or its only split;
            - a Hub id, `owner/name` or `owner/name:config`, read by `datasets.load_dataset`.

    Raises:
        CalibrationError: nothing there, not readable as text, or no text in it.
    """
    documents = [_encodable(text) for text in _read(source) if text.strip()]
    if not documents:
        raise CalibrationError(
            f"calibration text must hold at least one word. '{source}' holds none. "
            "Give a file with text, or leave --calibration out for the built-in text."
        )
    return documents


def _read(source: str | None) -> Iterable[str]:
    if source is None:
        from pydoc_data.topics import topics

        return topics.values()
    path = Path(source).expanduser()
    if path.is_dir():
        saved = any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
        return _read_saved_dataset(path) if saved else _read_folder(path)
    if path.is_file():
        return _read_file(path)
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", source) and path.suffix not in SUFFIXES:
        return _read_hub(source)
    raise CalibrationError(
        "calibration text must be an existing file or folder, or a Hub id 'owner/name'. "
        f"Nothing exists at '{source}'. Check the path."
    )


def _encodable(text: str) -> str:
    """`text` with lone surrogates, which JSON can smuggle in, replaced by '?'."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _read_file(path: Path) -> Iterable[str]:
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix in UNREAD_SUFFIXES:
        raise CalibrationError(
            f"a calibration file must be plain text, .jsonl or .parquet. Got '{path}'. "
            "Convert it to .jsonl with one object per line and a field 'text'."
        )
    return split_text(_read_text(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"calibration text must be UTF-8. '{path}' has {error.reason} at byte {error.start}. "
            "Convert it, for example with 'iconv -t utf-8'."
        ) from error
    except OSError as error:
        raise CalibrationError(f"'{path}' must be readable: {error.strerror}.") from error


def split_text(text: str) -> list[str]:
    """Documents of one long text: its sections, or blocks when it has too few sections."""
    sections = [part for part in re.split(r"\n(?:[^\S\n]*\n){2,}", text) if part.strip()]
    if len(sections) >= MIN_SECTIONS:
        return sections
    ends = "|".join(f"(?:.{{0,{BLOCK}}}?{end})" for end in (r"\n[^\S\n]*\n", r"\n", r"\s", r"\Z"))
    return re.findall(rf"(?s).{{{BLOCK}}}(?:{ends}|.{{{BLOCK}}})|.+", text)


def _read_folder(folder: Path) -> list[str]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in TEXT_SUFFIXES)
    if not files:
        raise CalibrationError(
            f"a calibration folder must hold {', '.join(TEXT_SUFFIXES)} files or a saved dataset. "
            f"'{folder}' holds neither. Name a .jsonl or .parquet file itself."
        )
    return [_read_text(path) for path in files if path.is_file()]


def _read_jsonl(path: Path) -> list[str]:
    lines = enumerate(_read_text(path).split("\n"), start=1)  # \x85 and friends are text in JSON
    return [_jsonl_text(line, f"{path}, line {n}") for n, line in lines if line.strip()]


def _jsonl_text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where} must be one JSON object: {error.msg}.") from error
    if not isinstance(row, dict):
        raise CalibrationError(f"{where} must be a JSON object. Got {type(row).__name__}.")
    field = _text_field([key for key, value in row.items() if isinstance(value, str)], where)
    return str(row[field])


def _text_field(strings: list[str], where: str) -> str:
    """The field that holds the text, given the names of all string fields."""
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise CalibrationError(
        f"{where} must have a string field 'text' or exactly one string field. "
        f"Got {', '.join(strings) or 'no string field'}. Rename the one to read to 'text'."
    )


def _read_parquet(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        strings = [f.name for f in schema if pa.types.is_string(f.type)]
        strings += [f.name for f in schema if pa.types.is_large_string(f.type)]
        field = _text_field(strings, str(path))
        column = pq.read_table(path, columns=[field]).column(field).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise CalibrationError(f"'{path}' must be a whole Parquet file: {error}") from error
    return [text for text in column if text is not None]


def _read_saved_dataset(folder: Path) -> list[str]:
    from datasets import load_from_disk

    try:
        data: Any = load_from_disk(str(folder))
    except Exception as error:  # datasets raises whatever its file readers raise
        raise CalibrationError(
            f"'{folder}' must be a folder made by datasets.save_to_disk. Got: {error}"
        ) from error
    return _dataset_texts(data, str(folder))


def _read_hub(name: str) -> list[str]:
    from datasets import load_dataset

    repository, _, config = name.partition(":")
    try:
        data: Any = load_dataset(repository, config or None)
    except Exception as error:  # network, missing repository, missing config: no common base
        raise CalibrationError(
            f"calibration text must be an existing path or a readable Hub dataset. '{name}' is no "
            f"path, and datasets says: {error}. Check the name, or write 'owner/name:config'."
        ) from error
    return _dataset_texts(data, name)


def _dataset_texts(data: Any, where: str) -> list[str]:
    """The text column of a `datasets` object: split `train`, or its only split."""
    if isinstance(data, Mapping):
        if "train" not in data and len(data) != 1:
            raise CalibrationError(
                f"{where} must have a split 'train' or exactly one split. Got {', '.join(data)}."
            )
        data = data["train"] if "train" in data else next(iter(data.values()))
    kinds = {name: getattr(kind, "dtype", None) for name, kind in data.features.items()}
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    return [text for text in data[_text_field(strings, where)] if text is not None]
