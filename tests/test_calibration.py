"""Documents -> disjoint windows, their record and their subsets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress import calibration
from autocompress.calibration import SPLITS, SplitTokens, calibration_windows, read_documents
from autocompress.core import Fidelity
from autocompress.errors import CalibrationError, StudyError

SMALL = SplitTokens(calibrate=256, search=192, validate=64, test=128)
EOS = 1


def encode(text: str) -> list[int]:
    """One token per word."""
    return [2 + zlib.crc32(word.encode()) % 2**40 for word in text.split()]


def prose(words: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(10**9)}" for _ in range(words))


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "a.jsonl", [prose(20 + 3 * i, i) for i in range(25)])


def windows_of(source: str, seed: int = 0, tokens: SplitTokens = SMALL) -> calibration.Windows:
    return calibration_windows(source, encode, 32, tokens, seed, EOS)


# --- splitting -------------------------------------------------------------------------------


def test_splits_have_the_asked_sizes(corpus: str) -> None:
    windows = windows_of(corpus)
    assert {name: windows.split(name).size for name in SPLITS} == SMALL.sizes()
    assert all(windows.split(name).shape[1] == 32 for name in SPLITS)
    assert windows.calibrate.dtype == np.int64


def test_every_window_begins_with_the_models_first_token(corpus: str) -> None:
    plain = windows_of(corpus)
    started = calibration_windows(corpus, encode, 32, SMALL, 0, EOS, start=7)
    for name in SPLITS:
        rows, text = started.split(name), plain.split(name).flatten()
        assert rows.shape == plain.split(name).shape and (rows[:, 0] == 7).all()
        assert np.array_equal(rows[:, 1:].flatten(), text[: rows.size - len(rows)])


def test_windows_are_whole_documents_joined_by_the_separator(corpus: str) -> None:
    documents = {tuple(encode(text)) for text in read_documents(corpus)}
    for name in SPLITS:
        stream = windows_of(corpus).split(name).reshape(-1).tolist()
        *whole, rest = " ".join(map(str, stream)).split(f" {EOS} ")
        assert whole
        assert all(tuple(map(int, text.split())) in documents for text in whole)
        assert any(" ".join(map(str, document)).startswith(rest) for document in documents)


@given(seed=st.integers(0, 50), sizes=st.lists(st.integers(1, 150), min_size=20, max_size=40))
@settings(max_examples=40, deadline=None)
def test_no_token_is_in_two_splits(
    tmp_path_factory: pytest.TempPathFactory, seed: int, sizes: list[int]
) -> None:
    texts = [prose(size, number) for number, size in enumerate(sizes)]
    source = write_jsonl(tmp_path_factory.mktemp("text") / "a.jsonl", texts)
    try:
        windows = windows_of(source, seed)
    except CalibrationError:
        assert sum(sizes) < 640 + 4 * 150
        return
    found = [set(windows.split(name).reshape(-1).tolist()) - {EOS} for name in SPLITS]
    assert sum(map(len, found)) == len(set.union(*found))
    windows.check_disjoint()


def test_split_ignores_file_order_and_copies_but_not_the_seed(corpus: str, tmp_path: Path) -> None:
    texts = read_documents(corpus)
    shuffled = [text.replace(" ", "\n  ") for text in texts[:3]] + texts[::-1]
    other = write_jsonl(tmp_path / "b.jsonl", shuffled)
    assert windows_of(other).fingerprint == windows_of(corpus).fingerprint
    assert windows_of(corpus, seed=1).fingerprint != windows_of(corpus).fingerprint


def test_passage_of_two_documents_is_kept_once(tmp_path: Path) -> None:
    shared = prose(30, 99)
    texts = [f"{prose(30, i)}\n{shared.upper() if i % 2 else shared}" for i in range(30)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    windows = windows_of(source)
    marks = {token for form in (shared, shared.upper()) for token in encode(form)}
    hits = sum(np.isin(windows.split(name), list(marks)).sum() for name in SPLITS)
    assert hits <= 30
    assert all((windows.split(name) == EOS).any() for name in SPLITS)


def test_token_runs_that_the_word_rule_misses_are_cut(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [f"{prose(12, i)} ----" for i in range(40)])

    def encode_runs(text: str) -> list[int]:  # the line of dashes is no word, but 70 tokens
        return [*encode(text)[:12], *range(100, 170)]

    windows = calibration_windows(source, encode_runs, 64, SplitTokens(256, 64, 64, 64))
    windows.check_disjoint()


def test_runs_that_joining_documents_makes_are_cut(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [prose(100, i) for i in range(12)])

    def encode_framed(text: str) -> list[int]:  # 33 tokens begin and 33 end every document
        return [*range(100, 133), *encode(text), *range(200, 233)]

    tokens = SplitTokens(256, 256, 256, 256)
    calibration_windows(source, encode_framed, 256, tokens).check_disjoint()


def test_scraps_between_repeated_passages_are_dropped(tmp_path: Path) -> None:
    one, two = prose(20, 98), prose(20, 99)
    framed = [f"{one} scrap{i} {two} {prose(20, i)}" for i in range(40)]
    windows = windows_of(write_jsonl(tmp_path / "a.jsonl", framed))
    scraps = set(encode(" ".join(f"scrap{i}" for i in range(40))))
    found = {token for name in SPLITS for token in windows.split(name).reshape(-1).tolist()}
    assert len(scraps & found) <= 1  # the first document keeps its own


def test_large_documents_are_spread_over_splits_that_hold_them(tmp_path: Path) -> None:
    sizes = [100, 100, 100, *[10] * 50]
    texts = [prose(size, number) for number, size in enumerate(sizes)]
    windows = windows_of(write_jsonl(tmp_path / "a.jsonl", texts))
    large = {hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts[:3]}
    holders = [name for name in SPLITS if large & set(windows.documents[name])]
    assert holders == ["calibrate", "search", "test"]


def test_listed_documents_are_those_that_were_used(corpus: str) -> None:
    texts = read_documents(corpus)
    sizes = {hashlib.sha256(t.encode()).hexdigest()[:16]: len(encode(t)) + 1 for t in texts}
    windows = windows_of(corpus)
    for name, wanted in SMALL.sizes().items():
        *before, last = (sizes[document] for document in windows.documents[name])
        assert sum(before) < wanted <= sum(before) + last


def test_large_documents_still_fill_every_split(tmp_path: Path) -> None:
    sizes = [200, 150, 100, 60, 40, *[10] * 12]  # 670 words for 640 tokens
    texts = [prose(size, number) for number, size in enumerate(sizes)]
    for seed in range(10):
        windows_of(write_jsonl(tmp_path / "a.jsonl", texts), seed)


def test_large_corpora_are_not_tokenized_to_the_end(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [prose(20, i) for i in range(1000)])
    calls = []
    calibration_windows(source, lambda text: calls.append(text) or encode(text), 32, SMALL)
    assert len(calls) < 60


def test_default_text_fills_splits_of_its_size() -> None:
    """56 k words without repeats stand for the 91 k tokens of the real tokenizer."""
    tokens = SplitTokens(16384, 12288, 4096, 8192)
    for seed in range(2):
        windows = calibration_windows(None, encode, 512, tokens, seed, EOS)
        assert windows.test.size == 8192


def test_too_little_text_says_how_much_is_needed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [prose(49, i) for i in range(10)])
    with pytest.raises(CalibrationError, match=r"at least 640 tokens.*Got 500 tokens in 10"):
        windows_of(source)


def test_too_few_documents_names_the_split_that_lacks(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [prose(2000, i) for i in range(3)])
    with pytest.raises(CalibrationError, match="'validate' lacks 64"):
        windows_of(source)


@pytest.mark.parametrize(
    ("tokens", "window", "message"),
    [
        (SMALL, 48, r"'calibrate' must be a multiple of the window, 48\. Got 256\. Use 240"),
        (SMALL, 1, "window must be at least 2"),
    ],
)
def test_bad_window(corpus: str, tokens: SplitTokens, window: int, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibration_windows(corpus, encode, window, tokens)


# --- windows ---------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_subset_is_distinct_windows_nested_by_tokens(seed: int, count: int) -> None:
    rows = np.arange(6 * 8).reshape(6, 8)
    windows = calibration.Windows(8, rows, rows, rows, rows, dict.fromkeys(SPLITS, ()))
    subset = windows.subset(Fidelity(8 * count, seed))
    assert subset.shape == (count, 8)
    assert len({tuple(row) for row in subset} & {tuple(row) for row in rows}) == count
    if count < 5:
        assert (windows.subset(Fidelity(8 * (count + 1), seed))[:count] == subset).all()


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 11))
@settings(max_examples=30, deadline=None)
def test_sensitivities_see_half_of_the_search_split_then_what_hessians_saw(
    seed: int, count: int
) -> None:
    search, calibrate = np.arange(6 * 8).reshape(6, 8), 100 + np.arange(5 * 8).reshape(5, 8)
    windows = calibration.Windows(8, calibrate, search, search, search, dict.fromkeys(SPLITS, ()))
    found = windows.for_sensitivities(8 * count, seed)
    assert found.shape == (count, 8)
    assert (found[:3] == windows.subset(Fidelity(8 * min(count, 3), seed))).all()
    assert (found[3:8] >= 100).all()
    assert len({tuple(row) for row in found}) == count


def test_fewer_tokens_of_a_seed_are_the_first_of_more(corpus: str) -> None:
    windows = windows_of(corpus)
    whole = windows.subset(Fidelity(128, 5, "test"))
    assert sorted(map(tuple, whole)) == sorted(map(tuple, windows.test))
    for tokens in (32, 64, 96):
        assert (windows.subset(Fidelity(tokens, 5, "test")) == whole[: tokens // 32]).all()
    orders = {windows.subset(Fidelity(96, seed, "test")).tobytes() for seed in range(5)}
    assert len(orders) > 1


@pytest.mark.parametrize("tokens", [0, 31, 33, 224, -32])
def test_impossible_fidelity(corpus: str, tokens: int) -> None:
    with pytest.raises(CalibrationError, match=f"at most the 192 tokens.*Got {tokens}"):
        windows_of(corpus).subset(Fidelity(tokens))


def test_unknown_split(corpus: str) -> None:
    with pytest.raises(CalibrationError, match="a split must be one of"):
        windows_of(corpus).subset(Fidelity(32, 0, "train"))


@pytest.mark.parametrize("every", [0, -1, 33])
def test_positions_are_at_least_one_of_a_window(corpus, every):
    windows = windows_of(corpus)
    assert len(windows.rows(Fidelity(windows.window, every=windows.window))) == 1
    with pytest.raises(CalibrationError, match=rf"1 to {windows.window} positions.*every {every}"):
        windows.rows(Fidelity(windows.window, every=every))


def test_leaks_are_errors(corpus: str) -> None:
    good = windows_of(corpus)
    good.check_disjoint()
    copied = good.test.copy()
    copied[2] = good.search[1]
    with pytest.raises(CalibrationError, match="'search' and 'test' must not share"):
        dataclasses.replace(good, test=copied).check_disjoint()
    documents = {**good.documents, "validate": good.documents["calibrate"][:1]}
    with pytest.raises(CalibrationError, match=r"'calibrate' and 'validate'.*document"):
        dataclasses.replace(good, documents=documents).check_disjoint()


def test_a_shifted_run_of_64_tokens_is_a_leak_and_63_is_not() -> None:
    rows = {name: np.arange(200)[None] + 1000 * i for i, name in enumerate(SPLITS)}
    for run, leaks in ((63, False), (64, True)):
        test = rows["test"].copy()
        test[0, 100 : 100 + run] = rows["calibrate"][0, 7 : 7 + run]
        windows = calibration.Windows(
            200, **{**rows, "test": test}, documents=dict.fromkeys(SPLITS, ())
        )
        if leaks:
            with pytest.raises(CalibrationError, match="1 runs"):
                windows.check_disjoint()
        else:
            windows.check_disjoint()


def test_record_survives_json(corpus: str) -> None:
    windows = windows_of(corpus)
    windows.check_recorded(json.loads(json.dumps(windows.record())))


def test_record_names_what_changed(corpus: str, tmp_path: Path) -> None:
    windows = windows_of(corpus)
    changed = {
        "documents of 'test'": windows_of(corpus, seed=1),
        r"window 32 -> 16": calibration_windows(corpus, encode, 16, SMALL, 0, EOS),
        "tokens of 'search' 192 -> 96": windows_of(corpus, 0, SplitTokens(256, 96, 64, 128)),
        "another tokenizer": calibration_windows(
            corpus, lambda text: [i + 1 for i in encode(text)], 32, SMALL, 0, EOS
        ),
    }
    for message, other in changed.items():
        with pytest.raises(StudyError, match=message):
            other.check_recorded(windows.record())
    for damaged in ({}, {**windows.record(), "splits": 3}, {**windows.record(), "fingerprint": 0}):
        with pytest.raises(StudyError, match="Changed: "):
            windows.check_recorded(damaged)
