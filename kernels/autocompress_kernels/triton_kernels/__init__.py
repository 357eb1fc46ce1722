"""Triton kernels for packed weights on GPUs. NEVER MEASURED ON A GPU: no speed is known or claimed.

Results are checked against `reference.py` (float64) in Triton's interpreter, which runs on the CPU,
and every kernel is compiled for sm_80 and sm_90 without a GPU. Neither shows races, memory
bandwidth or the choice of tiles, so no cost table may be built from these kernels yet.

    from autocompress_kernels.triton_kernels.pack import pack_quantized
    from autocompress_kernels.triton_kernels.ops import linear
    weight = pack_quantized(codes, scales, zeros, bits=4, group=64).to("cuda")
    y = linear(x, weight)

The layout differs from the CPU library's: it is made anew from canonical codes. Importing this
package loads neither torch nor Triton; `layout`, `pack` and `reference` need torch alone.
"""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["missing"]


def missing() -> str | None:
    """Why `ops` cannot be imported, or None. Says nothing about whether there is a GPU."""
    for name in ("torch", "triton"):
        if find_spec(name) is None:
            return f"{name} must be installed. Found none. Run: pip install 'autocompress[gpu]'"
    return None
