"""What stands beside the weights: configuration, tokenizer, generation settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from autocompress.exporters.source import Source
from autocompress.files import disk_errors, write_json
from autocompress.folders import MANIFEST, MARK
from autocompress.integration import WEIGHTS

# Not copied: the source's own, and what is written anew.
OWN = (MANIFEST, MARK, WEIGHTS, "config.json", "report.md", "report.html", "README.md")


def write_companions(source: Source, config: dict[str, Any], out: Path) -> None:
    """Copy the tokenizer's files, then write config.json: last, so that no loader begins early.

    Raises:
        OutputError: the disk refused.
    """
    with disk_errors(out):
        for path in source.folder.iterdir():
            if (
                path.is_file()
                and path.name not in OWN
                and path.suffix in (".json", ".jinja", ".model", ".txt")
            ):
                shutil.copyfile(path, out / path.name)
    write_json(out / "config.json", json.loads(json.dumps(config, default=str)))
