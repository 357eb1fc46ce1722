"""Scores allocations end to end: stitch, run the windows a fidelity names, compare with dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autocompress.core import Allocation, Fidelity, Score, SearchSpace
from autocompress.database import LevelDatabase
from autocompress.prefix import PrefixModel
from autocompress.progress import Progress
from autocompress.quality import Teacher, score, stored_teacher, teacher
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
    """

    def __init__(
        self,
        model: Any,
        space: SearchSpace,
        database: LevelDatabase,
        windows: Windows,
        folder: Path,
        progress: Progress,
    ) -> None:
        self.stitched = StitchedModel(model, space, database)
        self.forward = PrefixModel(self.stitched)
        self.windows, self.folder, self.progress = windows, folder, progress
        self._teachers: dict[str, Teacher] = {}

    def __call__(self, allocation: Allocation, fidelity: Fidelity, known: int = 0) -> Score:
        """Score of an allocation on all but the first `known` windows the fidelity names."""
        rows = torch.from_numpy(self.windows.rows(fidelity)[known:])
        reference = self.teacher(fidelity.split).rows(rows)
        self.stitched.stitch(allocation)
        return score(self.forward, reference)

    def teacher(self, split: str) -> Teacher:
        """The dense model's distributions on a whole split."""
        if split not in self._teachers:
            tokens = self.windows.split(split)

            def compute() -> Teacher:
                with self.progress.task(f"dense model on {split} windows") as advance:
                    return teacher(self.stitched.restore(), tokens, progress=advance)

            path = self.folder / f"teacher-{split}.safetensors"
            self._teachers[split] = stored_teacher(path, compute, tokens)
        return self._teachers[split]
