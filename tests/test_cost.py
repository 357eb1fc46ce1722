import math
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import random_table, spaces, toy_space

from autocompress.core import Budget, CostTable, Layer, SearchSpace
from autocompress.cost import (
    BYTES,
    check_budgets,
    choose,
    limited_cost,
    parse_budget,
    size_tables,
)
from autocompress.errors import BudgetError
from autocompress.knapsack import cheapest

SPACE = toy_space()
COSTS = size_tables(SPACE, 1000)


@given(spaces())
def test_tables_are_the_layers_storage(space):
    bits, whole = size_tables(space, 77)
    for level in space.all_levels():
        chosen = cheapest(space, bits)
        for index, allowed in enumerate(space.levels):
            chosen = chosen.swap(index, level) if level in allowed else chosen
        stored = sum(
            layer.storage_bits(it) for layer, it in zip(space.layers, chosen.levels, strict=True)
        )
        assert bits.total(chosen) == stored
        assert whole.total(chosen) * 8 == stored + 77 * 8


def test_size_totals_are_integers():
    allocation = cheapest(SPACE, COSTS[0])
    assert all(isinstance(table.total(allocation), int) for table in COSTS)


@pytest.mark.parametrize(
    ("text", "cost", "limit"),
    [
        ("3.5bits", "bits", SPACE.weights * 7 // 2),
        (" 3.5 bits ", "bits", SPACE.weights * 7 // 2),
        ("3.1bits", "bits", SPACE.weights * 31 // 10),
        ("1e0bits", "bits", SPACE.weights),
        (".5kB", "bytes", 500),
        ("90MB", "bytes", 90_000_000),
        ("90.MiB", "bytes", 90 * 2**20),
        ("0.1GiB", "bytes", math.floor(Fraction(1, 10) * 2**30)),
        ("7B", "bytes", 7),
    ],
)
def test_budgets_are_read_exactly(text, cost, limit):
    budget = parse_budget(text, SPACE)
    assert (budget.cost, budget.limit, budget.text) == (cost, limit, text.strip())
    assert isinstance(budget.limit, int)


@given(st.decimals(min_value="0.001", max_value=9999, places=3))
def test_limits_round_down_without_floating_point(number):
    limit = parse_budget(f"{number}bits", SPACE).limit
    assert limit <= Fraction(number) * SPACE.weights < limit + 1


def test_limits_of_the_largest_models_are_exact_too():
    weights = 10**18 + 9
    huge = SearchSpace("huge", (Layer("l", ("l",), ((1, weights),)),), (SPACE.levels[0],))
    assert parse_budget("3.3bits", huge).limit == weights * 33 // 10


def test_one_bit_below_the_smallest_is_impossible():
    least = COSTS[0].total(cheapest(SPACE, COSTS[0]))
    check_budgets(SPACE, COSTS, [Budget("bits", least, "2.3bits")])
    with pytest.raises(BudgetError, match="must be at least"):
        check_budgets(SPACE, COSTS, [Budget("bits", least - 1, "2.3bits")])


@pytest.mark.parametrize(
    "text",
    [
        *("", "3.5", "bits", "nan bits", "inf bits", "-3bits", "0bits", "0.0MB", "-0B", "3,5bits"),
        *("3.5 bits 4", "1e999999999B", "9" * 5000 + "B", "٣bits", "3.5furlongs", "1/2bits"),
    ],
)
def test_what_is_no_budget_is_refused_with_the_units(text):
    with pytest.raises(BudgetError) as error:
        parse_budget(text, SPACE)
    assert all(unit in str(error.value) for unit in ("bits", *BYTES))


@pytest.mark.parametrize(("text", "meant"), [("5mb", "'5MB'"), ("3bit", "'3bits'")])
def test_a_near_unit_is_suggested(text, meant):
    with pytest.raises(BudgetError, match=f"Did you mean {meant}"):
        parse_budget(text, SPACE)


@given(space=spaces(), unit=st.sampled_from(["bits", *BYTES]), other=st.integers(0, 10**6))
def test_the_smallest_budget_shown_works_when_typed(space, unit, other):
    costs = size_tables(space, other)
    with pytest.raises(BudgetError, match="must be at least") as error:
        check_budgets(space, costs, [parse_budget(f"1e-20{unit}", space)])
    shown = re.search(r"at least ([\d.]+ \w+), the cheapest", str(error.value))[1]
    budget = parse_budget(shown, space)
    assert budget.limit >= costs[unit != "bits"].total(cheapest(space, costs[unit != "bits"]))
    assert shown.endswith(f" {unit}")


def test_the_error_of_the_design_page():
    message = (
        r"^budget must be at least 2\.29 bits, the cheapest allocation of 'toy'\. Got 2\.00bits\. "
        r"Add a cheaper level or raise the budget\.$"
    )
    with pytest.raises(BudgetError, match=message):
        check_budgets(SPACE, COSTS, [parse_budget("2.00bits", SPACE)])


def test_above_dense_there_is_nothing_to_compress():
    check_budgets(SPACE, COSTS, [parse_budget("16bits", SPACE)])
    for text in ("16.01bits", "1GB"):
        with pytest.raises(BudgetError, match="nothing to compress"):
            check_budgets(SPACE, COSTS, [parse_budget(text, SPACE)])


def test_of_two_budgets_on_one_cost_the_tighter_counts():
    loose, tight = parse_budget("20bits", SPACE), parse_budget("3bits", SPACE)
    size = parse_budget("60kB", SPACE)
    assert check_budgets(SPACE, COSTS, [loose, size, tight]) == (tight, size)
    with pytest.raises(BudgetError, match=r"Got 1bits\."):
        check_budgets(SPACE, COSTS, [tight, parse_budget("1bits", SPACE)])


def test_budgets_possible_alone_but_not_together():
    first, second = SPACE.levels[0][0], SPACE.levels[0][-1]
    slow_when_small = CostTable(
        "latency", "ms", 1.0, tuple({**dict.fromkeys(SPACE.levels[0], 9.0), second: 1.0}
                                    for _ in SPACE.layers),
    )  # fmt: skip
    assert slow_when_small.total(SPACE.uniform(first)) == 1 + 9 * len(SPACE.layers)
    costs = (*COSTS, slow_when_small)
    bits, latency = parse_budget("3bits", SPACE), Budget("latency", 20.0, "20ms")
    check_budgets(SPACE, costs, [bits])
    check_budgets(SPACE, costs, [latency])
    with pytest.raises(BudgetError, match=r"at least \d+\.\d\d ms beside 3bits.*Got 20ms"):
        check_budgets(SPACE, costs, [bits, latency])


def test_a_budget_on_an_unknown_cost():
    with pytest.raises(BudgetError, match="one of the costs bits, bytes"):
        check_budgets(SPACE, COSTS, [Budget("power", 1.0, "1W")])


# Time


DENSE_MS = 48.0


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("12ms", 12.0),
        (" 12.5 ms ", 12.5),
        ("80tokens/s", 12.5),
        ("80 tokens/s", 12.5),
        ("2x", 24.0),
        ("1.5x", 32.0),
    ],
)
def test_budgets_of_time_are_milliseconds(text, limit):
    budget = parse_budget(text, SPACE, DENSE_MS)
    assert (budget.cost, budget.limit, budget.text) == ("latency", limit, text.strip())


def test_a_speed_up_needs_the_dense_model():
    assert parse_budget("12ms", SPACE).limit == 12.0
    with pytest.raises(BudgetError, match=r"does not state\. Got 2x\. Write the limit in ms"):
        parse_budget("2x", SPACE)


def test_what_a_budget_limits():
    texts = ("3bits", "9MB", "9KiB", "50%", "9ms", "9tokens/s", "9 x", "0.1KL")
    assert [limited_cost(text) for text in texts] == [
        *("bits", "bytes", "bytes", "parameters", "latency", "latency", "latency", "loss"),
    ]
    with pytest.raises(BudgetError):
        limited_cost("9s")


def slow(per_bit, base):
    """A table of fractions: ms by bits."""
    entries = tuple({level: per_bit * level.bits for level in row} for row in SPACE.levels)
    return CostTable("latency", "ms", base, entries)


@given(
    per_bit=st.floats(1e-4, 10),
    base=st.floats(0.001, 10),
    unit=st.sampled_from(["ms", "tokens/s", "x"]),
)
def test_the_fastest_shown_works_when_typed(per_bit, base, unit):
    costs = (*COSTS, slow(per_bit, base))
    impossible = "1e-6ms" if unit == "ms" else f"1e12{unit}"
    with pytest.raises(BudgetError, match="the fastest allocation") as error:
        check_budgets(SPACE, costs, [parse_budget(impossible, SPACE, DENSE_MS)])
    bound = "at least" if unit == "ms" else "at most"
    shown = re.search(rf"{bound} ([\d.]+ {unit}), the fastest", str(error.value))[1]
    budget = parse_budget(shown, SPACE, DENSE_MS)
    assert check_budgets(SPACE, costs, [budget]) == (budget,)
    least = costs[2].total(cheapest(SPACE, costs[2]))
    assert least <= budget.limit <= 1.011 * least
    assert ("raise the budget" if unit == "ms" else "lower the budget") in str(error.value)


def test_of_budgets_in_several_units_of_time_the_tightest_counts():
    costs = (*COSTS, slow(0.1, 1.0))
    asked = [parse_budget(text, SPACE, DENSE_MS) for text in ("10ms", "120tokens/s", "4x", "5bits")]
    assert [budget.text for budget in check_budgets(SPACE, costs, asked)] == [
        "120tokens/s",
        "5bits",
    ]


def test_a_clash_of_bits_and_tokens_per_second():
    costs = (*COSTS, CostTable("latency", "ms", 0.5, tuple(
        {level: 9.0 - level.bits for level in row} for row in SPACE.levels)))  # fmt: skip
    asked = [parse_budget(text, SPACE) for text in ("3bits", "20tokens/s")]
    for budget in asked:
        check_budgets(SPACE, costs, [budget])
    with pytest.raises(
        BudgetError, match=r"at most 1\d\.\d\d tokens/s beside 3bits.*Got 20tokens/s"
    ):
        check_budgets(SPACE, costs, asked)


@settings(max_examples=40, deadline=None)
@given(spaces(), st.integers(0, 2**32), st.floats(0, 1))
def test_float_limits_are_never_exceeded(space, seed, share):
    rng = np.random.default_rng(seed)
    table = random_table(space, rng, "latency", 1)
    least = table.total(cheapest(space, table))
    prices = random_table(space, rng, "loss", 1).entries
    limit = least * (1 + share)
    budgets = [Budget("latency", limit, "1ms")]
    assert table.total(choose(space, (table,), budgets, prices)) <= limit
