"""A search under a budget of quality: the smallest of everything that keeps a loss.

Every baseline is brought to the limit by itself: the smallest uniform allocation that keeps it, and
the smallest answer of the integer programme. The strategy then searches at the latter's size, and
what it gained in loss is turned into size, a few layers at a time, by gradients at its winner.
"""

from __future__ import annotations

from dataclasses import replace

from autocompress.core import Allocation, Budget, Problem, Trial
from autocompress.cost import LATENCY
from autocompress.errors import BudgetError
from autocompress.finalists import Finalists, run_strategy
from autocompress.knapsack import Region, cheapest, solve_knapsack
from autocompress.opening import Opened
from autocompress.predictions import Sensitivities
from autocompress.result import additive_loss
from autocompress.session import Session
from autocompress.smallest import Family, Gauge, Goal, Hunt
from autocompress.strategies.ilp import GAP, SECONDS
from autocompress.strategies.prices import predicted_change, prices_around
from autocompress.strategies.uniform import nearest_uniform, uniform_origin, uniforms_that_fit

REACH = 8  # layers that may change when gained loss is turned into size; a quarter if that is more
SMALLEST = "smallest"  # origin of what came of it


def find_smallest(opened: Opened, goal: Goal) -> Finalists:
    """Uniform, the ILP's answer and the strategy's, each as small as the loss allows.

    Raises:
        BudgetError: not even the best that the other budgets allow keeps the loss.
    """
    session, problem = opened.session, opened.problem
    gauge = Gauge(problem, int(session.windows.validate.size))
    spending, table = session.spending, problem.table(goal.objective)
    predicted = problem.sensitivities(spending.sensitivities).mean
    low = table.total(cheapest(problem.space, table))
    ilp = _family(problem, goal, predicted)
    largest = ilp(_most(problem, goal))
    assert largest is not None, "budgets were checked"
    uniform = _smallest_uniform(problem, gauge, goal, predicted)
    start = largest if uniform is None else uniform
    if gauge.measure(start, "ilp").loss > goal.budget.limit:
        raise _unreachable(problem, goal, gauge)
    hunt = Hunt(table, goal.budget.limit, ilp, lambda it: additive_loss(predicted, it), "ilp")
    additive = hunt.run(gauge, start, low)
    session.progress.say(_told("ilp", problem, goal, gauge.measure(additive, "ilp")))
    sized = replace(problem, budgets=(*problem.budgets, _at(goal, table.total(additive))))
    baseline = nearest_uniform(problem) if uniform is None else uniform
    finalists = {
        "uniform": (baseline, uniform_origin(problem, baseline)),
        "ilp": (additive, "ilp"),
    }
    for origin, found in run_strategy(opened.within(sized)).items():
        if found.allocation not in (baseline, additive):
            finalists[origin] = found.allocation, origin
    if opened.stop.ended:
        return finalists
    return finalists | _trimmed(session, problem, goal, gauge, finalists)


def rank(raced: dict[str, Trial], problem: Problem, goal: Goal | None) -> list[str]:
    """Roles of finalists, the best first; under a goal, only those that keep it, by size.

    Args:
        raced: role -> trial on validation windows, by loss.
    """
    if goal is None:
        return list(raced)
    table = problem.table(goal.objective)
    keeping = [role for role, trial in raced.items() if trial.loss <= goal.budget.limit]
    return sorted(keeping, key=lambda role: table.total(raced[role].allocation))


def _trimmed(
    session: Session, problem: Problem, goal: Goal, gauge: Gauge, finalists: Finalists
) -> Finalists:
    """The best finalist with what it gained in loss turned into size; nothing where it did not."""
    table = problem.table(goal.objective)
    for allocation, origin in finalists.values():
        gauge.measure(allocation, origin)
    found = {it: trial for it, trial in gauge.trials.items() if trial.loss <= goal.budget.limit}
    best = min(found, key=lambda it: (table.total(it), found[it].loss))
    session.progress.say(_told(found[best].origin, problem, goal, found[best]))
    prices = _prices(session, problem, best)
    loss = found[best].loss
    hunt = Hunt(
        table,
        goal.budget.limit,
        _family(problem, goal, prices, best),
        lambda it: max(0.0, loss + predicted_change(prices, best, it)),
        SMALLEST,
    )
    small = hunt.run(gauge, best, table.total(cheapest(problem.space, table)))
    if small == best:
        return {}
    session.progress.say(_told(SMALLEST, problem, goal, gauge.trials[small]))
    return {SMALLEST: (small, SMALLEST)}


def _prices(session: Session, problem: Problem, at: Allocation) -> Sensitivities:
    """What moving one layer costs beside an allocation, from gradients there."""
    spending = session.spending
    sensitivities = problem.sensitivities(spending.sensitivities)
    before = spending.sensitivities + spending.steps * spending.batch
    around = problem.linearize(at, problem.fidelity(spending.batch).tokens, before)
    return prices_around(sensitivities, at, around).mean


def _family(
    problem: Problem, goal: Goal, prices: Sensitivities, center: Allocation | None = None
) -> Family:
    """The best by prices within the problem's budgets and a size; near `center`, if any."""
    fixed = [(problem.table(it.cost), it.limit) for it in problem.budgets]
    table = problem.table(goal.objective)
    reach = max(REACH, len(problem.space.layers) // 4)
    regions = [] if center is None else [Region(center, most=reach)]

    def best(limit: float) -> Allocation | None:
        limits = [*fixed, (table, limit)]
        return solve_knapsack(problem.space, limits, prices, regions, GAP, SECONDS)

    return best


def _smallest_uniform(
    problem: Problem, gauge: Gauge, goal: Goal, predicted: Sensitivities
) -> Allocation | None:
    """The smallest uniform allocation that keeps the loss, None if none does."""
    table = problem.table(goal.objective)
    every = sorted(uniforms_that_fit(problem), key=table.total)
    if not every:
        return None
    largest = every[-1]
    if gauge.measure(largest, uniform_origin(problem, largest)).loss > goal.budget.limit:
        return None

    def family(limit: float) -> Allocation | None:
        return next((it for it in reversed(every) if table.total(it) <= limit), None)

    def predict(allocation: Allocation) -> float:
        return additive_loss(predicted, allocation)

    hunt = Hunt(table, goal.budget.limit, family, predict, "uniform")
    return hunt.run(gauge, largest, 0)


def _most(problem: Problem, goal: Goal) -> float:
    """The objective's cost of the dearest allocation."""
    table = problem.table(goal.objective)
    rows = zip(problem.space.levels, table.entries, strict=True)
    return table.base + sum(max(entry[level] for level in allowed) for allowed, entry in rows)


def _at(goal: Goal, limit: float) -> Budget:
    unit = "ms" if goal.objective == LATENCY else "B"
    return Budget(goal.objective, limit, f"{limit}{unit}")


def _told(origin: str, problem: Problem, goal: Goal, trial: Trial) -> str:
    cost = problem.table(goal.objective).total(trial.allocation)
    size = f"{cost:.3f} ms" if goal.objective == LATENCY else f"{cost:,.0f} bytes"
    return f"{origin}: KL {trial.loss:.4f} on validation windows at {size}"


def _unreachable(problem: Problem, goal: Goal, gauge: Gauge) -> BudgetError:
    least = min(trial.loss for trial in gauge.trials.values())
    beside = " and ".join(budget.text for budget in problem.budgets)
    within = f" within {beside}" if beside else ""
    return BudgetError(
        f"budget must be at least {least:.4f} KL, what the best of '{problem.space.name}'{within} "
        f"loses on validation windows. Got {goal.budget.text}. Add a level of more bits"
        f"{', or loosen a budget' if beside else ', or raise the budget'}."
    )
