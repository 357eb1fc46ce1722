"""What machine this is, and which number format its forward passes should use."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from autocompress.memory import memory_installed

FAST_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # CPU flags: Intel and AMD, Arm
# Instruction sets that kernels choose by; others do not change what was timed.
KERNEL_FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512vbmi", "avx512_vbmi2", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve"),
)
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SMALLEST_CACHE = 32 << 20  # bytes; assumed where the system does not tell


def cpu_flags() -> set[str]:
    """Instruction-set flags of the CPU, empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return set(next(lines, ":").partition(":")[2].split())


def compute_dtype(name: str) -> torch.dtype:
    """'bfloat16', 'float32', or 'auto': bfloat16 where the CPU multiplies it natively."""
    if name == "auto":
        name = "bfloat16" if cpu_flags() & set(FAST_BF16) else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """While inside, torch computes with `count` threads; None changes nothing."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_machine(dtype: torch.dtype) -> dict[str, Any]:
    """The facts of this machine that figures depend on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory_installed() / 2**30, 1),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "dtype": str(dtype).removeprefix("torch."),
    }


def installed(package: str) -> str | None:
    """The version of an installed package; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def hardware_identity(
    threads: int, backends: Mapping[str, str], dtype: torch.dtype
) -> dict[str, Any]:
    """What timings of kernels depend on, as JSON.

    Args:
        threads: that a forward pass uses.
        backends: name -> version, instruction set included.
        dtype: of what flows between layers.
    """
    info = _cpu_info()
    names = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
    return {
        "cpu": " ".join([_cpu_name(), *(f"{n} {info[n]}" for n in names if n in info)]),
        "flags": sorted(cpu_flags() & set(KERNEL_FLAGS)),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "system": f"{platform.system()} {platform.machine()}",
        "huge pages": _huge_pages(),
        "threads": threads,
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": dict(sorted(backends.items())),
    }


def last_level_cache() -> int:
    """Bytes of the largest cache, at least `SMALLEST_CACHE`."""
    return max([SMALLEST_CACHE, *_caches().values()])


def _caches() -> dict[str, int]:
    """'L3 Unified' -> bytes."""
    found = {}
    for folder in sorted(CACHES.glob("index*")):
        try:
            level, kind, size = (
                (folder / name).read_text().strip() for name in ("level", "type", "size")
            )
            found[f"L{level} {kind}"] = int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]]
        except (OSError, ValueError, KeyError, IndexError):
            continue  # a cache that the system does not describe
    return found


def _huge_pages() -> str:
    """'madvise', 'always', 'never', or '' where the system does not tell; torch's own setting."""
    try:
        text = HUGE_PAGES.read_text()
    except OSError:
        return ""
    chosen = text.partition("[")[2].partition("]")[0]
    return chosen + (" and torch" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "")


def _cpu_info() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}
