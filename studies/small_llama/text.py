"""The small Llama's documents: Debian's PostgreSQL and SQLite manuals as plain text."""

import hashlib
import html.parser
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("postgresql-doc-15", "sqlite3-doc")
HELD_OUT_EVERY = 10  # one page in ten is never trained on
# Indices and tables that a program wrote; capi3ref.html repeats the pages of c3ref/.
GENERATED = re.compile(r"crossref|keyword_index|bookindex|requirements|matrix|sqlanalyze|^capi3ref")
BOILERPLATE = 20  # a line on more pages than this is navigation, not prose
BREAKS = {"p", "div", "li", "tr", "br", "pre", "h1", "h2", "h3", "h4", "h5", "dt", "dd", "table"}
HIDDEN = {"script", "style", "head", "svg"}


@dataclass
class _Text(html.parser.HTMLParser):
    """Collects what a reader sees: text without scripts, navigation and markup."""

    pieces: list[str] = field(default_factory=list)
    hidden: int = 0  # how many open elements hide what they hold
    pre: int = 0

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in HIDDEN
        self.pre += tag == "pre"
        if tag in BREAKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(self.hidden - (tag in HIDDEN), 0)
        self.pre = max(self.pre - (tag == "pre"), 0)
        if tag in BREAKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.pieces.append(data if self.pre else re.sub(r"\s+", " ", data))


def plain_text(page: str) -> str:
    """What a reader of an HTML page sees, one paragraph a line, blank lines collapsed."""
    parser = _Text()
    parser.feed(page)
    lines = [line.rstrip() for line in "".join(parser.pieces).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def download(folder: Path) -> None:
    """Fetches and unpacks the Debian packages into `folder`, without installing them."""
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=temporary, check=True)
        for package in sorted(Path(temporary).glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)


def held_out(name: str) -> bool:
    """Whether a page is kept out of training, by a hash of its name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_EVERY == 0


def documents(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Pages to train on and pages to keep out, name → text, in the order of their names."""
    pages = {
        path.relative_to(folder).as_posix(): plain_text(path.read_text("utf-8", "replace"))
        for path in sorted(folder.rglob("*.html"))
        if not GENERATED.search(path.name)
    }
    places = Counter(line for text in pages.values() for line in set(text.split("\n")) if line)
    train: dict[str, str] = {}
    kept: dict[str, str] = {}
    seen: set[str] = set()  # some pages are stored twice
    for name, page in pages.items():
        lines = [line for line in page.split("\n") if places[line] <= BOILERPLATE]
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
        if len(text) >= 500 and text not in seen:
            seen.add(text)
            (kept if held_out(name) else train)[name] = text
    return train, kept
