"""Targets: where and how a model will run, and who prices its layers there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from autocompress.core import CostTable, SearchSpace
from autocompress.cost import LATENCY
from autocompress.errors import LatencyError
from autocompress.tables import did_you_mean

MODES = {"int8": "a8", "bfloat16": "a16", "float32": "a32"}  # of activations inside kernels
RUNTIME = ("native", "aten", "dense", "dequantize")
MOST_THREADS, MOST_ROWS, LONGEST_PROMPT = 1024, 32, 1 << 20


@dataclass(frozen=True)
class Target:
    """A device, a runtime and a way to use it; latency is ms per token of each sequence there.

    Args:
        name: 'cpu' is this machine, '….json' another one's exported latency store, else a target
            that Python registered.
        threads: that a forward pass may use; None is what torch would use.
        batch: sequences that are decoded at once, 1 to 32; rows of every layer's input.
        prompt: tokens that are read before the first is decoded, at least 1.
        decode: share of decoded tokens among all, 0 to 1; the others are read as prompts.
        mode: activations inside kernels: 'a8' (int8), 'a16' (bfloat16) or 'a32' (float32).
        runtime: backends in the order they are tried.

    Raises:
        LatencyError: a value is out of range.
    """

    name: str = "cpu"
    threads: int | None = None
    batch: int = 1
    prompt: int = 128
    decode: float = 1.0
    mode: str = "a8"
    runtime: tuple[str, ...] = RUNTIME
    device: str = "cpu"

    def __post_init__(self) -> None:
        _check_range("threads", self.threads, 1, MOST_THREADS)
        _check_range("batch", self.batch, 1, MOST_ROWS)
        _check_range("prompt", self.prompt, 1, LONGEST_PROMPT)
        _check_range("decode", self.decode, 0, 1)
        if self.mode not in MODES.values():
            known = ", ".join(MODES.values())
            raise LatencyError(f"a target's mode must be one of {known}. Got '{self.mode}'.")
        if self.device != "cpu":
            raise LatencyError(
                f"a target with kernels must be a CPU. Got device '{self.device}', for which no "
                "kernel is built here. Register its costs: see docs/latency.md."
            )

    @property
    def is_local(self) -> bool:
        """Whether this machine is meant, so that models can be timed here."""
        return self.name == "cpu"

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that count: 'decode', 'prefill' or both."""
        shares = {"decode": self.decode, "prefill": 1 - self.decode}
        return tuple(phase for phase, share in shares.items() if share)

    def weigh(self, phase: str, milliseconds: float) -> float:
        """What a pass of `phase` adds to the latency per token: a prefill reads many tokens."""
        if phase == "decode":
            return self.decode * milliseconds
        return (1 - self.decode) * milliseconds / self.prompt

    def describe(self) -> str:
        """'decode at batch 1 after 128 tokens'."""
        decode = f"decode at batch {self.batch} after {self.prompt} tokens"
        prefill = f"prefill of {self.prompt} tokens at batch {self.batch}"
        if self.decode in (0, 1):
            return decode if self.decode else prefill
        return f"{self.decode:.0%} {decode}, {1 - self.decode:.0%} {prefill}"


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise LatencyError(f"{name} must be between {low} and {high}. Got {value}.")


PriceFunction = Callable[[SearchSpace, Target], CostTable]  # named 'latency', in ms per token
TARGETS: dict[str, PriceFunction] = {}  # beside 'cpu' and exported stores


def register_target(name: str) -> Callable[[PriceFunction], PriceFunction]:
    """Make a function the target `name`: it prices every level of every layer of a space.

    The table is named 'latency', in ms per token; a level that cannot run there costs infinity.
    """

    def register(function: PriceFunction) -> PriceFunction:
        TARGETS[name] = function
        return function

    return register


def find_target(name: str) -> PriceFunction | Path | None:
    """Who prices `name`: a registered function, a store's file, or None for this machine.

    Args:
        name: 'cpu', a path that ends in '.json', a registered name, or 'module:function'.

    Raises:
        LatencyError: there is no such target.
    """
    if name == "cpu":
        return None
    if name in TARGETS:
        return TARGETS[name]
    if name.endswith(".json"):
        return Path(name).expanduser()
    module, colon, function = name.partition(":")
    if colon:
        try:
            return getattr(import_module(module), function)  # type: ignore[no-any-return]
        except (ImportError, AttributeError, ValueError) as error:
            raise LatencyError(
                f"a target 'module:function' must be importable. Got '{name}': {error}."
            ) from error
    known = ("cpu", *TARGETS)
    raise LatencyError(
        f"a target must be {', '.join(known)}, the path of an exported latency store (….json) or "
        f"'module:function'. Got '{name}'.{did_you_mean(name, known)}"
    )


def checked_table(table: CostTable, space: SearchSpace, name: str) -> CostTable:
    """A registered function's table, if it prices the whole space.

    Raises:
        LatencyError: it has another name, lacks a level or holds a price that is no time.
    """
    if table.name != LATENCY or table.unit != "ms" or len(table.entries) != len(space.layers):
        raise LatencyError(
            f"the target '{name}' must return a table '{LATENCY}' in ms with {len(space.layers)} "
            f"entries. Got '{table.name}' in {table.unit} with {len(table.entries)}."
        )
    for layer, allowed, entry in zip(space.layers, space.levels, table.entries, strict=True):
        for level in allowed:
            if not entry.get(level, -1.0) >= 0:
                raise LatencyError(
                    f"the target '{name}' must price every level at 0 ms or more, infinity where "
                    f"it cannot run. Got {entry.get(level)} for '{layer.name}' at {level}."
                )
    return table
