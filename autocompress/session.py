"""A session: model, space, windows, costs and database of one run folder, opened and checked."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import Any

from autocompress.build import build_database, lacking_bytes
from autocompress.calibration import calibration_windows
from autocompress.config import DEFAULT_SPACE, StudyConfig
from autocompress.core import CostTable, SearchSpace
from autocompress.cost import size_tables
from autocompress.database import LevelDatabase, database_identity
from autocompress.domination import find_dominated
from autocompress.effort import Plan
from autocompress.exporters.native import other_bytes, outside_bytes
from autocompress.files import fingerprint
from autocompress.latency import Dropped, restrict
from autocompress.levels import Dense, Level
from autocompress.machine import compute_dtype
from autocompress.models import LoadedModel, load_model
from autocompress.operators import Solver
from autocompress.parameters import parameter_costs
from autocompress.parts import module_parts
from autocompress.plans import BuildPlan
from autocompress.prefix_levels import default_prefix
from autocompress.progress import Progress
from autocompress.run_record import known_space
from autocompress.runtimes import Runtime, find_runtime
from autocompress.runtimes.rules import legal_space, runtime_space
from autocompress.solving import families
from autocompress.spaces import SpaceConfig, build_space, load_space
from autocompress.structure import layers_for
from autocompress.text import first_token
from autocompress.windows import Windows
from autocompress.workers import Pool

SPLIT_SEED = 0  # a search's seed never moves text between splits: seeds stay comparable


@dataclass
class Session:
    """Everything a search needs before it spends its first token.

    Args:
        space: the run folder's, all of whose levels the database has.
        searched: what is searched now: `space`, or a part of it.
        seconds: wall time by phase, filled by `clock`.
        dominated: levels that the search was not offered, filled by `undominated`.
    """

    config: StudyConfig
    loaded: LoadedModel
    space: SearchSpace
    searched: SearchSpace
    costs: tuple[CostTable, ...]
    windows: Windows
    database: LevelDatabase
    solver: Solver
    progress: Progress
    scope: tuple[str, ...]  # parts of the model that the space's layers are in
    seconds: dict[str, float] = field(default_factory=dict)
    dominated: tuple[Dropped, ...] = ()

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to a phase, without that of clocks started inside it."""
        start, counted = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inner = sum(self.seconds.values()) - counted
            spent = time.perf_counter() - start - inner
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    @property
    def prefix(self) -> Level:
        """The level that calibration activations passed through."""
        return self.config.prefix_level() or default_prefix(self.space)

    @property
    def spending(self) -> Plan:
        """What the search's token budget is spent on."""
        return self.config.spending(int(self.windows.search.size))

    def facts(self) -> dict[str, Any]:
        """What every loss depends on; budgets, seeds and strategies may change in one study."""
        rows = zip(self.space.layers, self.space.levels, strict=True)
        layers = [[layer.name, *map(str, allowed)] for layer, allowed in rows]
        return {
            "model": self.loaded.fingerprint,
            "space": fingerprint(layers),
            "database": fingerprint(self.database.identity),
            "calibration": self.windows.record(),
        }


def model_space(name: str, model: str | None) -> SearchSpace:
    """The search space of a name or a TOML file over a model's layers.

    Raises:
        AutocompressError: no such space or model, or they do not fit.
    """
    chosen = load_space(name)
    loaded = load_model(model, compute_dtype("auto"))
    return build_space(chosen, layers_for(loaded.model, chosen))


def open_session(config: StudyConfig, progress: Progress, plan: BuildPlan | None = None) -> Session:
    """Load the model, find its layers, split the text, open the database; nothing is computed.

    Args:
        plan: names the levels in place of the configuration's space.

    Raises:
        AutocompressError: any input is wrong.
    """
    runtime = None if config.runtime is None else find_runtime(config.runtime)
    wanted = wanted_space(config, runtime)
    dtype = compute_dtype(config.dtype)
    progress.say(f"loading {config.model or 'the default model'}")
    loaded = load_model(config.model, dtype)
    scope = wanted.scope if plan is None else plan.scope
    layers = layers_for(loaded.model, plan or wanted)
    if plan is not None:
        searched = plan.build_space(layers)
    elif runtime is None:
        searched = build_space(wanted, layers, config.parsed_pins())
    else:
        modules = module_parts(loaded.model)
        searched, notes = legal_space(runtime, wanted, layers, modules, config.parsed_pins())
        for note in notes:
            progress.say(note)
    space = known_space(config.run_folder, searched)
    prefix = config.prefix_level() or default_prefix(space)
    config = replace(config, prefix=str(prefix))  # what is written down must not depend on a space
    windows = calibration_windows(
        config.calibration,
        lambda text: loaded.tokenizer(text, add_special_tokens=False)["input_ids"],
        config.window,
        config.tokens,
        SPLIT_SEED,
        loaded.tokenizer.eos_token_id,
        first_token(loaded.tokenizer),
    )
    solver = Solver(method=config.method, scale_bits=runtime.scale_bits if runtime else 11)
    identity = database_identity(
        loaded.fingerprint, windows.calibrate, prefix, solver, str(dtype), chain(*space.levels)
    )
    database = LevelDatabase.open(config.run_folder / "database", identity)
    sizes = file_costs(loaded.model, space, runtime)
    costs = (*sizes, *parameter_costs(space, config.limits))
    return Session(
        config, loaded, space, searched, costs, windows, database, solver, progress, scope
    )


def wanted_space(config: StudyConfig, runtime: Runtime | None) -> SpaceConfig:
    """The space that is named, or the runtime's own, or the default.

    Raises:
        SpaceError: no such space or file, or the file is wrong.
    """
    if config.space is None and runtime is not None:
        return runtime_space(runtime)
    return load_space(config.space or DEFAULT_SPACE)


def file_costs(
    model: Any, space: SearchSpace, runtime: Runtime | None
) -> tuple[CostTable, CostTable]:
    """Bits in scope, and bytes of the weights file, which each runtime has its own form of."""
    if runtime is None:
        return size_tables(space, other_bytes(model, space))
    bits, whole = size_tables(space, outside_bytes(model, space))
    entries = tuple(
        {
            level: count + sum(map(runtime.extra_bytes, layer.modules, repeat(level), layer.shapes))
            for level, count in entry.items()
        }
        for layer, entry in zip(space.layers, whole.entries, strict=True)
    )
    return bits, replace(whole, entries=entries)


def complete_database(session: Session, pool: Pool | None = None) -> None:
    """Build what the session's database lacks; does nothing when it is complete.

    Args:
        pool: workers that help.
    """
    database, space = session.database, session.space
    lacking = lacking_bytes(database, space)
    if lacking:
        session.progress.say(
            f"level database: {len(lacking)} levels to build, {sum(lacking.values()) / 1e6:,.0f} MB"
        )
    with session.clock("database"), session.progress.task("level database") as advance:
        build_database(
            session.loaded.model,
            space,
            session.windows.calibrate,
            database,
            prefix=session.prefix,
            solver=session.solver,
            progress=advance,
            pool=pool,
            threads=session.config.parsed_workers().own_threads,
        )
    for family in families(list(lacking)):
        sizes = ", ".join(f"{level} ({lacking[level] / 1e6:,.1f} MB)" for level in family)
        spent = sum(database.seconds.get(str(level), 0.0) for level in family)
        together = " together" if len(family) > 1 else ""
        session.progress.say(f"level database: {sizes} took {spent:,.1f} s{together}")


def undominated(session: Session, space: SearchSpace, costs: Sequence[CostTable]) -> SearchSpace:
    """The space without levels that are no smaller, no faster and no better than others.

    Args:
        space: of the session, or what a target leaves of it; its database is complete.
        costs: what counts as smaller or faster.
    """

    def error(module: str, level: Level) -> float:
        if isinstance(level, Dense):
            return 0.0
        known = (module, level) in session.database
        return session.database.error(module, level) if known else math.nan

    session.dominated = find_dominated(space, costs, error)
    for entry in session.dominated:
        session.progress.say(
            f"left out: {entry.level} of {len(entry.layers)} layers, {entry.reason}"
        )
    return restrict(space, session.dominated)
