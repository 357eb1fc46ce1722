"""Whole models take turns, a few tokens at a time, and what slows all of them is taken out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_models import make_model

from autocompress.latency_timing import LEAST, ROUNDS, STEPS, Stopwatch, _without_drift, time_models
from autocompress.targets import Target


class Clockwork:
    """A decoder whose steps take as long as a script says, on a clock of its own."""

    name = "clockwork"

    can_truncate = True

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.prompts, self.steps = seconds, 0.0, 0, 0

    def reset(self) -> None:
        self.prompts += 1

    def truncate(self, length: int) -> bool:
        self.truncated = length
        return self.can_truncate

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        self.now += 10.0
        return torch.arange(3.0)

    def step(self, token: int) -> torch.Tensor:
        assert token == 2
        self.now += self.seconds
        self.steps += 1
        return torch.arange(3.0)


def watch(seconds: float, **target: Any) -> tuple[Stopwatch, Clockwork]:
    model = make_model("llama")
    made = Stopwatch(model, Target("cpu", prompt=4, **target))
    decoder = Clockwork(seconds)
    made.decoder, made.clock = decoder, lambda: decoder.now
    return made, decoder


def test_a_sample_is_the_time_of_a_step_and_slow_models_take_few() -> None:
    slow, decoder = watch(0.5)
    assert slow.sample() == pytest.approx(500)
    assert (slow.steps, decoder.steps, decoder.prompts) == (LEAST, STEPS, 1)
    for _ in range(STEPS // LEAST):
        assert slow.sample() == pytest.approx(500)
    assert (decoder.steps, decoder.prompts, decoder.truncated) == (2 * STEPS, 1, 4)
    decoder.can_truncate = False
    slow.sample()
    assert decoder.prompts == 2, "the prompt is read again where it must be"


def test_a_mix_weighs_both_phases() -> None:
    mixed, _ = watch(0.5, decode=0.75)
    parts = mixed.target.weigh("decode", 500.0) + mixed.target.weigh("prefill", 10_000.0)
    assert mixed.sample() == pytest.approx(parts)
    reads, decoder = watch(0.5, decode=0.0)
    for _ in range(3):
        assert reads.sample() == pytest.approx(reads.target.weigh("prefill", 10_000.0))
    assert (decoder.prompts, decoder.steps) == (3, 0)


def test_sequences_decode_together() -> None:
    made = Stopwatch(make_model("llama"), Target("cpu", batch=3, prompt=4))
    assert made.name == "plain, batched"
    made.sample()
    made.steps = STEPS
    for _ in range(2):
        assert made.sample() > 0
    assert 4 < made.decoder.cache.get_seq_length() <= 4 + STEPS


def test_a_round_that_is_slow_for_all_leaves_no_trace() -> None:
    steady = [[2.0] * 5, [3.0] * 5, [7.0] * 5]
    speeds = (1.0, 1.4, 0.9, 1.0, 2.0)
    rounds = [[value * speed for value, speed in zip(row, speeds, strict=True)] for row in steady]
    assert _without_drift(rounds) == [pytest.approx(row) for row in steady]


def test_what_slows_one_model_stays_its_own() -> None:
    rows = [[2.0, 2.0, 2.0, 2.6, 2.0], [3.0] * 5, [7.0] * 5, [5.0] * 5]
    assert _without_drift(rows) == [pytest.approx(row) for row in rows]
    assert _without_drift(rows[:2]) == rows[:2]


def test_models_take_turns_until_intervals_are_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.latency_timing.used_backends", lambda model: {})
    order: list[int] = []

    def entry(number: int, value: float) -> Any:
        return SimpleNamespace(
            model=None, name="fake", sample=lambda: order.append(number) or value
        )

    found = time_models([entry(0, 2.0), entry(1, 3.0), entry(2, 4.0)])
    assert [one.ms for one in found] == [2.0, 3.0, 4.0]
    assert order[:6] == [0, 1, 2, 0, 1, 2] and len(order) == 3 * (1 + ROUNDS)
    assert all(one.low == one.high == one.ms for one in found)
