"""Dominated levels: what a layer need not be offered, because another level is as good for less."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from autocompress.core import CostTable, Layer, SearchSpace
from autocompress.latency import Dropped
from autocompress.levels import Joint, Level

ErrorOf = Callable[[str, Level], float]  # (module, level) -> squared error of its output
NO_LESS = {"bits": "smaller", "latency": "faster", "parameters": "fewer parameters"}


def find_dominated(
    space: SearchSpace, costs: Sequence[CostTable], error: ErrorOf
) -> tuple[Dropped, ...]:
    """Levels that are no smaller, no faster and no better than another level of their layer.

    Of equals the first stays. A level of one part stays everywhere if one layer needs it, because
    uniform allocations, which every search must beat, are made of such levels.

    Args:
        space: as it would be searched.
        costs: whatever counts as smaller or faster, over at least the levels of `space`.
        error: on calibration inputs, comparable between the levels of a module; NaN where it is
            not known, which dominates nothing.

    Returns:
        One entry per level, with the layers that lose it.
    """
    found: defaultdict[Level, dict[str, Level]] = defaultdict(dict)
    takers: Counter[Level] = Counter()
    for index, (layer, allowed) in enumerate(zip(space.layers, space.levels, strict=True)):
        takers.update(allowed)
        figures = {level: _figures(layer, index, level, costs, error) for level in allowed}
        for at, level in enumerate(allowed):
            better = _dominator(at, allowed, figures)
            if better is not None:
                found[level][layer.name] = better
    names = [name for key, name in NO_LESS.items() if any(t.name == key for t in costs)]
    return tuple(
        Dropped(tuple(by), level, _reason(names, Counter(by.values())))
        for level, by in found.items()
        if isinstance(level, Joint) or len(by) == takers[level]
    )


def _figures(
    layer: Layer, index: int, level: Level, costs: Sequence[CostTable], error: ErrorOf
) -> tuple[float, ...]:
    """Everything that should be small."""
    errors = map(error, layer.modules, layer.module_levels(level))
    return (*(table.entries[index][level] for table in costs), *errors)


def _dominator(
    at: int, allowed: Sequence[Level], figures: dict[Level, tuple[float, ...]]
) -> Level | None:
    """The best of the levels that are nowhere worse than the one at `at`; None where there is none.

    It is itself dominated by no other, so it stays.
    """
    mine = figures[allowed[at]]
    rivals = [
        (sum(theirs), place, level)
        for place, level in enumerate(allowed)
        for theirs in [figures[level]]
        if level != allowed[at]
        and all(a <= b for a, b in zip(theirs, mine, strict=True))
        and (theirs != mine or place < at)
    ]
    return min(rivals)[2] if rivals else None


def _reason(names: Sequence[str], by: Counter[Level]) -> str:
    """'no smaller and no better than w2g128 (30 layers), w2g64 (7 layers)'."""
    others = ", ".join(
        f"{level} ({count} layer{'s' if count > 1 else ''})" for level, count in by.most_common()
    )
    return f"{', '.join(f'no {name}' for name in names)} and no better than {others}"
