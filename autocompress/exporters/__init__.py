"""Exporters: a finished result as a folder that others load.

To add one, write a module here with a value of `Exporter`'s form called `EXPORTER`, and enter it in
`HOMES`. Every exporter writes from a `Source`, the packed result on disk, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from autocompress.errors import OutputError
from autocompress.tables import did_you_mean

if TYPE_CHECKING:
    from autocompress.exporters.source import Source
    from autocompress.runtimes import Runtime

HOMES: Mapping[str, str] = {  # format -> module
    "compressed-tensors": "autocompress.exporters.packed_integers",
    "gguf": "autocompress.exporters.gguf",
    "dense": "autocompress.exporters.dense",
    "peft": "autocompress.exporters.adapter",
    "plan": "autocompress.exporters.plan",
    "native": "autocompress.exporters.copy",
}


class Exporter(Protocol):
    """Writes one format.

    Args:
        reader: how a fresh process reads it back (`reader.py`); None where there is no model in it.
    """

    @property
    def reader(self) -> str | None: ...

    def write(self, source: Source, runtime: Runtime | None, out: Path) -> dict[str, Any]:
        """Write the model's files into the folder `out`, which exists.

        Returns:
            Facts for the manifest: at least `files`, names of weight files, and `bytes`, what they
            hold at most by the cost table. Where a loader cannot hold decoded weights exactly,
            `rounded` says what to, by part (`Source.decoded`); modules that get their inputs
            rounded to 8 bits while running are named in `int8_activations`.

        Raises:
            AutocompressError: the format or the runtime cannot take the source's levels.
        """


def find_exporter(name: str) -> Exporter:
    """The exporter of a format.

    Raises:
        OutputError: there is none.
    """
    if name not in HOMES:
        raise OutputError(
            f"a format must be one of {', '.join(HOMES)}. Got '{name}'.{did_you_mean(name, HOMES)}"
        )
    exporter: Exporter = import_module(HOMES[name]).EXPORTER
    return exporter
