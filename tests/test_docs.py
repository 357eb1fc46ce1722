"""The documentation builds without a warning and covers every public name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import autocompress

ROOT = Path(__file__).parents[1]


def test_the_documentation_builds_strictly_and_names_everything(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0, built.stderr
    pages = "".join(page.read_text() for page in tmp_path.glob("api/*.html"))
    for name, home in autocompress._HOMES.items():
        assert f'id="{home}.{name}"' in pages, f"'{name}' must be on a page of docs/api"

    assert "HillClimbing" in pages, "examples are shown"


def test_links_of_pages_lead_to_files() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
