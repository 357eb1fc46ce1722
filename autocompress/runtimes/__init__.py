"""Runtimes: who else loads what we write, and which levels each of them can run.

To add one, write a file here with a value that has the attributes of `Runtime`, and enter it in
`RUNTIMES`. `rules.py` turns its answers into legal search spaces and checked allocations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from autocompress.errors import SpaceError
from autocompress.levels import Level, Shape
from autocompress.runtimes.compressed_tensors import PRESETS
from autocompress.runtimes.gguf import GGUF
from autocompress.tables import did_you_mean

__all__ = ["PARTS", "RUNTIMES", "Runtime", "find_runtime"]

# Where a module stands in its model: a linear of a block, of an expert in a mixture of experts,
# a GPT-2 `Conv1D`, the embedding (with the head, where they are tied), the head.
PARTS = ("blocks", "experts", "conv1d", "embedding", "head")


class Runtime(Protocol):
    """What can be loaded elsewhere.

    Args:
        name: of `--runtime`.
        summary: one line for people.
        format: name of the exporter that writes for it.
        levels: of a search that names no space, in the order of a space's file.
        scope: parts of the model in such a search.
        tie: groups of last name components that it fuses: they must share one level.
        ties_experts: whether all experts of the model must share one level.
        scale_bits: significant bits of scales: 11 are any fp16, 8 are exact in bf16 too.
    """

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str: ...

    @property
    def format(self) -> str: ...

    @property
    def levels(self) -> tuple[Level, ...]: ...

    @property
    def scope(self) -> tuple[str, ...]: ...

    @property
    def tie(self) -> tuple[tuple[str, ...], ...]: ...

    @property
    def ties_experts(self) -> bool: ...

    @property
    def scale_bits(self) -> int: ...

    def refuses(self, level: Level, shape: Shape, part: str) -> str | None:
        """Why a weight of `shape` (out, in) in `part` cannot be at `level`; None where it can."""

    def extra_bytes(self, name: str, level: Level, shape: Shape) -> int:
        """Bytes of its file for a module beyond `level.storage_bits`, at most; header included."""


RUNTIMES: Mapping[str, Runtime] = {runtime.name: runtime for runtime in (*PRESETS, GGUF)}


def find_runtime(name: str) -> Runtime:
    """The runtime called `name`.

    Raises:
        SpaceError: there is none.
    """
    if name not in RUNTIMES:
        raise SpaceError(
            f"a runtime must be one of {', '.join(RUNTIMES)}. "
            f"Got '{name}'.{did_you_mean(name, RUNTIMES)}"
        )
    return RUNTIMES[name]
