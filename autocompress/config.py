"""What one search needs: TOML and flags -> `StudyConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, get_type_hints

from autocompress.cost import LOSS, limited_cost
from autocompress.documents import SplitTokens
from autocompress.effort import WARM, Plan, effort_tokens, plan, share
from autocompress.errors import ConfigError
from autocompress.levels import Level, parse_level
from autocompress.ranges import check_beside, range_texts
from autocompress.spaces import Pin, parse_pin
from autocompress.tables import check_keys, did_you_mean, read_toml
from autocompress.targets import MODES, Target
from autocompress.workers import Workers

DTYPES = ("auto", "bfloat16", "float32")
METHODS = ("gptq", "rtn")
DEFAULT_SPACE = "quant-2-8"
MINIMIZE = ("bytes", "latency")


@dataclass(frozen=True)
class StudyConfig:
    """Everything a search needs; values only, nothing is opened or loaded.

    Raises:
        AutocompressError: a value is out of range (`ConfigError`), a pin (`SpaceError`), a level
            (`LevelError`), split sizes (`CalibrationError`), target (`LatencyError`) or workers
            (`WorkerError`) are wrong.
    """

    model: str | None = None  # folder, GGUF file or Hub id; None is the default model
    space: str | None = (
        None  # built-in search space or path of a TOML file; None is the default, or the runtime's
    )
    runtime: str | None = None  # what must load the result: a name in `runtimes`; None is ours
    budgets: tuple[str, ...] = ()  # upper limits, '3.5bits'; empty only to build a database
    minimize: str | None = None  # under a limit on KL: 'bytes' (the default) or 'latency'
    pareto: str | None = None  # in place of one limit a range, 'bits=2.5..6': a whole front
    points: int = 6  # limits in that range, both ends included: models of the front, 2 to 64
    pins: tuple[str, ...] = ()  # 'pattern=level', win over those of the space
    calibration: str | None = None  # what `read_documents` reads; None is the built-in text
    window: int = 512  # tokens per window, at least 2
    tokens: SplitTokens = field(default_factory=SplitTokens)  # tokens per split
    seed: int = 0  # 0 ... 2**32 - 1; splits, windows and strategies derive from it
    strategy: str = "auto"  # name in the strategy registry
    effort: str = "normal"  # how many tokens `auto` may spend: 'quick', 'normal' or 'thorough'
    spend: int | None = None  # tokens it may spend, in place of an effort
    warm: int | None = None  # of the first search in `run`: this one spends an eighth, and shares
    sensitivity_tokens: int | None = None  # that first gradients see; None is what `spend` affords
    generations: int | None = None  # of evolution, at least 0; None is the strategy's default
    offspring: int | None = None  # per generation, at least 1; None is the strategy's default
    method: str = "gptq"  # how the database rounds: 'gptq' or 'rtn'
    prefix: str | None = None  # level that calibration activations passed through; see the docs
    dtype: str = "auto"  # of forwards: 'auto' (fast and safe here), 'bfloat16' or 'float32'
    target: str = "cpu"  # whose latency budgets limit: this machine, an exported store, a name
    threads: int | None = None  # of the target, at least 1; None is what torch uses
    batch: int = 1  # sequences that the target decodes at once, 1 to 32
    prompt: int = 128  # tokens that the target reads before it decodes, at least 1
    decode: float = 1.0  # share of decoded tokens among all, 0 to 1; the others are read
    activations: str = "int8"  # inside kernels: 'int8', 'bfloat16' or 'float32' (exact)
    workers: int | None = None  # processes that score and solve; None is this one alone
    worker_threads: int = 1  # of each
    backend: str = "loky"  # what runs them: 'loky' (on this machine), 'dask' or 'ray'
    scheduler: str | None = None  # address of its cluster; None is one of this process or machine
    out: Path = Path("compressed")  # folder of the result
    run: Path | None = None  # folder of database and study; None is `<out>.run`
    storage: str | None = None  # of the Optuna study, an URL or a path; None is a journal in `run`

    def __post_init__(self) -> None:
        self._check_strings()
        self._check_choices()
        self.tokens.check_window(self.window)
        self._check_numbers()
        self.prefix_level()
        self.parsed_pins()
        self.parsed_target()
        self.parsed_workers()
        self._check_folders()
        self._check_aims()

    @property
    def run_folder(self) -> Path:
        """Where database and study live."""
        if self.run is not None:
            return self.run
        out = self.out if self.out.name.strip(".") else self.out.resolve()  # '.' has no name
        return out.with_name(f"{out.name}.run")

    def spending(self, available: int) -> Plan:
        """What the token budget is spent on.

        Args:
            available: tokens of the search split.
        """
        found = plan(self.full_tokens, self.window, available)
        if self.warm is not None:
            first = plan(self.warm, self.window, available)
            found = share(first, self.warm // WARM, self.window, available)
        if self.sensitivity_tokens is None:
            return found
        return replace(found, sensitivities=self.sensitivity_tokens)

    @property
    def range_limits(self) -> tuple[str, ...]:
        """The limits of a front's points, as budgets are written; none without a range."""
        return () if self.pareto is None else range_texts(self.pareto, self.points)

    @property
    def limits(self) -> tuple[str, ...]:
        """Everything that is limited, as budgets are written: the range of a front, budgets."""
        return (*self.range_limits, *self.budgets)

    @property
    def full_tokens(self) -> int:
        """Tokens that a search may spend which begins with nothing."""
        named = effort_tokens(self.effort)  # must exist, used or not
        return named if self.spend is None else self.spend

    def prefix_level(self) -> Level | None:
        """`prefix` as a level; None leaves it to the space, see `prefix_levels.default_prefix`."""
        return None if self.prefix is None else parse_level(self.prefix)

    def parsed_pins(self) -> tuple[Pin, ...]:
        """`pins` as (pattern, level)."""
        return tuple(parse_pin(pin) for pin in self.pins)

    def parsed_target(self) -> Target:
        """`target` and how it is used."""
        return Target(
            self.target,
            threads=self.threads,
            batch=self.batch,
            prompt=self.prompt,
            decode=self.decode,
            mode=MODES[self.activations],
        )

    def parsed_workers(self) -> Workers:
        """Which processes compute."""
        return Workers(self.workers, self.worker_threads, self.backend, self.scheduler)

    def _check_choices(self) -> None:
        choices_of = {"dtype": DTYPES, "method": METHODS, "activations": tuple(MODES)}
        choices_of["minimize"] = MINIMIZE
        for name, choices in choices_of.items():
            got = getattr(self, name)
            if got not in choices and (name, got) != ("minimize", None):
                hint = did_you_mean(str(got), choices)
                raise ConfigError(f"{name} must be one of {', '.join(choices)}. Got '{got}'.{hint}")

    def _check_aims(self) -> None:
        limited = set(map(limited_cost, self.budgets))
        if self.minimize is not None and LOSS not in limited:
            raise ConfigError(
                f"--minimize must go with a limit on the loss. Got --minimize {self.minimize} "
                "alone. Add --budget 0.05KL."
            )
        check_beside(self.range_limits, self.budgets)

    def _check_numbers(self) -> None:
        _check_range("seed", self.seed, 0, 2**32 - 1)
        _check_range("points", self.points, 2, 64)
        _check_range("generations", self.generations, 0, 10**9)
        _check_range("offspring", self.offspring, 1, 10**6)
        self.spending(self.tokens.search)
        _check_range("sensitivity_tokens", self.sensitivity_tokens, 1, self.tokens.search)
        if (self.sensitivity_tokens or 0) % self.window:
            raise ConfigError(
                f"sensitivity_tokens must be a multiple of the window, {self.window}. "
                f"Got {self.sensitivity_tokens}."
            )

    def _check_strings(self) -> None:
        for name in (
            *("model", "space", "runtime", "calibration", "strategy", "storage", "target"),
            *("pareto", "scheduler"),
        ):
            got = getattr(self, name)
            if got is not None and not got.strip():
                raise ConfigError(f"{name} must not be blank. Name one, or leave it out.")
        for name in ("budgets", "pins"):
            got = getattr(self, name)
            if isinstance(got, str):  # a tuple of its characters would follow
                raise ConfigError(f"{name} must be a tuple of strings. Got '{got}' alone.")
        if any(not budget.strip() for budget in self.budgets):
            raise ConfigError("a budget must not be blank. Write a limit such as '3.5bits'.")

    def _check_folders(self) -> None:
        if not self.out.resolve().name:
            raise ConfigError(f"out must be a folder that can be made. Got '{self.out}'.")
        if self.run_folder.resolve().is_relative_to(self.out.resolve()):
            raise ConfigError(
                f"run must be a folder outside of out, '{self.out}'. Got '{self.run}'. "
                "Leave it out for the default beside it."
            )

    @classmethod
    def from_toml(cls, path: Path, **flags: Any) -> Self:
        """The study in a TOML file; paths in it are relative to the current directory.

        Args:
            path: keys are the fields of this class; split sizes stand in a table `[tokens]`.
            flags: fields that win over the file, already typed.

        Raises:
            AutocompressError: not readable, not TOML, an unknown key or a wrong value.
        """
        return cls(**{**read_file(path), **flags})


def read_file(path: Path) -> dict[str, Any]:
    """The fields of `StudyConfig` that a TOML file sets; see `StudyConfig.from_toml`."""
    table, _ = read_toml(path, ConfigError)
    return read_settings(table, f"{path}: ")


def read_settings(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A table of plain values as fields of `StudyConfig`.

    Args:
        where: what errors begin with.

    Raises:
        AutocompressError: an unknown key or a wrong value.
    """
    return _typed(table, StudyConfig, where)


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a configuration from what Python callers write: paths, and targets as a whole."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, str | Path):  # either will do, whatever the field's type
            found[name] = Path(value) if name in ("out", "run") else str(value)
        elif isinstance(value, Target):
            mode = next(key for key, mode in MODES.items() if mode == value.mode)
            uses = {it: getattr(value, it) for it in ("threads", "batch", "prompt", "decode")}
            found |= {name: value.name, "activations": mode, **uses}
        else:
            found[name] = value
    return found


def _check_range(name: str, value: int | None, low: int, high: int) -> None:
    """Check an optional integer; both limits are allowed values."""
    if value is not None and not low <= value <= high:
        raise ConfigError(f"{name} must be between {low} and {high}. Got {value}.")


def _typed(table: Mapping[str, Any], cls: type, where: str) -> dict[str, Any]:
    """The values of a TOML table as the types of the dataclass's fields."""
    hints = get_type_hints(cls)
    check_keys(table, [f.name for f in fields(cls)], ConfigError, where)
    return {key: _value(hints[key], raw, f"{where}{key}") for key, raw in table.items()}


def _value(hint: Any, raw: Any, where: str) -> Any:
    """A TOML value as one field's type."""
    if hint is SplitTokens and isinstance(raw, Mapping):
        return SplitTokens(**_typed(raw, SplitTokens, f"{where}."))
    if hint == tuple[str, ...] and isinstance(raw, list) and all(isinstance(v, str) for v in raw):
        return tuple(raw)
    if hint in (int, int | None) and isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if hint is float and isinstance(raw, int | float) and not isinstance(raw, bool):
        return float(raw)
    if hint in (str, str | None) and isinstance(raw, str):
        return raw
    if hint in (Path, Path | None) and isinstance(raw, str) and raw.strip():
        return Path(raw)
    raise ConfigError(f"{where} must be {_wanted(hint)}. Got {raw!r}.")


def _wanted(hint: Any) -> str:
    if hint is SplitTokens:
        return "a table with calibrate, search, validate, test"
    if hint == tuple[str, ...]:
        return 'a list of strings, such as ["3.5bits"]'
    if hint in (int, int | None):
        return "an integer"
    if hint is float:
        return "a number"
    return "a string that is not blank" if hint in (Path, Path | None) else "a string"
