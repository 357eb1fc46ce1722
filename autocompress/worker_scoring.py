"""Scoring by workers: each opens the model and the database once, and scores its share.

Scores do not depend on who computes them. A candidate has the score that it has alone, and windows
are shared out in whole batches, which are the batches of a single process.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autocompress.core import Allocation, Fidelity, Score, SearchSpace
from autocompress.database import LevelDatabase
from autocompress.errors import WorkerError
from autocompress.evaluator import Evaluator, score_together, teacher_path
from autocompress.models import load_model
from autocompress.prefix import MEMORY, PrefixModel
from autocompress.quality import Teacher, batch_size, read_teacher, vocabulary_of
from autocompress.stitch import StitchedModel
from autocompress.workers import Pool

ONE = threading.Lock()  # a process holds one model: jobs that threads of a cluster take wait here


@dataclass(frozen=True)
class Setup:
    """What a worker opens before it scores, the same paths on every machine.

    Args:
        key: of all else: one process opens it once.
        model: where the dense model is, absolute; None is the default model.
        dtype: of forwards, such as 'float32'.
        fingerprint: that the loaded model must have.
        space: layers and levels.
        database: its folder, absolute.
        identity: of the database.
        folder: of the dense model's distributions, absolute.
        share: workers that share the memory of one machine.
    """

    key: str
    model: str | None = field(compare=False)
    dtype: str = field(compare=False)
    fingerprint: str = field(compare=False)
    space: SearchSpace = field(compare=False)
    database: Path = field(compare=False)
    identity: dict[str, Any] = field(compare=False)
    folder: Path = field(compare=False)
    share: int = field(compare=False)


class SharedEvaluator:
    """Scores like an evaluator, each worker a share of the windows or of the candidates.

    Args:
        evaluator: of this process: it knows the windows and the dense model's distributions.
        setup: for the workers.
        pool: the workers.
    """

    def __init__(self, evaluator: Evaluator, setup: Setup, pool: Pool) -> None:
        self.evaluator, self.setup, self.pool = evaluator, setup, pool

    def together(
        self, allocations: Sequence[Allocation], fidelity: Fidelity, known: int = 0
    ) -> list[Score]:
        """Scores of several allocations, in order, on all but the first `known` windows."""
        rows = self.evaluator.windows.rows(fidelity)[known:]
        self.evaluator.teacher(fidelity.split)  # workers read its file
        vocabulary = vocabulary_of(self.evaluator.stitched.model)
        batch = batch_size(self.evaluator.windows.window, vocabulary)
        shares = share_out(len(allocations), len(rows), batch, self.pool.size)
        tasks = [
            (self.setup, self.pool.threads, list(allocations[part]), fidelity, rows[at])
            for part, at in shares
        ]
        found = [Score((), ()) for _ in allocations]
        for (part, _), scores in zip(shares, self.pool.run(score_share, tasks), strict=True):
            for i, score in zip(range(part.start, part.stop), scores, strict=True):
                found[i] = found[i].then(score)
        return found


def share_out(candidates: int, windows: int, batch: int, workers: int) -> list[tuple[slice, slice]]:
    """(candidates, windows) of every job, the first windows of a candidate first.

    Batches of windows are shared out first, because candidates on the same windows share hidden
    states; candidates where there are fewer batches than workers.
    """
    batches = -(-windows // batch)
    rows = [slice(a * batch, min(b * batch, windows)) for a, b in _parts(batches, workers)]
    some = [slice(a, b) for a, b in _parts(candidates, max(1, workers // len(rows)))]
    return [(part, at) for part in some for at in rows]


def _parts(count: int, most: int) -> list[tuple[int, int]]:
    """Ends of at most so many parts of `count` things, as equal as can be."""
    parts = min(count, most)
    edges = [count * i // parts for i in range(parts + 1)]
    return list(pairwise(edges))


def score_share(
    setup: Setup,
    threads: int,
    allocations: Sequence[Allocation],
    fidelity: Fidelity,
    rows: np.ndarray,  # (n,), windows of the split by number
) -> list[Score]:
    """In a worker: scores of allocations on some windows.

    Raises:
        WorkerError: this process finds another model than the search's.
        DatabaseError, StudyError: files of the run folder are missing or damaged here.
    """
    with ONE:
        torch.set_num_threads(threads)
        opened = _open(setup)
        reference = opened.teacher(fidelity.split).rows(torch.tensor(rows))  # Ray's are read-only
        return score_together(opened.forward, allocations, reference, fidelity.positions)


class _Opened:
    """What a worker keeps from job to job."""

    def __init__(self, setup: Setup) -> None:
        loaded = load_model(setup.model, getattr(torch, setup.dtype))
        if loaded.fingerprint != setup.fingerprint:
            raise WorkerError(
                f"a worker must load the search's model. Got another one at '{loaded.name}'. Put "
                "the same files at the same path on every machine."
            )
        database = LevelDatabase.open(setup.database, setup.identity)
        database.room //= setup.share
        stitched = StitchedModel(loaded.model, setup.space, database)
        self.forward = PrefixModel(stitched, MEMORY // setup.share)
        self._folder = setup.folder
        self._teachers: dict[str, Teacher] = {}

    def teacher(self, split: str) -> Teacher:
        if split not in self._teachers:
            self._teachers[split] = read_teacher(teacher_path(self._folder, split))
        return self._teachers[split]


@lru_cache(maxsize=1)
def _open(setup: Setup) -> _Opened:
    return _Opened(setup)
