"""What machine this is, and which number format its forward passes should use."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

FAST_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # CPU flags: Intel and AMD, Arm


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


def describe_machine(dtype: torch.dtype) -> dict[str, Any]:
    """The facts of this machine that figures depend on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory, 1),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
