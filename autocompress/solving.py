"""Solving one group: the modules that read one input, at all levels wanted, into one file.

A group needs nothing but its weights and statistics, so any process may solve it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autocompress.database import Written, write_solutions
from autocompress.files import disk_errors, fingerprint
from autocompress.levels import Level
from autocompress.machine import limited_threads
from autocompress.operators import (
    OPERATORS,
    Operator,
    Solution,
    Solver,
    Statistics,
    own_operators,
    solve,
)
from autocompress.workers import Pool

HESSIAN = "hessian"


@dataclass(frozen=True)
class Group:
    """What is to be solved.

    Args:
        modules: that read one input.
        levels: that all of them are solved at.
        tokens: of that input.
    """

    modules: tuple[str, ...]
    levels: tuple[Level, ...]
    tokens: int

    @property
    def file(self) -> str:
        """Name of the file that takes the solutions."""
        key = fingerprint([list(self.modules), sorted(map(str, self.levels))])[:16]
        return f"{key}.safetensors"


def solve_group(
    group: Group,
    weights: Sequence[Tensor],  # each (out_i, in), float32
    statistics: Statistics,
    solver: Solver,
    folder: Path,
) -> Written:
    """Solve a group and write its file; levels of one family share their work.

    Raises:
        OutputError: the disk refused.
    """
    solutions: dict[tuple[str, Level], Solution] = {}
    seconds: dict[str, float] = {}
    for some in families(group.levels):
        start = time.perf_counter()
        found = solve(weights, statistics, some, solver)
        seconds |= dict.fromkeys(map(str, some), (time.perf_counter() - start) / len(some))
        for name, row in zip(group.modules, found, strict=True):
            solutions |= {(name, level): one for level, one in zip(some, row, strict=True)}
    return write_solutions(folder / group.file, solutions, seconds)


def families(levels: Sequence[Level]) -> list[list[Level]]:
    """Levels of one type together, in the order of their first."""
    types = dict.fromkeys(map(type, levels))
    return [[level for level in levels if type(level) is family] for family in types]


class SharedSolving:
    """Groups that wait for workers, on disk, until there are enough to be worth a round.

    Args:
        pool: the workers; they see `folder` at the same path.
        folder: of the level database.
        solver: how to round.
        enter: called with what was written, in the order of the groups.
    """

    def __init__(
        self, pool: Pool, folder: Path, solver: Solver, enter: Callable[[Written], None]
    ) -> None:
        self._pool, self._folder, self._solver = pool, folder.resolve(), solver
        self._enter = enter
        self._waiting: list[tuple[Group, Path]] = []

    def add(self, group: Group, weights: Sequence[Tensor], statistics: Statistics) -> None:
        """Take a group in; workers are asked once each has two.

        Raises:
            OutputError: the disk refused.
        """
        tensors = {str(i): weight.contiguous() for i, weight in enumerate(weights)}
        if statistics.hessian is not None:
            tensors[HESSIAN] = statistics.hessian
        draft = self._folder / f".{group.file}.inputs"  # a draft: a killed build's are deleted
        with disk_errors(draft):
            draft.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, draft)
        self._waiting.append((group, draft))
        if len(self._waiting) >= 2 * self._pool.size:
            self.finish()

    def finish(self) -> None:
        """Have workers solve what waits.

        Raises:
            WorkerError: they die again and again.
            OutputError: the disk refused.
        """
        own = {
            family: OPERATORS[family] for family in OPERATORS if family.__name__ in own_operators()
        }
        tasks = [
            (group, draft, self._solver, self._folder, self._pool.threads, own)
            for group, draft in self._waiting
        ]
        try:
            for written in self._pool.run(solve_draft, tasks):
                self._enter(written)
        finally:
            self.drop()

    def drop(self) -> None:
        """Forget what waits."""
        for _, draft in self._waiting:
            draft.unlink(missing_ok=True)
        self._waiting.clear()


def solve_draft(
    group: Group,
    draft: Path,
    solver: Solver,
    folder: Path,
    threads: int,
    own: Mapping[type, Operator],
) -> Written:
    """In a worker: solve a group that waits at `draft`.

    Args:
        threads: to solve with.
        own: operators that the search's script registered, by level family.
    """
    OPERATORS.update(own)
    tensors = load_file(draft)
    statistics = Statistics(tensors.pop(HESSIAN, None), group.tokens)
    weights = [tensors[str(i)] for i in range(len(group.modules))]
    with limited_threads(threads), torch.inference_mode():
        return solve_group(group, weights, statistics, solver, folder)
