"""The profiler against a fake clock: no test waits for or asserts real time."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from statistics import median

import pytest

from autocompress.latency_store import Point
from autocompress.profiler import Clocks, Effort, interval, machine_seconds, measure

EFFORT = Effort(rounds=5, most=21, sample=0.002, width=0.03)


@dataclass
class World:
    """Time that passes only when cases run, faster or slower with the machine's mood.

    Args:
        noise: relative standard deviation of every call.
        drift: the machine's slowness grows by this per second of work.
        theft: chance that another process takes 5 ms during a sample.
        others: CPU seconds that other processes use per second.
    """

    noise: float = 0.0
    drift: float = 0.0
    theft: float = 0.0
    others: float = 0.0
    wall: float = 100.0
    cpu: float = 10.0
    order: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(0)

    def clocks(self) -> Clocks:
        return Clocks(lambda: self.wall, lambda: self.cpu, self.machine)

    def machine(self) -> float:
        return self.cpu + self.others * (self.wall - 100.0) * (os.cpu_count() or 1)

    def work(self, name: str, seconds: float, calls: int) -> None:
        self.order.append(name)
        mood = 1 + self.drift * (self.wall - 100.0)
        spent = seconds * calls * mood * max(0.1, self.random.gauss(1, self.noise))
        self.cpu += spent
        self.wall += spent + (0.005 if self.random.random() < self.theft else 0.0)


@dataclass
class Fake:
    """A case that takes `us` per call."""

    world: World
    name: str
    us: float
    bytes: int = 1000

    def __post_init__(self) -> None:
        self.point = Point("fake", self.name, (64, 64), 1, "a8")

    def run(self, calls: int) -> None:
        self.world.work(self.name, self.us / 1e6, calls)


def timed(world: World, *us: float, threads: int = 1, effort: Effort = EFFORT) -> dict:
    """Level -> timing of cases that take `us`, beside a reference of 100 µs."""
    cases = [Fake(world, f"{it:g}", it) for it in us]
    found = measure(
        Fake(world, "reference", 100.0), cases, threads=threads, effort=effort,
        clocks=world.clocks(),
    )  # fmt: skip
    return {point.level: timing for point, timing in found.items()}


def test_a_quiet_machine_gives_the_times_themselves():
    found = timed(World(), 10.0, 250.0)
    assert found["10"].us == pytest.approx(10.0)
    assert found["250"].us == pytest.approx(250.0)
    assert found["250"].ratio == pytest.approx(2.5)
    assert (found["reference"].us, found["reference"].ratio) == pytest.approx((100.0, 1.0))
    assert found["10"].gb_per_s == pytest.approx(1000 / 10e-6 / 1e9)
    for timing in found.values():
        assert timing.low <= timing.ratio <= timing.high
        assert not timing.noisy
        assert timing.cpu_us == pytest.approx(timing.us)


def test_a_narrow_interval_ends_a_case_early():
    found = timed(World(), 10.0, 20.0)
    assert {timing.rounds for name, timing in found.items() if name != "reference"} == {5}
    noisy = timed(World(noise=0.2), 10.0)
    assert noisy["10"].rounds == 21 and noisy["10"].noisy


def test_rounds_are_interleaved_between_samples_of_the_reference():
    world = World()
    timed(world, 10.0, 20.0)
    last = world.order[-12:]
    assert last == [
        *("reference", "20", "10", "reference"),
        *("reference", "10", "20", "reference"),
        *("reference", "20", "10", "reference"),
    ]


def test_a_sample_is_filled_with_calls():
    world = World()
    before = world.wall
    timed(world, 1.0, effort=Effort(rounds=5, most=5, sample=0.002))
    rounds = 5 * 3  # one sample of the case, two of the reference
    assert world.wall - before >= rounds * 0.002


def test_a_machine_that_slows_down_does_not_change_ratios():
    """The reference slows down alike: from start to end by a factor of two and more."""
    world = World(drift=8.0)
    found = timed(world, 50.0, effort=Effort(rounds=21, most=21))
    assert world.wall - 100.0 > 0.1, "slow at the end"
    assert found["50"].ratio == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("theft", [0.3, 1.0])
def test_of_one_thread_cpu_time_counts_where_another_process_ran(theft):
    found = timed(World(theft=theft), 10.0, threads=1)
    assert found["10"].us == pytest.approx(10.0)
    assert found["10"].noisy is (theft == 1.0)


def test_of_more_threads_nothing_can_be_told():
    assert timed(World(theft=0.6), 10.0, threads=2)["10"].us > 11.0


def test_a_coarse_cpu_clock_is_not_believed():
    world = World()
    clocks = Clocks(lambda: world.wall, lambda: 0.0, lambda: None)
    found = measure(Fake(world, "r", 100.0), [Fake(world, "a", 10.0)], threads=1, clocks=clocks)
    assert [timing.us for timing in found.values()] == pytest.approx([100.0, 10.0])


@pytest.mark.parametrize(("others", "noisy"), [(0.0, False), (0.05, False), (0.5, True)])
def test_other_processes_make_it_noisy(others, noisy):
    assert timed(World(others=others), 10.0)["10"].noisy is noisy


def test_without_the_machines_time_nothing_is_said_of_others():
    world = World(others=0.5)
    clocks = Clocks(lambda: world.wall, lambda: world.cpu, lambda: None)
    found = measure(Fake(world, "r", 100.0), [Fake(world, "a", 10.0)], threads=1, clocks=clocks)
    assert not any(timing.noisy for timing in found.values())


def test_an_interrupted_calibration_does_not_shorten_the_samples():
    world = World()
    case = Fake(world, "a", 10.0)
    lengths = []
    slow = iter([0.0, 0.05, *[0.0] * 10_000])  # the first timed call is interrupted

    def run(calls: int) -> None:
        lengths.append(calls)
        world.work("a", 10e-6, calls)
        world.wall += next(slow)

    case.run = run  # type: ignore[method-assign]
    measure(Fake(world, "r", 100.0), [case], threads=2, effort=EFFORT, clocks=world.clocks())
    assert lengths[-1] == 200


def test_progress_counts_finished_cases():
    seen = []
    world = World()
    measure(
        Fake(world, "r", 100.0),
        [Fake(world, "a", 10.0), Fake(world, "b", 20.0)],
        threads=1,
        effort=EFFORT,
        clocks=world.clocks(),
        advance=lambda done, total: seen.append((done, total)),
    )
    assert seen[0] == (0, 2) and seen[-1] == (2, 2) and seen == sorted(seen)


def test_an_interval_holds_the_median_as_often_as_it_says():
    source = random.Random(1)
    for count in (5, 9, 21, 41):
        held = 0
        for _ in range(2000):
            low, high = interval([source.gauss(0, 1) for _ in range(count)])
            held += low <= 0 <= high
        assert held / 2000 > 0.92, count
    values = [source.random() for _ in range(41)]
    low, high = interval(values)
    assert min(values) < low < median(values) < high < max(values)
    assert interval([3.0]) == (3.0, 3.0)


def test_this_machine_tells_its_time():
    seconds = machine_seconds()
    assert seconds is None or seconds > 0
