"""The native format again: the packed result itself, to publish beside other exports."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocompress.errors import OutputError
from autocompress.exporters.source import Source
from autocompress.exporters.writing import write_companions
from autocompress.files import write_atomically
from autocompress.integration import WEIGHTS
from autocompress.runtimes import Runtime


@dataclass(frozen=True)
class NativeExporter:
    """Copies the packed weights; see `native.py` for the format."""

    reader: str = "native"

    def write(self, source: Source, runtime: Runtime | None, out: Path) -> dict[str, Any]:
        if runtime is not None:
            raise OutputError(
                f"the native format must be for autocompress itself. Got --runtime {runtime.name}. "
                "Leave it out, or choose its format."
            )
        weights = source.folder / WEIGHTS

        def copy(draft: Path) -> None:
            shutil.copyfile(weights, draft)

        write_atomically(out / WEIGHTS, copy)
        config = source.config | {"quantization_config": source.packing}
        write_companions(source, config, out)
        return {"files": [WEIGHTS], "bytes": int(source.manifest["total_bytes"])}


EXPORTER = NativeExporter()
