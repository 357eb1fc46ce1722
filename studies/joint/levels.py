"""Every level of the shipped spaces on layers of one block: bits, solving time, output error.

    python studies/joint/levels.py [model] > studies/joint/levels.txt

The layers see the dense model's activations on 8,192 calibration tokens. Each level is solved
alone, with what several levels would share (the Hessian's factor, the base of low-rank levels).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from autocompress.build import input_statistics
from autocompress.calibration import SplitTokens, calibration_windows
from autocompress.levels import Dense, Level
from autocompress.models import load_model, weight_of
from autocompress.operators import Solver, Statistics, solve
from autocompress.spaces import list_spaces

BLOCK = 4
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
TOKENS = SplitTokens(calibrate=8192, search=4096, validate=2048, test=2048)


def find_layers(name: str | None) -> dict[str, tuple[Tensor, Statistics]]:
    """Weight and input statistics of the layers."""
    loaded = load_model(name, torch.float32)
    windows = calibration_windows(
        None,
        lambda text: loaded.tokenizer(text, add_special_tokens=False)["input_ids"],
        512,
        TOKENS,
        0,
        loaded.tokenizer.eos_token_id,
    )
    found: dict[str, tuple[Tensor, Statistics]] = {}
    for short in LAYERS:
        module = loaded.model.get_submodule(f"model.layers.{BLOCK}.{short}")
        weight = weight_of(module).detach().float()

        def keep(_: Any, args: Any, short: str = short, weight: Tensor = weight) -> None:
            found[short] = weight, input_statistics(args[0], weight.shape[1])

        module.register_forward_pre_hook(keep)
    with torch.inference_mode():
        loaded.model.model(input_ids=torch.from_numpy(windows.calibrate))
    return found


def shipped_levels() -> Iterator[Level]:
    """Every level of a shipped space, once, but dense."""
    levels = dict.fromkeys(level for space in list_spaces() for level in space.levels)
    yield from (level for level in levels if not isinstance(level, Dense))


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    layers = find_layers(sys.argv[1] if len(sys.argv) > 1 else None)
    weights = sum(weight.numel() for weight, _ in layers.values())
    print("level            bits  CPU s per million weights  relative output error of", *LAYERS)
    for level in shipped_levels():
        bits, start, errors = 0, time.thread_time(), []
        for weight, statistics in layers.values():
            fresh = Statistics(statistics.hessian, statistics.tokens)
            ((solution,),) = solve([weight], fresh, [level], Solver())
            bits += solution.packed.bits
            errors.append(f"{solution.error:.5f}")
        seconds = (time.thread_time() - start) / weights * 1e6
        print(f"{level!s:16} {bits / weights:6.3f} {seconds:6.2f}  ", *errors, flush=True)


if __name__ == "__main__":
    main()
