"""Windows: the rows of tokens every loss, Hessian and gradient is computed on, in four splits."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core import Fidelity
from autocompress.documents import SPLITS
from autocompress.errors import CalibrationError, StudyError

Ids = NDArray[np.int64]

REPEATED_TOKENS = 64  # a run of tokens that two splits may never share
VERSION = 1  # of `Windows.record`


@dataclass(frozen=True, eq=False)
class Windows:
    """Four disjoint sets of windows; one row is one window of consecutive tokens.

    Args:
        window: tokens per window.
        calibrate: (windows, window), token ids the Hessians see.
        search: (windows, window), token ids candidates are compared on.
        validate: (windows, window), token ids finalists are raced on.
        test: (windows, window), token ids only the report sees.
        documents: split -> ids of its documents (first 16 hex digits of the text's sha256).
    """

    window: int
    calibrate: Ids
    search: Ids
    validate: Ids
    test: Ids
    documents: Mapping[str, tuple[str, ...]]

    def split(self, name: str) -> Ids:
        """The windows of one split, (windows, window).

        Raises:
            CalibrationError: no split has this name.
        """
        if name not in SPLITS:
            raise CalibrationError(f"a split must be one of {', '.join(SPLITS)}. Got '{name}'.")
        windows: Ids = getattr(self, name)
        return windows

    def subset(self, fidelity: Fidelity) -> Ids:  # (fidelity.tokens / window, window)
        """The windows a fidelity names; for one seed, fewer tokens are a prefix of more.

        Raises:
            CalibrationError: not a whole number of windows, or more than the split holds.
        """
        return self.split(fidelity.split)[self.rows(fidelity)]

    def rows(self, fidelity: Fidelity) -> Ids:  # (fidelity.tokens / window,)
        """Numbers of the windows a fidelity names, within its split, in the order of its seed.

        Raises:
            CalibrationError: not a whole number of windows, more than the split holds, or no
                position of a window would be scored.
        """
        windows = self.split(fidelity.split)
        if not 1 <= fidelity.every <= self.window:
            raise CalibrationError(
                "a fidelity must score one in 1 to "
                f"{self.window} positions, the window. Got every {fidelity.every}. Change it."
            )
        count, rest = divmod(fidelity.tokens, self.window)
        if rest or not 1 <= count <= len(windows):
            raise CalibrationError(
                f"a fidelity must be a multiple of the window, {self.window} tokens, and at most "
                f"the {windows.size} tokens of split '{fidelity.split}'. Got {fidelity.tokens}."
            )
        return np.random.default_rng(fidelity.seed).permutation(len(windows))[:count]

    def for_sensitivities(self, tokens: int, seed: int) -> Ids:  # (tokens / window, window)
        """Windows in an order of the seed; fewer tokens are a prefix of more.

        Half of the search split, then the calibration split, then the other half: with the text
        that Hessians saw, prices come from more text than candidates are compared on.
        """
        search, calibrate = (
            self.subset(Fidelity(int(self.split(name).size), seed, name))
            for name in ("search", "calibrate")
        )
        half = len(search) // 2
        return np.concatenate([search[:half], calibrate, search[half:]])[: tokens // self.window]

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of every token of every split and the window (128 bits)."""
        parts = [str(self.window), *(_digest(self.split(name)) for name in SPLITS)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def record(self) -> dict[str, Any]:
        """What a run folder keeps of the split: JSON-able, checked by `check_recorded`."""
        splits = {
            name: {
                "tokens": int(self.split(name).size),
                "sha256": _digest(self.split(name)),
                "documents": list(self.documents[name]),
            }
            for name in SPLITS
        }
        return {
            "version": VERSION,
            "window": self.window,
            "fingerprint": self.fingerprint,
            "splits": splits,
        }

    def check_recorded(self, record: Mapping[str, Any]) -> None:
        """Check that a recorded split is this one.

        Raises:
            StudyError: it is not; the message names what changed.
        """
        if record == self.record():
            return
        raise StudyError(
            "a run folder must be continued on the calibration text it began with. Changed: "
            f"{'; '.join(_changes(record, self.record()))}. Use the recorded calibration, window, "
            "tokens and seed, or another run folder."
        )

    def check_disjoint(self) -> None:
        """Check that no text is in two splits.

        Raises:
            CalibrationError: two splits share a document, or a run of 64 identical consecutive
                tokens inside their windows (a whole window, where windows are shorter).
        """
        run = min(REPEATED_TOKENS, self.window)
        found = {
            name: {hashed for row in self.split(name).tolist() for hashed in runs(row, run)}
            for name in SPLITS
        }
        for one, other in combinations(SPLITS, 2):
            documents = set(self.documents[one]) & set(self.documents[other])
            shared = found[one] & found[other]
            if documents or shared:
                what = f"document {min(documents)}" if documents else f"{len(shared)} runs"
                raise CalibrationError(
                    f"splits '{one}' and '{other}' must not share text. Got {what} in both "
                    f"(a run is {run} tokens). Remove the repeated text from the calibration data."
                )


def runs(items: Sequence[Hashable], run: int) -> list[int]:
    """Hashes of every `run` consecutive items."""
    return [hash(tuple(items[i : i + run])) for i in range(len(items) - run + 1)]


def _digest(ids: Ids) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:32]


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two records, in words; `old` may be damaged."""
    plain = [key for key in ("version", "window") if old.get(key) != new[key]]
    changes = [f"{key} {old.get(key)} -> {new[key]}" for key in plain]
    recorded = old.get("splits")
    for name, split in new["splits"].items():
        before = recorded.get(name) if isinstance(recorded, Mapping) else None
        if not isinstance(before, Mapping):
            changes.append(f"split '{name}' is not recorded")
        elif before.get("tokens") != split["tokens"]:
            changes.append(f"tokens of '{name}' {before.get('tokens')} -> {split['tokens']}")
        elif before.get("documents") != split["documents"]:
            changes.append(f"documents of '{name}'")
        elif before != split:
            changes.append(f"tokens of '{name}' for the same documents (another tokenizer?)")
    return changes or ["the record itself was edited"]
