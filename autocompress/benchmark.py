"""Tokens per second of a packed model and of its dense model, measured in turns."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autocompress.errors import GenerationError, ModelError
from autocompress.experts import UnfusedExperts
from autocompress.exporters.native import load
from autocompress.generation import (
    Clock,
    Decoder,
    PlainDecoder,
    make_decoder,
    time_decode,
    time_prefill,
)
from autocompress.machine import describe_machine
from autocompress.models import load_model
from autocompress.output import read_manifest
from autocompress.progress import Advance, Progress, Silent
from autocompress.runtime import prepare, used_backends
from autocompress.runtime_facts import runtime_warning, weight_bytes

WARM_UP = 4  # decoded tokens per model before the clock counts
PROMPT_SEED = 0  # of the prompt's random tokens
LEAN_SIZE = 2  # bytes of a dense weight inside the lean decoder


@dataclass(frozen=True)
class Turn:
    """One model's turn in one round.

    Args:
        prefill: seconds of the whole prompt.
        step: median seconds of a decoded token.
    """

    prefill: float
    step: float


def benchmark(
    folder: str | Path,
    *,
    model: str | None = None,
    prompt_length: int = 128,
    tokens: int = 64,
    rounds: int = 5,
    threads: int | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prefill and decode speed of a packed model against its dense model in bf16, batch 1.

    Args:
        folder: result of a search.
        model: the dense model; None is the one recorded in the folder.
        prompt_length: tokens of the prompt, random ones; at least 1.
        tokens: decoded per model and round, at least 1.
        rounds: in each of which both models have a turn; at least 1.
        threads: of torch, at least 1; None leaves them as they are.
        clock: seconds.

    Returns:
        `dense` and `packed` with `prefill` and `decode` in tokens/s, `ratio` of both (above 1:
        packed is faster), and what they depend on: machine, load, threads, backends, decoders.

    Raises:
        AutocompressError: not a result, not its dense model, or a number out of range.
    """
    check_counts(prompt_length=prompt_length, tokens=tokens, rounds=rounds)
    shown, busy = progress or Silent(), load_average()
    set_threads(threads)
    manifest = read_manifest(Path(folder))
    packed, _ = load_packed(folder)
    decoder = make_decoder(packed, prompt_length + tokens)
    shown.say("loading the dense model")
    dense = load_dense(folder, manifest, model)
    decoders = {"dense": PlainDecoder(dense, decoder.capacity), "packed": decoder}
    prompt = random_tokens(packed, prompt_length)
    with shown.task("rounds") as advance:
        turns = race(decoders, prompt, tokens, rounds, clock, advance)
    return {
        **{"folder": str(folder), "model": manifest["model"]["name"]},
        **{"prompt_length": prompt_length, "tokens": tokens, "rounds": rounds},
        "machine": {**describe_machine(packed.dtype), "load_before": busy},
        "isa": torch.backends.cpu.get_cpu_capability(),
        "backends": used_backends(packed),
        "activations": packed.config.quantization_config.activations,
        "warning": runtime_warning(manifest, packed),
        "unfused_experts": any(isinstance(part, UnfusedExperts) for part in dense.modules()),
        "dense": _model_facts(dense, decoders["dense"], turns["dense"], prompt_length),
        "packed": _model_facts(packed, decoders["packed"], turns["packed"], prompt_length),
        "ratio": ratios(turns["dense"], turns["packed"]),
    }


def race(
    decoders: Mapping[str, Decoder],
    prompt: Tensor,  # (length,)
    tokens: int,
    rounds: int,
    clock: Clock,
    advance: Advance = lambda done, total: None,
) -> dict[str, list[Turn]]:
    """Every decoder's turn in every round, after one that does not count.

    The order changes from round to round: nobody always finds the other's caches and clock speed.
    """
    for decoder in decoders.values():
        time_decode(decoder, prompt, min(WARM_UP, tokens), clock)
    turns: dict[str, list[Turn]] = {name: [] for name in decoders}
    for number in range(rounds):
        advance(number, rounds)
        for name in list(decoders)[:: -1 if number % 2 else 1]:
            prefill = time_prefill(decoders[name], prompt, clock)
            steps = time_decode(decoders[name], prompt, tokens, clock)
            turns[name].append(Turn(prefill, statistics.median(steps)))
    return turns


def ratios(dense: Sequence[Turn], packed: Sequence[Turn]) -> dict[str, Any]:
    """How many times faster the packed model was, round by round."""
    pairs = list(zip(dense, packed, strict=True))
    return {
        "prefill": spread([one.prefill / other.prefill for one, other in pairs]),
        "decode": spread([one.step / other.step for one, other in pairs]),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and most of the rounds, and every round."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "rounds": list(values),
    }


def _model_facts(
    model: Any, decoder: Decoder, turns: Sequence[Turn], prompt_length: int
) -> dict[str, Any]:
    """What ran, the bytes of weights it reads for a token, and its tokens per second."""
    return {
        "decoder": decoder.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_bytes": weight_bytes(model, LEAN_SIZE if decoder.name == "lean" else None),
        "prefill": spread([prompt_length / turn.prefill for turn in turns]),
        "decode": spread([1 / turn.step for turn in turns]),
    }


def load_packed(folder: str | Path, activations: str | None = None) -> tuple[Any, Any]:
    """The packed model of a result, ready to run, and its tokenizer.

    Args:
        activations: 'int8', 'bfloat16' or 'float32'; None is what the folder says.

    Raises:
        ModelError: not a whole result.
        BackendError: no such activations, or they cannot be computed with here.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model, tokenizer = load(folder, activations=activations)
    prepare(model)
    return model, tokenizer


def load_dense(folder: str | Path, manifest: Mapping[str, Any], model: str | None) -> Any:
    """The dense model of a result, in bf16.

    Raises:
        ModelError: it is not the one that the result was made from.
    """
    dense = load_model(model or manifest["model"]["source"], torch.bfloat16)
    if dense.fingerprint != manifest["model"]["fingerprint"]:
        raise ModelError(
            f"--model must be the dense model that '{folder}' was made from "
            f"({manifest['model']['name']}). Got '{dense.name}', whose weights differ."
        )
    return dense.model


def random_tokens(model: Any, length: int) -> Tensor:  # (length,)
    """Tokens that are the same in every run."""
    generator = torch.Generator().manual_seed(PROMPT_SEED)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (length,), generator=generator)


def load_average() -> float | None:
    """Processes that were running or waiting in the last minute; None where nobody counts."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def set_threads(threads: int | None) -> None:
    """Let torch compute with this many threads; None leaves it as it is.

    Raises:
        GenerationError: below 1.
    """
    if threads is not None:
        check_counts(threads=threads)
        torch.set_num_threads(threads)


def check_counts(**counts: int) -> None:
    """Check that all are at least 1.

    Raises:
        GenerationError: one is not.
    """
    for name, count in counts.items():
        if count < 1:
            raise GenerationError(f"{name} must be at least 1. Got {count}.")
