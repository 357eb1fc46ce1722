"""Decode speed of the default model at one uniform level, head packed, against dense bf16.

    python studies/latency/decode.py [--level w4g64] [--threads 1 2]

Both decode in interleaved rounds after a prompt of 128 tokens, batch 1; the dense model through
its own eager forward. Weights are random, which changes no latency.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from autocompress.latency_model import packed_model, random_source
from autocompress.latency_timing import Stopwatch, time_models
from autocompress.levels import parse_level
from autocompress.machine import compute_dtype, describe_machine
from autocompress.models import find_layers, load_model
from autocompress.targets import Target


def main() -> None:
    """Time both, print tokens/s and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--level", default="w4g64")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    arguments = parser.parse_args()
    loaded = load_model(None, compute_dtype("auto"))
    linears = find_layers(loaded.model, ("blocks", "embedding"))
    levels = {linear.name: parse_level(arguments.level) for linear in linears}
    target = Target("cpu")
    packed = packed_model(loaded.model, levels, random_source(loaded.model), target)
    machine = describe_machine(loaded.model.dtype)
    print(f"{machine['cpu']}, {os.cpu_count()} cores, torch {machine['torch']}")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        load = Path("/proc/loadavg").read_text().split()[0]
        dense, ours = time_models(
            [Stopwatch(loaded.model, target, plain=True), Stopwatch(packed, target)]
        )
        print(
            f"{threads} threads, load {load}: dense bf16 {1e3 / dense.ms:.1f} tokens/s "
            f"({1e3 / dense.high:.1f}-{1e3 / dense.low:.1f}), {arguments.level} "
            f"{1e3 / ours.ms:.1f} ({1e3 / ours.high:.1f}-{1e3 / ours.low:.1f}), "
            f"{dense.ms / ours.ms:.1f} times; decoder {ours.decoder}, {dict(ours.backends)}"
        )


if __name__ == "__main__":
    main()
