"""Times whole models as a target uses them, in interleaved rounds."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from autocompress.generation import (
    Clock,
    PlainDecoder,
    crop_cache,
    make_decoder,
)
from autocompress.profiler import interval
from autocompress.progress import Advance
from autocompress.runtime import used_backends
from autocompress.targets import Target

STEPS = 48  # tokens decoded behind a prompt before it is read again
SAMPLE = 0.012  # s; so short that models take turns faster than the machine changes its speed
LEAST = 2  # tokens per sample
ROUNDS = 40  # at least
SECONDS = 4.0  # for each model, at most
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
    """Times one model as a target uses it, a few tokens at a time.

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
        prompt = torch.randint(vocabulary, shape, generator=generator)
        self.decoder: Any  # a Decoder, or several sequences
        if self.target.batch == 1:
            make = PlainDecoder if self.plain else make_decoder
            self.prompt, self.decoder = prompt[0], make(self.model, self.target.prompt + STEPS)
        else:
            self.prompt, self.decoder = prompt, Batched(self.model)
        self.name = self.decoder.name
        self.steps, self.left = STEPS, 0
        self._first: Any = None
        self._prefill = 0.0

    def sample(self) -> float:
        """Ms per token of each sequence."""
        decodes, total = "decode" in self.target.phases, 0.0
        if not decodes or self.left < self.steps:
            self._start()
        if decodes:
            middle = median(self._step() for _ in range(self.steps))
            self.steps = max(LEAST, min(STEPS, round(SAMPLE / max(middle, 1e-9))))
            total += self.target.weigh("decode", 1e3 * middle)
        if "prefill" in self.target.phases:
            total += self.target.weigh("prefill", 1e3 * self._prefill)
        return total

    def _start(self) -> None:
        """Stand behind the prompt; it is read anew where it must be."""
        self.left = STEPS
        if self._first is None or "prefill" in self.target.phases:
            self._read_prompt()
        elif not self.decoder.truncate(self.target.prompt):
            self._read_prompt()
        self._token = self._first

    def _read_prompt(self) -> None:
        self.decoder.reset()
        start = self.clock()
        logits = self.decoder.prefill(self.prompt)
        self._prefill = self.clock() - start
        self._first = self._next(logits)

    def _step(self) -> float:
        start = self.clock()
        self._token = self._next(self.decoder.step(self._token))
        self.left -= 1
        return self.clock() - start

    def _next(self, logits: Tensor) -> Any:
        """The likeliest token of every sequence; of a single one, as its decoder takes it."""
        return logits.argmax(-1) if self.target.batch > 1 else int(logits.argmax())


class Batched:
    """Several sequences through the model's own forward."""

    name = "plain, batched"

    def __init__(self, model: Any) -> None:
        self.model, self.options = model, logits_options(model)
        self.cache: Any = None

    def reset(self) -> None:
        """Forget the sequences."""
        self.cache = None

    def truncate(self, length: int) -> bool:
        """Forget what is behind the first `length` tokens; False where that cannot be."""
        return crop_cache(self.cache, length)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Logits (batch, vocab) behind (batch, length) tokens."""
        out = self.model(
            input_ids=tokens, past_key_values=self.cache, use_cache=True, **self.options
        )
        self.cache = out.past_key_values
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (batch, vocab) behind one more token each, (batch,)."""
        return self.prefill(tokens[:, None])


def time_models(
    watches: Sequence[Stopwatch], advance: Advance = lambda done, total: None
) -> list[Measured]:
    """Latency of every model, in interleaved rounds until all intervals are narrow.

    What slows all models in a round, such as another process, is taken out of that round.
    """
    samples: list[list[float]] = [[] for _ in watches]
    for watch in watches:
        watch.sample()  # warm, and shortens the samples of slow models
    start, most = time.perf_counter(), SECONDS * len(watches)
    for number in itertools.count(1):
        for watch, row in zip(watches, samples, strict=True):
            row.append(watch.sample())
        spent = time.perf_counter() - start
        advance(min(round(spent), round(most)), round(most))
        if number < ROUNDS:
            continue
        steady = _without_drift(samples)
        if spent > most or all(_width(row) <= WIDTH for row in steady):
            break
    return [
        Measured(median(row), *interval(row), watch.name, used_backends(watch.model))
        for watch, row in zip(watches, steady, strict=True)
    ]


def _without_drift(samples: Sequence[Sequence[float]]) -> list[list[float]]:
    """Samples by model and round, over the speed of the round: what it did to the other models.

    Two models cannot tell whose time it was that changed: they stay as they are.
    """
    if len(samples) < 3:
        return [list(row) for row in samples]
    ratios = [[sample / median(row) for sample in row] for row in samples]
    rounds = list(zip(*ratios, strict=True))
    return [
        [
            sample / median((*ratio[:model], *ratio[model + 1 :]))
            for sample, ratio in zip(row, rounds, strict=True)
        ]
        for model, row in enumerate(samples)
    ]


def _width(row: Sequence[float]) -> float:
    low, high = interval(row)
    return (high - low) / median(row)
