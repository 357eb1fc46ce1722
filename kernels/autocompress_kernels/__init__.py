"""Matrix kernels for packed weights: a C library without Python or torch in it, and its bindings.

    from autocompress_kernels import linear, missing, pack_codes
    if missing() is None:
        packed = pack_codes(codes, scales, zeros, bits=4, group=64)
        y = linear(x, packed, mode="a8")

Names are imported on first use, so `import autocompress_kernels` loads neither torch nor the
library. `missing()` says why the library cannot be used here, or None where it can.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autocompress_kernels.formats import MODES, PATTERNS, Format, Packed
    from autocompress_kernels.library import Library, load, missing
    from autocompress_kernels.memory import arena
    from autocompress_kernels.ops import add_linear, dequantize, gather, linear, linears, low_rank
    from autocompress_kernels.pack import (
        pack_bf16,
        pack_codes,
        pack_sparse,
        unpack_codes,
    )

__version__ = "0.1.0"

__all__ = [
    "MODES",
    "PATTERNS",
    "Format",
    "Library",
    "Packed",
    "add_linear",
    "arena",
    "dequantize",
    "gather",
    "linear",
    "linears",
    "load",
    "low_rank",
    "missing",
    "pack_bf16",
    "pack_codes",
    "pack_sparse",
    "unpack_codes",
]

_HOMES = {
    "formats": ("MODES", "PATTERNS", "Format", "Packed"),
    "library": ("Library", "load", "missing"),
    "memory": ("arena",),
    "ops": ("add_linear", "dequantize", "gather", "linear", "linears", "low_rank"),
    "pack": ("pack_bf16", "pack_codes", "pack_sparse", "unpack_codes"),
}


def __getattr__(name: str) -> object:
    """Import a public name on first use.

    Raises:
        AttributeError: `name` is not public.
    """
    for module, names in _HOMES.items():
        if name in names:
            found = getattr(import_module(f"autocompress_kernels.{module}"), name)
            globals()[name] = found  # the next look-up does not come here
            return found
    raise AttributeError(f"module 'autocompress_kernels' has no attribute '{name}'")


def __dir__() -> list[str]:
    """Public names, whether imported yet or not."""
    return sorted({*globals(), *__all__})
