"""What allocations cost, the budgets that limit them, and the best choice within budgets."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from fractions import Fraction

from autocompress.core import Allocation, Budget, CostTable, SearchSpace
from autocompress.errors import BudgetError
from autocompress.knapsack import EXACT, Limit, Prices, cheapest, solve_knapsack
from autocompress.levels import Dense

# unit -> bytes; with 'bits', everything a budget can be written in
BYTES = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
PARAMETERS, SHARE = "parameters", "%"  # name of the cost and the unit that limits it
LATENCY = "latency"  # name of the cost that these units limit, in ms per token
TIMES = ("ms", "tokens/s", "x")  # per token; tokens per second; how often faster than dense
INVERSE = ("tokens/s", "x")  # more of them is less time
LOSS, LOSS_UNIT = "loss", "KL"  # no cost: measured on validation windows, nats/token
UNITS = ("bits", *BYTES, SHARE, *TIMES, LOSS_UNIT)

# The exponent has two digits because 1e999999999 would be computed exactly, for hours.
_BUDGET = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2})?)\s*(\S*)")
_LONGEST = 40  # characters of a budget; Python refuses to read integers of 4300 digits


def size_tables(
    space: SearchSpace,
    other_bytes: int,  # bytes of the model file outside the space
) -> tuple[CostTable, CostTable]:
    """The tables 'bits' (of the space's weights) and 'bytes' (of the whole model file).

    Effective bits are `bits / space.weights`: always derived, never stored. Every level stores
    whole bytes, so both tables are exact integers.
    """
    bits = tuple(
        {level: layer.storage_bits(level) for level in allowed}
        for layer, allowed in zip(space.layers, space.levels, strict=True)
    )
    whole = tuple({level: count // 8 for level, count in entry.items()} for entry in bits)
    return CostTable("bits", "bits", 0, bits), CostTable("bytes", "bytes", other_bytes, whole)


def parse_budget(text: str, space: SearchSpace, dense_ms: float | None = None) -> Budget:
    """The budget that `text` writes: `3.5bits` per weight in scope, `90MB` of model file, `12ms`.

    >>> from autocompress.core import Layer, SearchSpace
    >>> space = SearchSpace("toy", (Layer("head", ("head",), ((512, 64),)),), ((),))
    >>> parse_budget("3.5bits", space)
    Budget(cost='bits', limit=114688, text='3.5bits')
    >>> parse_budget("80tokens/s", space).limit  # ms per token
    12.5

    Args:
        text: a positive number and a unit: bits; B, kB, MB, GB, KiB, MiB, GiB; % of the parameters
            in scope that products still multiply with, and so of these layers' FLOPs; ms per
            token, tokens/s, or x, the speed-up over the dense model in 16 bits at the same target;
            KL, a loss in nats per token.
        space: its number of weights turns effective bits into bits, % into parameters.
        dense_ms: latency of the dense model, ms per token; needed for 'x'.

    Returns:
        The limit in whole bits or bytes, rounded down, in whole parameters of every matrix,
        rounded up, computed exactly; in ms; or a loss, which no cost table prices.

    Raises:
        BudgetError: no number, not positive, a unit that is not one of these, or a speed-up
            where the dense model's latency is not known.
    """
    number, unit = _read_budget(text)
    if unit in TIMES:
        return Budget(LATENCY, float(_milliseconds(number, unit, text, dense_ms)), text.strip())
    if unit == SHARE:  # rounded up in every matrix, as levels do: 30% admits s70 everywhere
        shapes = [shape for layer in space.layers for shape in layer.shapes]
        kept = sum(math.ceil(number * rows * width / 100) for rows, width in shapes)
        return Budget(PARAMETERS, kept, text.strip())
    if unit == LOSS_UNIT:
        return Budget(LOSS, float(number), text.strip())
    return Budget(limited_cost(text), math.floor(number * _scale(unit, space)), text.strip())


def limited_cost(text: str) -> str:
    """Name of what a budget limits: bits, bytes, parameters, latency or loss.

    Raises:
        BudgetError: it is no budget.
    """
    unit = _read_budget(text)[1]
    if unit in TIMES:
        return LATENCY
    return {"bits": "bits", SHARE: PARAMETERS, LOSS_UNIT: LOSS}.get(unit, "bytes")


def _milliseconds(number: Fraction, unit: str, text: str, dense_ms: float | None) -> Fraction:
    """The limit in ms per token that `number` of `unit` is; and back, being its own inverse."""
    if unit == "ms":
        return number
    if unit == "tokens/s":
        return Fraction(1000) / number
    if dense_ms is None:
        raise BudgetError(
            f"a speed-up needs the latency of the dense model, which this target does not state. "
            f"Got {text}. Write the limit in ms or tokens/s."
        )
    return Fraction(dense_ms) / number


def _read_budget(text: str) -> tuple[Fraction, str]:
    """Number and unit of a budget.

    Raises:
        BudgetError: no number, not positive, or an unknown unit.
    """
    match = _BUDGET.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if match is None or Fraction(match[1]) <= 0:
        raise _unreadable(text, ".")
    number, unit = Fraction(match[1]), match[2]
    if unit not in UNITS:
        near = [known for known in UNITS if known.lower() == unit.lower()]
        near = near or difflib.get_close_matches(unit, UNITS, n=1)
        raise _unreadable(text, f". Did you mean '{match[1]}{near[0]}'?" if near else ".")
    return number, unit


def _unreadable(text: str, why: str) -> BudgetError:
    return BudgetError(
        f"a budget must be a positive number and one of the units {', '.join(UNITS)}, "
        f"such as 3.5bits, 90MB, 12ms or 0.05KL. Got '{text[:_LONGEST]}'{why}"
    )


def _scale(unit: str, space: SearchSpace) -> Fraction:
    """Bits, bytes or parameters in one `unit`."""
    if unit == SHARE:
        return Fraction(space.weights, 100)
    return Fraction(space.weights if unit == "bits" else BYTES[unit])


def check_budgets(
    space: SearchSpace, costs: Sequence[CostTable], budgets: Sequence[Budget]
) -> tuple[Budget, ...]:
    """The budgets that count: the tightest of each cost, in the order they were given.

    Raises:
        BudgetError: above the dense model, below the cheapest allocation, or each possible alone
            but not all of them together.
    """
    by_cost: dict[str, Budget] = {}
    for budget in budgets:
        by_cost[budget.cost] = min(by_cost.get(budget.cost, budget), budget, key=lambda b: b.limit)
    tight = tuple(by_cost.values())
    for budget in tight:
        dense = _dense_total(space, find_table(costs, budget.cost))
        if dense is not None and budget.limit > dense:
            most = _write(space, budget, dense, up=False)
            raise BudgetError(
                f"budget must be {most}, the dense 16-bit model of '{space.name}': above "
                f"it there is nothing to compress. Got {budget.text}. Lower the budget."
            )
    choose(space, costs, tight)
    return tight


def find_table(costs: Sequence[CostTable], name: str) -> CostTable:
    """The cost table called `name`.

    Raises:
        BudgetError: no table has that name.
    """
    for table in costs:
        if table.name == name:
            return table
    known = ", ".join(table.name for table in costs)
    raise BudgetError(f"a budget must limit one of the costs {known}. Got '{name}'.")


def _dense_total(space: SearchSpace, table: CostTable) -> float | None:
    """Cost of the all-dense model, or None where it is not known."""
    if table.unit == PARAMETERS:
        return table.base + space.weights
    size = {"bits": 1, "bytes": 8}.get(table.unit)
    if size is None:
        return None
    return table.base + sum(layer.storage_bits(Dense()) // size for layer in space.layers)


def choose(
    space: SearchSpace,
    costs: Sequence[CostTable],
    budgets: Sequence[Budget],
    prices: Prices | None = None,
    gap: float = EXACT,
    seconds: float = math.inf,
) -> Allocation:
    """The allocation of least total price among those within every budget.

    Args:
        prices: per layer, level -> price; None prices by the first budget's cost.
        gap: relative distance from the least price that is near enough.
        seconds: of the solver, at most; see `solve_knapsack`.

    Raises:
        BudgetError: no allocation meets every budget; says the smallest possible one.
    """
    for budget in budgets:
        table = find_table(costs, budget.cost)
        least = table.total(cheapest(space, table))
        if budget.limit < least:
            word = "fast" if budget.cost == LATENCY else "cheap"
            change = "lower" if budget_unit(budget) in INVERSE else "raise"
            pinned = sum(len(allowed) == 1 for allowed in space.levels)
            free = f" free some of the {pinned} layers with one level," if pinned else ""
            raise BudgetError(
                f"budget must be {_write(space, budget, least, up=True)}, the {word}est "
                f"allocation of '{space.name}'. Got {budget.text}. "
                f"Add a {word}er level{',' if free else ''}{free} or {change} the budget."
            )
    limits = [(find_table(costs, budget.cost), budget.limit) for budget in budgets]
    if prices is None:
        first = limits[0][0] if limits else costs[0]
        if len(limits) <= 1:
            return cheapest(space, first)
        prices = first.entries
    found = solve_knapsack(space, limits, prices, gap=gap, seconds=seconds)
    if found is None:
        raise _clash(space, limits, budgets)
    return found


def _clash(space: SearchSpace, limits: Sequence[Limit], budgets: Sequence[Budget]) -> BudgetError:
    """The error of budgets that are possible alone but not together."""
    names = " and ".join(budget.text for budget in budgets)
    for count in range(1, len(limits)):  # the first budget that those before it leave no room
        table, limit = limits[count]
        found = solve_knapsack(space, limits[:count], table.entries)
        if found is not None and table.total(found) > limit:
            least = _write(space, budgets[count], table.total(found), up=True)
            return BudgetError(
                f"budget must be {least} beside "
                f"{' and '.join(budget.text for budget in budgets[:count])}, or no allocation of "
                f"'{space.name}' meets all. Got {budgets[count].text}. Loosen one of them."
            )
    return BudgetError(f"budgets must be met together by '{space.name}'. Got {names}. Loosen one.")


def budget_unit(budget: Budget) -> str:
    """The unit a budget was written in, or '' when its text is not one of ours."""
    match = _BUDGET.fullmatch(budget.text)
    return match[2] if match and match[2] in UNITS else ""


def _write(space: SearchSpace, budget: Budget, amount: float, *, up: bool) -> str:
    """The bound in the unit the user wrote: 'at least 2.31 bits', 'at most 80.10 tokens/s'.

    Rounded (by 1 % at most) so that typing it works.

    Args:
        up: `amount` is the least that is possible, otherwise the most.
    """
    unit, exact = budget_unit(budget), Fraction(amount)
    if unit == "x":  # limit = dense / number, so the dense model's latency is limit * number
        dense = Fraction(budget.limit) * _read_budget(budget.text)[0]
        exact, up = dense / exact, not up
    elif unit in TIMES:
        exact = _milliseconds(exact, unit, budget.text, None)
        up = up == (unit == "ms")
    elif unit:
        exact /= _scale(unit, space)
    digits = 0 if unit == "B" else 2
    while True:
        steps = exact * 10**digits
        shown = Fraction(math.ceil(steps) if up else math.floor(steps), 10**digits)
        if abs(shown - exact) <= exact / 100:
            bound = "at least" if up else "at most"
            return f"{bound} {float(shown):.{digits}f} {unit or budget.cost}"
        digits += 1
