"""Limits of containers, and what is free."""

from __future__ import annotations

from pathlib import Path

import pytest

from autocompress import memory
from autocompress.database import cache_bytes

GIB = 1 << 30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A machine of 64 GiB, whose files a test writes."""
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * GIB // 4096}
    monkeypatch.setattr(memory.os, "sysconf", sizes.__getitem__)
    for name in ("GROUPS", "CGROUPS", "MEMINFO"):
        monkeypatch.setattr(memory, name, tmp_path / name)

    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


def test_a_machine_that_tells_nothing(system) -> None:
    assert memory.memory_limit() == memory.memory_free() == 64 * GIB
    assert cache_bytes() == 16 * GIB


def test_the_least_limit_of_nested_groups_counts(system) -> None:
    system("GROUPS", "0::/pod/container\n")
    system("CGROUPS/pod/memory.max", f"{8 * GIB}\n")
    system("CGROUPS/pod/container/memory.max", "max\n")
    assert memory.memory_limit() == 8 * GIB
    assert cache_bytes() == 2 * GIB


def test_groups_of_version_1(system) -> None:
    system("GROUPS", "9:cpu,cpuacct:/\n4:memory:/job\n0::/\n")
    limit = "CGROUPS/memory/job/memory.limit_in_bytes"
    system(limit, f"{4 * GIB}\n")
    assert memory.memory_limit() == 4 * GIB
    system(limit, f"{2**63 - 4096}\n")  # what version 1 says where there is none
    assert memory.memory_limit() == 64 * GIB


def test_a_busy_machine_leaves_less_for_the_cache(system) -> None:
    system("MEMINFO", f"MemTotal: {64 * GIB >> 10} kB\nMemAvailable: {6 * GIB >> 10} kB\n")
    assert memory.memory_free() == 6 * GIB
    assert cache_bytes() == 3 * GIB
