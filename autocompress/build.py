"""Build a level database: every layer at every level in one forward pass.

The model without its head runs once over all calibration tokens. Just before a layer runs, its
input is at hand: the Hessian is formed, all levels are solved, and the layer goes on with its
weight at the prefix level, so that later layers see the activations of a compressed model
(`prefix='dense'`: of the dense one). Layers that read the same tensor share the Hessian and are
solved together. Other processes may solve all levels but the prefix, which the pass waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.core import SearchSpace
from autocompress.database import LevelDatabase
from autocompress.errors import DatabaseError
from autocompress.files import exclusive
from autocompress.levels import UNCHANGED, Dense, Level, Rows, Width
from autocompress.machine import limited_threads
from autocompress.models import is_transposed, module_name, set_weight, weight_of
from autocompress.operators import Solver, Statistics
from autocompress.prefix_levels import nearest
from autocompress.solving import Group, SharedSolving, solve_group
from autocompress.sublayers import feeders
from autocompress.tracing import hidden_states, input_groups
from autocompress.workers import Pool

Advance = Callable[[int, int], None]  # groups done, groups in all


def build_database(
    model: Any,
    space: SearchSpace,
    windows: np.ndarray,  # (n, window) int64, the calibrate split
    database: LevelDatabase,
    *,
    prefix: Level,
    solver: Solver,
    progress: Advance = lambda done, total: None,
    pool: Pool | None = None,
    threads: int | None = None,
) -> LevelDatabase:
    """Fill `database` with every (layer, level) of the space that it lacks.

    Args:
        model: dense causal LM; its weights are as before when this returns.
        space: layers and levels wanted.
        windows: calibration tokens.
        database: opened for this model, windows, prefix and solver.
        prefix: level whose weights produce the activations that later layers are calibrated on.
        solver: how to round.
        progress: called as (groups done, groups in all).
        pool: workers that solve what the pass does not need to go on; None solves it here.
        threads: to solve with; None leaves torch's number alone.

    Raises:
        WorkerError: workers die again and again.
        DatabaseError: another process is building here, or an existing file is damaged.
    """
    wanted = _wanted(space)
    missing = [m for m, levels in wanted.items() if any((m, lv) not in database for lv in levels)]
    message = f"one process at a time may build '{database.path}'. Got a second one. Wait for it."
    with exclusive(database.path / "lock", DatabaseError, message):
        database.verify()
        database.remove_drafts()
        if missing:
            builder = _Builder(
                model, wanted, windows, database, prefix, solver, progress, pool, threads
            )
            builder.feeders = feeders(space)
            builder.run()
    return database


def lacking_bytes(database: LevelDatabase, space: SearchSpace) -> dict[Level, int]:
    """Level -> bytes of what the database lacks of it, by arithmetic."""
    shapes = {
        module: shape
        for layer in space.layers
        for module, shape in zip(layer.modules, layer.shapes, strict=True)
    }
    found: dict[Level, int] = {}
    for module, levels in _wanted(space).items():
        for level in levels:
            if (module, level) not in database:
                found[level] = found.get(level, 0) + level.storage_bits(shapes[module]) // 8
    return found


def _wanted(space: SearchSpace) -> dict[str, list[Level]]:
    """Module -> levels that the database must hold of it."""
    return {
        module: list(dict.fromkeys(lv for lv in stored if not isinstance(lv, UNCHANGED)))
        for layer, levels in zip(space.layers, space.levels, strict=True)
        for module, stored in zip(layer.modules, layer.stored_at(levels), strict=True)
    }


class _Builder:
    """One forward pass that solves layers as it reaches them."""

    def __init__(
        self,
        model: Any,
        wanted: Mapping[str, Sequence[Level]],
        windows: np.ndarray,
        database: LevelDatabase,
        prefix: Level,
        solver: Solver,
        progress: Advance,
        pool: Pool | None,
        threads: int | None,
    ) -> None:
        self.model, self.wanted, self.windows = model, wanted, windows
        self.database, self.prefix, self.solver = database, prefix, solver
        self.progress, self.threads = progress, threads
        self.shared = (
            None if pool is None else SharedSolving(pool, database.path, solver, database.enter)
        )
        self.dense: dict[str, Any] = {}  # the parameters that prefix weights replace
        # What feeds a narrower module waits for it to choose its inputs, with its own statistics.
        self.feeders: Mapping[str, Sequence[str]] = {}
        self.waiting: dict[str, Statistics] = {}

    def run(self) -> None:
        embedding = module_name(self.model, self.model.get_input_embeddings())
        head = module_name(self.model, self.model.get_output_embeddings())
        inside = [name for name in self.wanted if name not in (embedding, head)]
        groups = input_groups(self.model, inside)
        outside = [name for name in self.wanted if name in (embedding, head)]
        self.total, self.done = sum(map(self._missing, [*groups, *[(n,) for n in outside]])), 0
        pending = max((i for i, g in enumerate(groups) if self._missing(g)), default=-1)
        with self._sharing(), self._hooks(groups[: pending + 1]), torch.inference_mode():
            hidden = self._forward(groups, pending, bool(outside))
        with self._sharing(), torch.inference_mode():
            for group in groups[: pending + 1]:
                self._solve(
                    group, None
                )  # a layer that no token reached is rounded without statistics
            for name in outside:
                tied = name == embedding and head != embedding and self._tied()
                self._solve((name,), hidden if name == head or tied else None)

    @contextmanager
    def _sharing(self) -> Iterator[None]:
        """What workers were given while inside is solved when it ends, or dropped if it fails."""
        if self.shared is None:
            yield
            return
        try:
            yield
            self.shared.finish()
        finally:
            self.shared.drop()

    def _tied(self) -> bool:
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        return head.weight is embedding.weight

    def _missing(self, group: Sequence[str]) -> bool:
        """Whether the group lacks a level, or what waits for it does."""
        members = [*group, *(it for name in group for it in self.feeders.get(name, ()))]
        return any((m, level) not in self.database for m in members for level in self.wanted[m])

    def _forward(self, groups: Sequence[Sequence[str]], pending: int, full: bool) -> Tensor | None:
        if pending < 0 and not full:
            return None
        return hidden_states(self.model, torch.from_numpy(self.windows))

    @contextmanager
    def _hooks(self, groups: Sequence[Sequence[str]]) -> Iterator[None]:
        handles = []
        solved: set[int] = set()

        def reach(number: int, group: Sequence[str]) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                if number not in solved:
                    solved.add(number)
                    self._solve(group, args[0])
                    self._use_prefix(group)

            return hook

        try:
            for number, group in enumerate(groups):
                hook = reach(number, group)
                for name in group:
                    module = self.model.get_submodule(name)
                    handles.append(module.register_forward_pre_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, weight in self.dense.items():
                self.model.get_submodule(name).weight = weight

    def _solve(self, group: Sequence[str], inputs: Tensor | None) -> None:
        """Solve and store what the group lacks; `inputs` is (..., in), None for a lookup table."""
        if not self._missing(group):
            return
        self.progress(self.done, self.total)
        self.done += 1
        width = weight_of(self.model.get_submodule(group[0])).shape[1]
        statistics = input_statistics(inputs, width)
        levels = {level: None for name in group for level in self.wanted[name]}
        self._solve_levels(group, statistics, [lv for lv in levels if not isinstance(lv, Rows)])
        for name in group:
            if any(isinstance(level, Rows) for level in self.wanted[name]):
                self.waiting[name] = statistics
            for feeder in self.feeders.get(name, ()):
                self._solve_feeder(feeder, name)

    def _solve_feeder(self, feeder: str, writer: str) -> None:
        """The outputs of a feeder that its writer reads at each of its widths."""
        before = self.waiting.pop(feeder, Statistics(None, 0))
        widths = [level for level in self.wanted[writer] if isinstance(level, Width)]
        masks = {it.percent: self.database.kept(writer, it).view(-1, it.of)[:, 0] for it in widths}
        rows = [level for level in self.wanted[feeder] if isinstance(level, Rows)]
        self._solve_levels([feeder], replace(before, kept=masks), rows)

    def _solve_levels(
        self, group: Sequence[str], statistics: Statistics, levels: Sequence[Level]
    ) -> None:
        """Solve and store those of the levels that some of the group lacks."""
        lacking = [lv for lv in levels if any((m, lv) not in self.database for m in group)]
        weights = [self._weight(name).float() for name in group]
        first, rest = self._portions(group, lacking)
        if first:
            part = Group(tuple(group), tuple(first), statistics.tokens)
            self._solve_here(part, weights, statistics)
        if rest:
            part = Group(tuple(group), tuple(rest), statistics.tokens)
            solve = self._solve_here if self.shared is None else self.shared.add
            solve(part, weights, statistics)

    def _weight(self, name: str) -> Tensor:  # (out, in)
        """The dense weight: a feeder is at the prefix level by the time it is solved."""
        module = self.model.get_submodule(name)
        dense = self.dense.get(name, module.weight)
        weight: Tensor = dense.T if is_transposed(module) else dense
        return weight

    def _solve_here(self, group: Group, weights: Sequence[Tensor], statistics: Statistics) -> None:
        with limited_threads(self.threads):
            path = self.database.path
            self.database.enter(solve_group(group, weights, statistics, self.solver, path))

    def _portions(
        self, group: Sequence[str], lacking: Sequence[Level]
    ) -> tuple[list[Level], list[Level]]:
        """What the pass itself needs to go on, and what any process may solve meanwhile.

        Where workers are asked for, one of them divides as several do, whose bits are then its own.
        """
        if self.threads is None:
            return list(lacking), []
        needed = {self._prefix_of(name) for name in group}
        now = [lv for lv in lacking if lv in needed or isinstance(lv, Width | Rows)]
        return now, [lv for lv in lacking if lv not in now]

    def _prefix_of(self, name: str) -> Level:
        """The prefix level, or where the module cannot take it its nearest."""
        if (name, self.prefix) in self.database or self.prefix in self.wanted[name]:
            return self.prefix
        rows, width = weight_of(self.model.get_submodule(name)).shape
        return nearest(self.prefix, self.wanted[name], (rows, width))

    def _use_prefix(self, group: Sequence[str]) -> None:
        for name in group:
            level = self._prefix_of(name)
            if isinstance(level, Dense):
                continue
            module = self.model.get_submodule(name)
            self.dense[name] = module.weight
            set_weight(module, self.database.load(name, level).dense())


def input_statistics(inputs: Tensor | None, width: int) -> Statistics:
    """The Hessian of (..., in) inputs, accumulated in float32.

    NumPy's `x.T @ x` calls BLAS syrk: half the work of a general product, measured 2.3 times
    faster than torch's.
    """
    if inputs is None:
        return Statistics(None, 0)
    flat = inputs.reshape(-1, width)
    total = np.zeros((width, width), dtype=np.float32)
    for chunk in torch.split(flat, 8192):
        x = chunk.float().numpy()
        total += x.T @ x
    return Statistics(torch.from_numpy(total).div_(max(1, flat.shape[0])), flat.shape[0])
