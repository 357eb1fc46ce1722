"""Times whole models as a target uses them, in interleaved rounds."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from autocompress.generation import (
    Clock,
    Decoder,
    PlainDecoder,
    make_decoder,
    time_decode,
    time_prefill,
)
from autocompress.profiler import interval
from autocompress.progress import Advance
from autocompress.runtime import used_backends
from autocompress.targets import Target

STEPS = 48  # tokens decoded per sample, at most
SAMPLE = 0.25  # s; slow models decode fewer tokens per sample, 3 at least
ROUNDS, MOST_ROUNDS = 5, 15
WIDTH = 0.02  # of a latency's interval, relative; narrower is measured enough


@dataclass(frozen=True, slots=True)
class Measured:
    """The latency of one model, ms per token: median over rounds and its 95 % interval.

    Args:
        decoder: that ran it.
        backends: of its packed layers, name -> version.
    """

    ms: float
    low: float
    high: float
    decoder: str
    backends: Mapping[str, str] = field(default_factory=dict)

    @property
    def spread(self) -> float:
        """Half the interval, relative."""
        return (self.high - self.low) / 2 / self.ms


def logits_options(model: Any) -> dict[str, Any]:
    """What makes a forward pass compute the last token's logits only, where it can."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if known else {}


@dataclass
class Stopwatch:
    """Times one model as a target uses it.

    Args:
        plain: through the model's own forward, even where a faster decoder would do.
        clock: seconds; wall time, as a user waits.
    """

    model: Any
    target: Target
    plain: bool = False
    clock: Clock = time.perf_counter

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        vocabulary = int(self.model.get_input_embeddings().weight.shape[0])
        shape = (self.target.batch, self.target.prompt)
        self.prompt = torch.randint(vocabulary, shape, generator=generator)
        if self.target.batch == 1:
            make = PlainDecoder if self.plain else make_decoder
            self.decoder: Decoder = make(self.model, self.target.prompt + STEPS)
            self.name = self.decoder.name
        else:
            self.name = "plain, batched"
        self.steps = STEPS

    def sample(self) -> float:
        """Ms per token of each sequence."""
        total = 0.0
        if "decode" in self.target.phases:
            seconds = self._decode()
            middle = median(seconds)
            self.steps = max(3, min(STEPS, round(SAMPLE / max(middle, 1e-9))))
            total += self.target.weigh("decode", 1e3 * middle)
        if "prefill" in self.target.phases:
            total += self.target.weigh("prefill", 1e3 * self._prefill())
        return total

    def _decode(self) -> list[float]:
        if self.target.batch == 1:
            return time_decode(self.decoder, self.prompt[0], self.steps, self.clock)
        cache = self._forward(self.prompt, None).past_key_values
        seconds = []
        for _ in range(self.steps):
            start = self.clock()
            cache = self._forward(self.prompt[:, :1], cache).past_key_values
            seconds.append(self.clock() - start)
        return seconds

    def _prefill(self) -> float:
        if self.target.batch == 1:
            return time_prefill(self.decoder, self.prompt[0], self.clock)
        start = self.clock()
        self._forward(self.prompt, None)
        return self.clock() - start

    @torch.inference_mode()
    def _forward(self, tokens: Tensor, cache: Any) -> Any:
        options = logits_options(self.model)
        return self.model(input_ids=tokens, past_key_values=cache, use_cache=True, **options)


def time_models(
    watches: Sequence[Stopwatch], advance: Advance = lambda done, total: None
) -> list[Measured]:
    """Latency of every model, in interleaved rounds until all intervals are narrow."""
    samples: list[list[float]] = [[] for _ in watches]
    for watch in watches:
        watch.sample()  # warm, and shortens the samples of slow models
    for number in range(MOST_ROUNDS):
        for watch, row in zip(watches, samples, strict=True):
            row.append(watch.sample())
        advance(number + 1, MOST_ROUNDS)
        if number + 1 >= ROUNDS and all(_width(row) <= WIDTH for row in samples):
            break
    return [
        Measured(median(row), *interval(row), watch.name, used_backends(watch.model))
        for watch, row in zip(watches, samples, strict=True)
    ]


def _width(row: Sequence[float]) -> float:
    low, high = interval(row)
    return (high - low) / median(row)
