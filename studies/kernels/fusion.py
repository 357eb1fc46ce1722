"""Modules of SmolLM2's shapes that read one input: one kernel call against separate ones, in turns.

python studies/kernels/fusion.py
"""

from __future__ import annotations

import time

import torch

from autocompress.backends import BACKENDS
from autocompress.fusion import Fused
from autocompress.latency_cases import random_packed
from autocompress.levels import parse_level
from autocompress.runtime import PackedLinear

WIDTH = 576
GROUPS = {"q/k/v": (576, 192, 192), "gate/up": (1536, 1536)}
TURNS = {1: 2500, 128: 25}  # rows of x -> turns


def group(rows: tuple[int, ...]) -> tuple[list[PackedLinear], Fused]:
    """Modules of random weights, and what makes one call of them."""
    native, level, made = BACKENDS["native"], parse_level("w4g64"), []
    for count in rows:
        module = PackedLinear(level, (count, WIDTH), torch.float32, None)
        module.op = native.prepare(random_packed(level, (count, WIDTH)), torch.float32, "a8")
        made.append(module)
    together = native.together([module.op for module in made])
    assert together is not None
    return made, Fused(made, together)


def seconds(modules: list[PackedLinear], fused: Fused | None, x: torch.Tensor) -> float:
    """Time to call all modules with x (1, m, 576)."""
    for module in modules:
        module.fused = fused
    start = time.perf_counter()
    kept = [module(x) for module in modules]  # as a model keeps them
    taken = time.perf_counter() - start
    del kept
    return taken


@torch.inference_mode()
def main() -> None:
    """Print both for every group and number of rows."""
    torch.set_num_threads(1)
    for name, rows in GROUPS.items():
        modules, fused = group(rows)
        for m, turns in TURNS.items():
            x = torch.randn(1, m, WIDTH)
            pairs = [(seconds(modules, None, x), seconds(modules, fused, x)) for _ in range(turns)]
            alone, one = (
                [f"{1e6 * sorted(s)[at]:.1f}" for at in (0, turns // 10)]
                for s in zip(*pairs, strict=True)
            )
            print(
                f"{name}, M = {m}: separate {alone} us, one call {one} us (least, tenth percentile)"
            )


if __name__ == "__main__":
    main()
