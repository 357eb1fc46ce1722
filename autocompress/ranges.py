"""A range of a cost, `bits=2.5..6`, as the limits of a front's points."""

from __future__ import annotations

import re
from collections.abc import Sequence

from autocompress.cost import BYTES, LOSS, UNITS, limited_cost
from autocompress.errors import BudgetError
from autocompress.tables import did_you_mean

NAMES = {"bytes": "B"}  # beside the units of budgets
RISING = [unit for unit in UNITS if unit not in ("tokens/s", "x")]  # more of it is larger

_RANGE = re.compile(r"\s*([^=\s]+)\s*=\s*([0-9.eE+]+?)\s*\.\.\s*([0-9.eE+]+)\s*")


def range_texts(text: str, points: int) -> tuple[str, ...]:
    """Limits as budgets write them, evenly spaced, both ends included: '2.5bits', …, '6bits'.

    Args:
        text: 'COST=LOW..HIGH', where COST is bits, bytes, a unit of bytes, or ms.
        points: at least 2.

    Raises:
        BudgetError: it is not written like this, or no range.
    """
    match = _RANGE.fullmatch(text)
    if match is None:
        raise _unreadable(text, "")
    unit = NAMES.get(match[1], match[1])
    if unit not in RISING:
        raise _unreadable(text, did_you_mean(unit, [*RISING, *NAMES]))
    try:
        low, high = float(match[2]), float(match[3])
    except ValueError as error:
        raise _unreadable(text, "") from error
    if not 0 < low < high < float("inf"):
        raise _unreadable(text, " Its ends must be positive, the lower one first.")
    values = [low + (high - low) * i / (points - 1) for i in range(points)]
    whole = unit in BYTES and BYTES[unit] == 1
    return tuple(f"{round(v)}{unit}" if whole else f"{v:.6g}{unit}" for v in values)


def check_beside(limits: Sequence[str], budgets: Sequence[str]) -> None:
    """Check that a front's limits, if any, and the budgets beside them are of different kinds.

    Raises:
        BudgetError: a budget cannot be read, or limits the loss or what the range does.
    """
    limited = {limited_cost(text): text for text in budgets}
    ranged = {limited_cost(text) for text in limits}
    if ranged and LOSS in limited:
        raise BudgetError(
            "--pareto must go without a limit on the loss, because a front shows every loss. "
            f"Got --budget {limited[LOSS]}. Leave one of them out."
        )
    for name in ranged & set(limited):
        raise BudgetError(
            f"--pareto and --budget must limit different costs. Got {limits[0]} to {limits[-1]} "
            f"and {limited[name]}. Leave the budget out, or give it in another unit than the range."
        )


def _unreadable(text: str, hint: str) -> BudgetError:
    return BudgetError(
        f"--pareto must be a cost and its range, such as bits=2.5..6, MB=60..120 or ms=5..9. "
        f"Got '{text[:40]}'.{hint}"
    )
