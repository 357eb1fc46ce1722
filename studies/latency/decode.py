"""Decode speed of the default model at one uniform level, head packed, against the dense model.

    python studies/latency/decode.py [--level w4g64] [--threads 1 2]

All decode in interleaved rounds after a prompt of 128 tokens, batch 1; the dense model through
its own eager forward, in bf16 and in the type that suits this machine, and llama.cpp the default
model's own GGUF file (Q4_1) where llama-cpp-python is installed. Weights of ours are random, which
changes no latency.
"""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from autocompress.latency_model import packed_model, random_source
from autocompress.latency_timing import STEPS, Measured, Stopwatch, time_models
from autocompress.levels import parse_level
from autocompress.machine import compute_dtype, describe_machine
from autocompress.models import DEFAULT_PACKAGE, find_layers, load_model
from autocompress.targets import Target


class LlamaCpp:
    """llama.cpp as a decoder."""

    name = "llama.cpp"

    def __init__(self, gguf: Path, capacity: int, threads: int) -> None:
        import llama_cpp

        asked = {"n_threads": threads, "n_threads_batch": threads, "verbose": False}
        self.llama, self.read = llama_cpp.Llama(str(gguf), n_ctx=capacity, **asked), llama_cpp
        self.reset = self.llama.reset

    def truncate(self, length: int) -> bool:
        """Forget what is behind the first `length` tokens."""
        self.llama.n_tokens = length
        return True

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits behind (length,) tokens."""
        self.llama.eval(tokens.tolist())
        pointer = self.read.llama_get_logits_ith(self.llama.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, (self.llama.n_vocab(),)))

    def step(self, token: int) -> torch.Tensor:
        """Logits behind one more token."""
        return self.prefill(torch.tensor([token]))


def main() -> None:
    """Time all, print tokens/s and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--level", default="w4g64")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    arguments = parser.parse_args()
    loaded = load_model(None, compute_dtype("auto"))
    types = dict.fromkeys((torch.bfloat16, loaded.model.dtype))
    dense = {dtype: load_model(None, dtype).model for dtype in types}
    linears = find_layers(loaded.model, ("blocks", "embedding"))
    levels = {linear.name: parse_level(arguments.level) for linear in linears}
    target = Target("cpu")
    packed = packed_model(loaded.model, levels, random_source(loaded.model), target)
    machine = describe_machine(loaded.model.dtype)
    print(f"{machine['cpu']}, {os.cpu_count()} cores, torch {machine['torch']}")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        load = Path("/proc/loadavg").read_text().split()[0]
        plain = [Stopwatch(model, target, plain=True) for model in dense.values()]
        watches = [Stopwatch(packed, target), *plain]
        if find_spec("llama_cpp"):
            rival = Stopwatch(packed, target)
            rival.decoder = LlamaCpp(default_gguf(), target.prompt + STEPS, threads)
            watches.append(rival)
        ours, *others = time_models(watches)
        print(f"{threads} threads, load {load}; {ours.decoder} decoder, {dict(ours.backends)}")
        print(f"  {arguments.level} {speed(ours)}")
        names = [f"dense {dtype}".replace("torch.", "") for dtype in dense]
        for name, other in zip([*names, "llama.cpp Q4_1"], others, strict=False):
            print(f"  {name} {speed(other)}; ours is {other.ms / ours.ms:.2f} times as fast")


def default_gguf() -> Path:
    """The file of the default model; it is installed."""
    spec = find_spec(DEFAULT_PACKAGE)
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def speed(measured: Measured) -> str:
    """Tokens/s with its interval."""
    rate, low, high = (1e3 / ms for ms in (measured.ms, measured.high, measured.low))
    return f"{rate:.1f} tokens/s ({low:.1f}-{high:.1f})"


if __name__ == "__main__":
    main()
