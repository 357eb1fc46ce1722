"""Parameters as a cost: how many numbers layers multiply with."""

from __future__ import annotations

from collections.abc import Sequence

from autocompress.core import CostTable, SearchSpace
from autocompress.cost import PARAMETERS, limited_cost


def parameter_table(space: SearchSpace) -> CostTable:
    """The table 'parameters': numbers that the space's layers multiply with.

    Every token takes twice as many FLOPs in these layers, so a share of the dense model's
    parameters is the same share of its FLOPs.
    """
    entries = tuple(
        {level: layer.parameters(level) for level in allowed}
        for layer, allowed in zip(space.layers, space.levels, strict=True)
    )
    return CostTable(PARAMETERS, PARAMETERS, 0, entries)


def parameter_costs(space: SearchSpace, budgets: Sequence[str]) -> tuple[CostTable, ...]:
    """The table 'parameters' where a budget limits them, otherwise nothing.

    Raises:
        BudgetError: a budget cannot be read.
    """
    shares = [limited_cost(text) == PARAMETERS for text in budgets]  # all must be readable
    return (parameter_table(space),) if any(shares) else ()
