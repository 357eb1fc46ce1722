"""Calibration windows: text split by document into four disjoint sets of token windows.

Order of work: documents are deduplicated, ordered by a hash of (seed, text), stripped of passages
that an earlier document already had, tokenized, dealt to the splits and cut into windows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from autocompress.documents import SPLITS, SplitTokens, read_documents
from autocompress.errors import CalibrationError
from autocompress.windows import REPEATED_TOKENS, Windows, runs

__all__ = ["SPLITS", "SplitTokens", "Windows", "calibration_windows", "read_documents"]

Encode = Callable[[str], list[int]]
REPEATED_WORDS = 13  # the run that GPT-3's decontamination counts as the same text
DEFAULT_TOKENS = SplitTokens()


@dataclass(frozen=True, slots=True)
class _Document:
    digest: str
    tokens: tuple[int, ...]  # ends with the separator, if there is one


def calibration_windows(
    source: str | None,
    encode: Encode,
    window: int = 512,
    tokens: SplitTokens = DEFAULT_TOKENS,
    seed: int = 0,
    separator: int | None = None,
    start: int | None = None,
) -> Windows:
    """Text split by document into disjoint windows.

    Args:
        source: what `read_documents` reads; None is the built-in text.
        encode: text -> token ids, without special tokens.
        window: tokens per window, at least 2.
        tokens: tokens per split, multiples of `window`.
        seed: orders the documents, and with that deals them to the splits.
        separator: token put between documents and where a passage was cut out (the end-of-text
            id), or None to join them directly.
        start: token that every window begins with, counted in it, or None: see `first_token`.

    Raises:
        CalibrationError: the text cannot be read or does not fill the splits.
    """
    tokens.check_window(window)
    dealt, streams = _fill(_documents(read_documents(source), encode, seed, separator), tokens)
    ids = {
        name: cut_windows(streams[name], size // window, window, start)
        for name, size in tokens.sizes().items()
    }
    documents = {name: tuple(document.digest for document in dealt[name]) for name in SPLITS}
    windows = Windows(window, **ids, documents=documents)
    windows.check_disjoint()
    return windows


def cut_windows(
    ids: Sequence[int], count: int, window: int, start: int | None = None
) -> np.ndarray:  # (count, window) int64
    """The first windows of a text, each with `start` before it.

    A model that has only seen texts behind such a token loses its way without it: attention rests
    on the first token, whatever it is (Xiao et al., Efficient Streaming Language Models with
    Attention Sinks, arXiv:2309.17453).
    """
    own = window if start is None else window - 1
    rows = np.array(ids[: count * own], dtype=np.int64).reshape(count, own)
    return rows if start is None else np.insert(rows, 0, start, axis=1)


def _documents(
    texts: Iterable[str], encode: Encode, seed: int, separator: int | None
) -> Iterator[_Document]:
    """Distinct documents in the order of hash(seed, text), without repeated passages."""
    distinct = {hashlib.sha256(" ".join(t.split()).encode()).hexdigest(): t for t in texts}
    words: set[int] = set()
    runs_seen: set[int] = set()
    for digest in sorted(distinct, key=lambda d: hashlib.sha256(f"{seed} {d}".encode()).digest()):
        ids: list[int] = []
        for passage in _new_passages(distinct[digest], words):
            ids += encode(passage)
            ids += [] if separator is None else [separator]
        repeated = _repeated(ids, runs_seen, REPEATED_TOKENS)  # text that is not made of words
        runs_seen.update(runs(ids, REPEATED_TOKENS))
        kept = (token for token, cut in zip(ids, repeated, strict=True) if not cut)
        yield _Document(digest[:16], tuple(kept))


def _new_passages(text: str, seen: set[int]) -> list[str]:
    """The passages of `text` outside every 13-word run in `seen`; its own runs join `seen`.

    Words are compared, in lower case, so that a section wrapped or indented otherwise still counts
    as repeated: `pydoc_data.topics` repeats a fifth of itself that way.
    """
    matches = list(re.finditer(r"\w+", text))
    words = [match.group().lower() for match in matches]
    repeated = _repeated(words, seen, REPEATED_WORDS)
    seen.update(runs(words, REPEATED_WORDS))
    if not any(repeated):
        return [text]
    starts = [match.start() for match in matches] + [len(text)]
    stretches = groupby(range(len(words)), repeated.__getitem__)
    spans = [list(stretch) for cut, stretch in stretches if not cut]
    return [
        text[starts[span[0]] : starts[span[-1] + 1]].rstrip()
        for span in spans
        if len(span) >= REPEATED_WORDS  # shorter scraps are no context for a language model
    ]


def _repeated(items: Sequence[Hashable], seen: set[int], run: int) -> list[bool]:
    """Per item, whether a run of `run` items around it is in `seen`."""
    repeated = [False] * len(items)
    for start, hashed in enumerate(runs(items, run)):
        if hashed in seen:
            repeated[start : start + run] = [True] * run
    return repeated


Dealt = dict[str, list[_Document]]
Streams = dict[str, list[int]]


def _fill(documents: Iterable[_Document], tokens: SplitTokens) -> tuple[Dealt, Streams]:
    """Take documents until they fill every split; large corpora are not read to the end."""
    pool: list[_Document] = []
    found, goal = 0, sum(tokens.sizes().values())
    for document in documents:
        pool.append(document)
        found += len(document.tokens)
        if found >= goal:
            dealt, streams = _deal(pool, tokens)
            if not _lacking(streams, tokens):
                return dealt, streams
            goal = found + found // 50
    dealt, streams = _deal(pool, tokens)
    if lacking := _lacking(streams, tokens):
        raise CalibrationError(_too_little(lacking, found, len(pool), tokens))
    return dealt, streams


def _deal(pool: list[_Document], tokens: SplitTokens) -> tuple[Dealt, Streams]:
    """Deal documents, large ones first, each to the split that lacks the largest share.

    Size classes are powers of two and the hash order rules inside a class: the seed matters, and
    small documents remain to level the splits at the end.
    """
    room = tokens.sizes()
    dealt: Dealt = {name: [] for name in SPLITS}
    for document in sorted(pool, key=lambda d: -len(d.tokens).bit_length()):
        size = len(document.tokens)
        fitting = [name for name in SPLITS if room[name] >= size]
        if fitting:
            split = max(fitting, key=lambda name: room[name] / getattr(tokens, name))
        else:
            split = max(SPLITS, key=lambda name: room[name])
        if size and room[split] > 0:
            dealt[split].append(document)
            room[split] -= size
    return dealt, _streams(dealt)


def _streams(dealt: Dealt) -> Streams:
    """Per split its documents' tokens in a row, without 64-token runs of an earlier split.

    Documents hold none any more, but joining can make one (a common end, then a common beginning).
    """
    seen: set[int] = set()
    streams: Streams = {}
    for name, documents in dealt.items():
        stream = [token for document in documents for token in document.tokens]
        while any(repeated := _repeated(stream, seen, REPEATED_TOKENS)):  # a cut may join a new run
            stream = [token for token, cut in zip(stream, repeated, strict=True) if not cut]
        seen.update(runs(stream, REPEATED_TOKENS))
        streams[name] = stream
    return streams


def _lacking(streams: Streams, tokens: SplitTokens) -> dict[str, int]:
    """Split -> tokens still missing, for the splits that are not full."""
    missing = {name: size - len(streams[name]) for name, size in tokens.sizes().items()}
    return {name: count for name, count in missing.items() if count > 0}


def _too_little(lacking: dict[str, int], found: int, documents: int, tokens: SplitTokens) -> str:
    wanted = ", ".join(f"{name} {size}" for name, size in tokens.sizes().items())
    missing = ", ".join(f"'{name}' lacks {count}" for name, count in lacking.items())
    return (
        f"calibration text must hold at least {sum(tokens.sizes().values())} tokens ({wanted}) in "
        f"documents that no two splits share. Got {found} tokens in {documents} distinct documents "
        f"without repeated passages; {missing}. Give more text, shorter documents, or ask for "
        "fewer tokens."
    )
