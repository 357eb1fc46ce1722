"""Scores allocations end to end: stitch, run the windows a fidelity names, compare with dense."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any

import torch

from autocompress.core import Allocation, Fidelity, Score, SearchSpace
from autocompress.database import LevelDatabase
from autocompress.machine import limited_threads
from autocompress.prefix import PrefixModel
from autocompress.progress import Progress
from autocompress.quality import Teacher, score, stored_teacher, teacher, vocabulary_of
from autocompress.stitch import StitchedModel
from autocompress.windows import Windows


class Evaluator:
    """The loss of an allocation at a fidelity.

    Args:
        model: dense causal LM, used in place.
        space: its layers and levels.
        database: complete for the space.
        windows: the four splits.
        folder: where the dense model's distributions are kept, one file per split.
        progress: told while they are computed.
        threads: that scoring takes; None leaves torch's number alone.
    """

    def __init__(
        self,
        model: Any,
        space: SearchSpace,
        database: LevelDatabase,
        windows: Windows,
        folder: Path,
        progress: Progress,
        threads: int | None = None,
    ) -> None:
        self.threads = threads
        self.stitched = StitchedModel(model, space, database)
        self.forward = PrefixModel(self.stitched)
        self.windows, self.folder, self.progress = windows, folder, progress
        self._teachers: dict[str, Teacher] = {}

    def __call__(self, allocation: Allocation, fidelity: Fidelity, known: int = 0) -> Score:
        """Score of an allocation on all but the first `known` windows the fidelity names."""
        return self.together([allocation], fidelity, known)[0]

    def together(
        self, allocations: Sequence[Allocation], fidelity: Fidelity, known: int = 0
    ) -> list[Score]:
        """Scores of several allocations, in order, each as if it were alone.

        They take turns on every batch of windows, so that those which begin alike share hidden
        states however many windows there are. Each shares most when those which agree furthest
        follow each other, as they do in the order of their levels.
        """
        rows = torch.from_numpy(self.windows.rows(fidelity)[known:])
        reference = self.teacher(fidelity.split).rows(rows)
        with limited_threads(self.threads):
            return score_together(self.forward, allocations, reference, fidelity.positions)

    def teacher(self, split: str) -> Teacher:
        """The dense model's distributions on a whole split."""
        if split not in self._teachers:
            tokens = self.windows.split(split)

            def compute() -> Teacher:
                with self.progress.task(f"dense model on {split} windows") as advance:
                    return teacher(self.stitched.restore(), tokens, progress=advance)

            path = teacher_path(self.folder, split)
            self._teachers[split] = stored_teacher(path, compute, tokens)
        return self._teachers[split]


def score_together(
    forward: PrefixModel,
    allocations: Sequence[Allocation],
    reference: Teacher,
    positions: slice,
) -> list[Score]:
    """Scores of several allocations on the reference's windows, each as if it were alone.

    Args:
        positions: of every window, to compare at.
    """
    wanted = [*starmap(forward.agreement, pairwise(allocations)), None]
    found = [Score((), ()) for _ in allocations]
    for part in reference.batches(vocabulary_of(forward.model)):
        for i, (allocation, keep) in enumerate(zip(allocations, wanted, strict=True)):
            forward.stitched.stitch(allocation)
            forward.keep = keep  # what the next one shares; of the last one, everything
            found[i] = found[i].then(score(forward, part, positions))
    return found


def teacher_path(folder: Path, split: str) -> Path:
    """Where a run folder keeps the dense model's distributions on a split."""
    return folder / f"teacher-{split}.safetensors"
