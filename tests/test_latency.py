"""Prices, dominated levels and limits on time: numbers only, nothing is timed."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import FEWER, Memory, spaces, toy_problem, toy_space

from autocompress.core import Allocation, Budget, Layer, SearchSpace
from autocompress.cost import check_budgets, size_tables
from autocompress.errors import BudgetError, LatencyError
from autocompress.knapsack import cheapest
from autocompress.latency import (
    Dropped,
    Use,
    find_dropped,
    latency_table,
    layer_parts,
    layer_prices,
    needed_points,
    restrict,
    scaled,
)
from autocompress.latency_model import fit_part, reference_allocations
from autocompress.latency_search import Limit, holds, limited, not_held, tighten, tightened
from autocompress.latency_store import LatencyStore, ModelPart, Point, Timing
from autocompress.latency_timing import Measured
from autocompress.levels import parse_level
from autocompress.strategies import STRATEGIES, find_strategy
from autocompress.targets import Target

SPACE = toy_space()
DECODE = (Use("decode", 1.0, 1),)
USES = {name: DECODE for layer in SPACE.layers for name in layer.modules}
PART = ModelPart(2.0, 1.1, 40.0, 0.02, 0.9)


def stored(space, price, tmp_path, spread=0.0, noisy=False, rows=(1,)):
    """A store in which a call takes `price(level, shape)` µs, and the backends that ran it."""
    store = LatencyStore(tmp_path / "s.json", {})
    backends = {}
    shapes = {part.shape for layer in space.layers for part in layer_parts(layer, uses_of(space))}
    for level in space.all_levels():
        for shape in shapes:
            us = price(level, shape)
            backends[level, shape] = "fake" if us else ""
            for count in rows:
                if us:
                    low, high = 0.1 * (1 - spread), 0.1 * (1 + spread)
                    key = Point("fake", str(level), shape, count, "a8").key
                    timing = Timing(us * count, 0.1, low, high, 9, 1, us, noisy)
                    store.timings[key] = timing
    return store, backends


def uses_of(space):
    return {name: DECODE for layer in space.layers for name in layer.modules}


def by_bits(level, shape):
    return 10.0 * level.bits


def priced(space, price, tmp_path, target=None, uses=None, **options):
    store, backends = stored(space, price, tmp_path, **options)
    target = target or Target()
    return layer_prices(space, uses or uses_of(space), target, backends, {}, store)


# Prices


def test_a_layer_costs_what_its_calls_take(tmp_path):
    prices = priced(SPACE, by_bits, tmp_path)
    for row in prices.middle:
        assert row == {level: pytest.approx(0.01 * level.bits) for level in SPACE.levels[0]}
    table = latency_table(SPACE, prices, PART)
    allocation = SPACE.uniform(parse_level("w4g64"))
    expected = 0.9 * (2.0 + 1.1 * len(SPACE.layers) * 0.04)
    assert table.total(allocation) == pytest.approx(expected)
    assert scaled(table, 2.0).total(allocation) == pytest.approx(2 * expected)


def test_modules_that_read_one_input_are_one_call():
    shapes = ((64, 96), (32, 96), (32, 96), (64, 64))
    layer = Layer("l", ("a.q", "a.k", "a.v", "b.o"), shapes)
    found = layer_parts(layer, dict.fromkeys(layer.modules, DECODE))
    assert [part.shape for part in found] == [(128, 96), (64, 64)]
    rare = {**dict.fromkeys(layer.modules, DECODE), "a.v": (Use("decode", 0.5, 1),)}
    assert [part.shape for part in layer_parts(layer, rare)] == [(96, 96), (32, 96), (64, 64)]
    assert layer_parts(layer, {}) == (), "a look-up is no call"


def test_shares_phases_and_rows_count(tmp_path):
    space = replace(SPACE, layers=SPACE.layers[:1], levels=SPACE.levels[:1])
    target = Target(decode=0.5, prompt=8)
    name = space.layers[0].modules[0]
    uses = {name: (Use("decode", 0.25, 1), Use("prefill", 1.0, 8))}
    prices = priced(space, by_bits, tmp_path, target, uses, rows=(1, 8))
    level = parse_level("w4g64")
    decode, prefill = 0.25 * 0.04, 8 * 0.04 / 8
    assert prices.middle[0][level] == pytest.approx(0.5 * decode + 0.5 * prefill)


def test_every_shape_and_row_count_is_timed_once():
    store_backends = {
        (level, shape): "fake" for level in SPACE.levels[0] for layer in SPACE.layers
        for shape in layer.shapes
    }  # fmt: skip
    found = needed_points(SPACE, USES, Target(), store_backends)
    assert set(found) == {(shape, 1) for layer in SPACE.layers for shape in layer.shapes}
    assert all(list(row.values()) == list(SPACE.levels[0]) for row in found.values())


def test_a_store_without_a_timing_says_which(tmp_path):
    store, backends = stored(SPACE, by_bits, tmp_path)
    del store.timings["fake w5g64 192x64 m1 a8"]
    with pytest.raises(LatencyError, match=r"without 'fake w5g64 192x64 m1 a8'.*--export"):
        layer_prices(SPACE, USES, Target(), backends, {}, store)


# Dominated levels


def slow_three(level, shape):
    return {3: 55.0, 5: 0.0}.get(level.bits, 10.0 * level.bits)


def test_levels_without_a_kernel_or_slower_than_denser_ones_are_left_out(tmp_path):
    prices = priced(SPACE, slow_three, tmp_path)
    reasons = {(parse_level("w5g64"), (64, 64)): "groups must be odd"}
    dropped = find_dropped(SPACE, replace(prices, reasons=reasons))
    said = {(str(entry.level), entry.reason) for entry in dropped}
    assert ("w3g64", "slower than the denser w4g64: 55.0 µs per token instead of 40.0") in said
    assert ("w5g64", "no kernel: groups must be odd") in said
    assert {str(entry.level) for entry in dropped} == {"w3g64", "w5g64"}
    kept = restrict(SPACE, dropped)
    assert {tuple(map(str, allowed)) for allowed in kept.levels} == {("w2g64", "w4g64", "w6g64")}
    names = [name for entry in dropped for name in entry.layers if str(entry.level) == "w3g64"]
    assert sorted(names) == sorted(layer.name for layer in SPACE.layers)


def test_a_difference_within_the_intervals_is_none(tmp_path):
    assert not find_dropped(SPACE, priced(SPACE, slow_three_only, tmp_path, spread=0.2))
    assert find_dropped(SPACE, priced(SPACE, slow_three_only, tmp_path, spread=0.1))
    noisy = priced(SPACE, slow_three_only, tmp_path, spread=0.1, noisy=True)
    assert not find_dropped(SPACE, noisy), "a noisy timing proves nothing"


def slow_three_only(level, shape):
    return 55.0 if level.bits == 3 else 10.0 * level.bits


def test_a_hair_slower_is_not_slower(tmp_path):
    hair = priced(SPACE, lambda level, shape: 40.4 if level.bits == 3 else 40.0, tmp_path)
    assert not find_dropped(SPACE, hair)


def test_a_layer_without_any_kernel_is_an_error(tmp_path):
    prices = priced(SPACE, lambda level, shape: 0.0, tmp_path)
    with pytest.raises(LatencyError, match=r"q_proj'; w2g64: no kernel: the target has no price"):
        restrict(SPACE, find_dropped(SPACE, prices))


# The model around the layers


def test_references_are_mixed_legal_and_span_the_space():
    found = reference_allocations(SPACE)
    assert len(found) == 3
    bits = [size_tables(SPACE, 0)[0].total(it) / SPACE.weights for it in found]
    assert bits == sorted(bits) and bits[-1] > bits[0] + 2
    assert all(allocation in SPACE and len(set(allocation.levels)) > 1 for allocation in found)
    assert reference_allocations(SPACE) == found, "the same again"


@given(spaces())
def test_references_of_any_space_are_legal(space):
    found = reference_allocations(space)
    assert found and all(allocation in space for allocation in found)


def measured(ms, spread=0.01, decoder="lean"):
    return Measured(ms, ms * (1 - spread), ms * (1 + spread), decoder)


def test_the_fit_finds_fixed_part_and_scale():
    sums = [3.0, 5.0, 8.0]
    part = fit_part(sums, [measured(1.5 + 1.1 * it) for it in sums], measured(50.0))
    assert (part.fixed_ms, part.scale, part.dense_ms) == pytest.approx((1.5, 1.1, 50.0))
    assert part.spread == pytest.approx(0.01), "the references' own noise"
    assert (part.calibration, part.decoder) == (1.0, "lean")


def test_references_that_hardly_differ_give_no_scale():
    part = fit_part([1.0, 1.01, 1.02], [measured(9.0), measured(9.9), measured(9.0)], None)
    assert (part.scale, part.dense_ms) == (1.0, None)
    assert part.fixed_ms == pytest.approx(8.0)
    assert part.spread == pytest.approx(0.09, abs=0.01), "one reference is 9 % off"


def test_an_absurd_scale_is_not_taken():
    assert fit_part([1.0, 5.0], [measured(9.0), measured(1.0)], None).scale == 1.0


# Limits


def limit_of(table, part=PART, local=True):
    target = Target() if local else Target("there.json")
    latency = SimpleNamespace(table=table, part=part, dropped=(), target=target, margin=0.02)
    return Limit(latency, 1.02)  # type: ignore[arg-type]


def test_a_try_that_is_too_slow_tightens_the_limit(tmp_path):
    table = latency_table(SPACE, priced(SPACE, by_bits, tmp_path), PART)
    limit = limit_of(table)
    budgets = (Budget("latency", 3.0, "3ms"),)
    row = {"predicted_ms": 2.9, "measured_ms": 3.1, "low_ms": 3.0, "high_ms": 3.2}
    limit.finalists, limit.tries = {"search": row}, 1
    assert not holds(limit, "search", budgets)
    tighten(limit, "search")
    assert limit.safety == pytest.approx(3.2 / 2.9 * 1.002)
    tighten(limit, "search")
    assert limit.safety == pytest.approx(3.2 / 2.9 * 1.002 * 1.005), "never the same again"
    problem = toy_problem(SPACE, budgets, (*size_tables(SPACE, 0), table))
    seen = tightened(problem, limit).table("latency")
    allocation = SPACE.uniform(SPACE.levels[0][0])
    assert seen.total(allocation) == pytest.approx(limit.safety * table.total(allocation))
    limit.finalists["search"] = {**row, "high_ms": 2.99}
    assert holds(limit, "search", budgets)
    message = str(not_held(limit, "search", budgets))
    assert "within 3ms. Got 3.10 ms (3.00 to 2.99) after 1 searches, predicted 2.90" in message


def test_where_nothing_is_measured_the_prediction_stands():
    limit = limit_of(None, local=False)
    limit.finalists = {"search": {"predicted_ms": 2.9, "measured_ms": None}}
    assert holds(limit, "search", (Budget("latency", 3.0, "3ms"),))
    assert not holds(limit, "search", (Budget("latency", 2.8, "2.8ms"),))
    assert limited(None, SPACE) is SPACE


@settings(max_examples=25, deadline=None)
@given(space=spaces(), seed=st.integers(0, 2**32), share=st.floats(0, 1), cut=st.floats(0.05, 0.9))
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_no_strategy_exceeds_bits_or_milliseconds(name, space, seed, share, cut):
    """Random prices in any order of the levels, a level dropped, limits as tight as possible."""
    rng = np.random.default_rng(seed)
    bits, size = size_tables(space, 0)
    entries = tuple({it: float(rng.random()) + 1e-3 for it in row} for row in space.levels)
    table = replace(scaled(bits, 1.0), name="latency", unit="ms", base=0.7, entries=entries)
    dropped = tuple(
        Dropped((layer.name,), allowed[0], "no kernel")
        for layer, allowed in zip(space.layers, space.levels, strict=True)
        if len(allowed) > 1 and rng.random() < cut
    )
    searched = restrict(space, dropped)
    costs = (bits, size, table)
    fast = cheapest(searched, table)
    limits = [
        Budget("bits", bits.total(fast) * (1 + share) + 1, "x"),
        Budget("latency", table.total(fast) * (1 + share * 0.5), "1ms"),
    ]
    problem = toy_problem(searched, limits, costs, Memory(searched, costs, seed))
    strategy = find_strategy(name)(**FEWER.get(name, {}))
    for trial in strategy(problem, np.random.default_rng(seed)):
        assert trial.allocation in searched
        assert bits.total(trial.allocation) <= limits[0].limit
        assert table.total(trial.allocation) <= limits[1].limit


def test_impossible_times_name_the_fastest(tmp_path):
    table = latency_table(SPACE, priced(SPACE, by_bits, tmp_path), PART)
    costs = (*size_tables(SPACE, 0), table)
    with pytest.raises(BudgetError, match=r"at least 2\.04 ms, the fastest .* Got 1ms\. Add a f"):
        check_budgets(SPACE, costs, [Budget("latency", 1.0, "1ms")])
    check_budgets(SPACE, costs, [Budget("latency", 2.04, "2.04ms")])


def test_an_infinite_price_is_never_chosen():
    levels = tuple(map(parse_level, ("w2g64", "w3g64")))
    layers = tuple(Layer(f"l.{i}", (f"l.{i}",), ((8, 8),)) for i in range(2))
    space = SearchSpace("s", layers, (levels, levels))
    price = {levels[0]: math.inf, levels[1]: 1.0}
    table = replace(size_tables(space, 0)[0], name="latency", unit="ms", entries=(price, price))
    assert cheapest(space, table) == Allocation((levels[1], levels[1]))
