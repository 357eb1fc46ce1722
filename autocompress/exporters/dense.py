"""Decoded weights in bf16: any tool loads it, only dropped blocks make it smaller.

`Source` is where the model that is written differs from the one that was searched: `depth.py` takes
dropped blocks out of it and out of its configuration, so that nothing here knows of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from autocompress.errors import OutputError
from autocompress.exporters.native import STORAGE
from autocompress.exporters.shards import Piece, write_weights
from autocompress.exporters.source import Source
from autocompress.exporters.writing import write_companions
from autocompress.runtimes import Runtime


@dataclass(frozen=True)
class DenseExporter:
    """Writes a plain Hugging Face folder."""

    reader: str = "transformers"

    def write(self, source: Source, runtime: Runtime | None, out: Path) -> dict[str, Any]:
        if runtime is not None:
            raise OutputError(
                f"a dense export must name no runtime, as any loads it. Got {runtime.name}. "
                "Leave --runtime out."
            )
        files = write_weights(out, list(_pieces(source)))
        config = source.config | {"dtype": str(STORAGE).removeprefix("torch.")}
        write_companions(source, config, out)
        return {
            "files": files,
            "bytes": _bytes(source),
            "rounded": {"*": config["dtype"]},
        }


EXPORTER = DenseExporter()


def _bytes(source: Source) -> int:
    """What every tensor takes in 16 bits, tied ones once, and the file's header at most."""
    tensors = source.model.state_dict(keep_vars=True)
    own = {id(tensor): tensor for tensor in tensors.values()}
    return 400 * len(tensors) + 2 * sum(tensor.numel() for tensor in own.values())


def _pieces(source: Source) -> Iterable[Piece]:
    for name in source.levels:
        rows, width = source.shape(name)
        yield Piece(2 * rows * width, partial(_decoded, source, name))
    for name in source.plain():
        yield Piece(source.full(name).nbytes, partial(_plain, source, name))


def _decoded(source: Source, name: str) -> dict[str, Tensor]:
    weight = source.weight(name).to(STORAGE)
    weight = weight.T if source.parts.get(name) == "conv1d" else weight
    return {f"{source.their(name)}.weight": weight}


def _plain(source: Source, name: str) -> dict[str, Tensor]:
    return {source.their(name): source.full(name)}
