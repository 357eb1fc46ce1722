"""The Debian Administrator's Handbook as one JSON line per page: a text for `--calibration`.

apt-get install debian-handbook
python studies/main_job/handbook_text.py /usr/share/doc/debian-handbook/html/en-US handbook.jsonl
"""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

SKIPPED = {"script", "style", "pre", "head"}
BREAKS = {"p", "li", "h1", "h2", "h3", "h4", "dd", "dt", "td", "div", "section"}
LINE, PAGE = 40, 400  # characters; shorter lines are navigation, shorter pages are indexes


class Prose(HTMLParser):
    """Collects a page's text, a line for every block."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.inside = 0  # of what is skipped

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.inside += tag in SKIPPED
        if tag in BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.inside -= tag in SKIPPED and self.inside > 0
        if tag in BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.parts.append(data.replace("\n", " "))


def main(folder: str, out: str) -> None:
    """Write every page of a folder."""
    with Path(out).open("w") as file:
        for page in sorted(Path(folder).glob("*.html")):
            prose = Prose()
            prose.feed(page.read_text())
            lines = (re.sub(r"\s+", " ", line).strip() for line in "".join(prose.parts).split("\n"))
            text = "\n".join(line for line in lines if len(line) > LINE)
            if len(text) > PAGE:
                file.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
