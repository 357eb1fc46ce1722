"""How much memory this process may count on: the machine's, a container's limit, what is free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def memory_installed() -> int:
    """Bytes that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit() -> int:
    """Bytes that the machine has or, where that is less, that the control groups allow."""
    return min([memory_installed(), *_group_limits()])


def memory_free() -> int:
    """Bytes that new data may take without swapping; the limit where the system does not tell."""
    for line in _lines(MEMINFO):
        if line.startswith("MemAvailable:"):
            return min(memory_limit(), int(line.split()[1]) << 10)
    return memory_limit()


def _group_limits() -> Iterator[int]:
    """Of the groups that this process is in and of those around them, versions 1 and 2."""
    for line in _lines(GROUPS):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            for text in _lines(root / folder / name):
                if text.isdigit():  # 'max' is no limit
                    yield int(text)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
