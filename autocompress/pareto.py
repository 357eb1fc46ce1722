"""The front: the points that no other point beats."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def front(
    points: npt.NDArray[np.float64],  # (n, m), every column is minimised
) -> npt.NDArray[np.bool_]:  # (n,)
    """Which points are not dominated: no other is at most as large everywhere and smaller once.

    Equal points do not dominate each other, so duplicates stay together. A point with a NaN is
    never on the front. O(n · size of the front).

    Args:
        points: (n, m) losses and costs; infinities are allowed.

    Returns:
        (n,) True on the front.

    References:
        Kung, Luccio, Preparata, "On finding the maxima of a set of vectors", J. ACM 1975.
    """
    kept = np.zeros(len(points), dtype=np.bool_)
    found = np.empty_like(points)
    size = 0
    # In lexicographic order nothing dominates a point before it, so one pass is enough.
    for index in np.lexsort(points.T[::-1]) if points.size else ():
        point, best = points[index], found[:size]
        beaten = ((best <= point).all(axis=1) & (best < point).any(axis=1)).any()
        if beaten or np.isnan(point).any():
            continue
        kept[index] = True
        found[size] = point
        size += 1
    return kept


def hypervolume(
    points: npt.NDArray[np.float64],  # (n, m), every column is minimised
    reference: npt.NDArray[np.float64],  # (m,)
) -> float:
    """The volume that the points dominate below a reference point, by Optuna.

    Points beyond the reference add nothing.

    References:
        Zitzler, Thiele, "Multiobjective evolutionary algorithms: a comparative case study and the
        strength Pareto approach", IEEE Trans. Evolutionary Computation 1999.
    """
    # It has no public name: the requirement is pinned to a major version, and a test compares it
    # with areas that are known.
    from optuna._hypervolume import compute_hypervolume

    within = points[(points <= reference).all(axis=1)]
    return float(compute_hypervolume(within, reference)) if len(within) else 0.0


def knee(
    points: npt.NDArray[np.float64],  # (n, 2), a front in order of the first column
) -> int | None:
    """The point that lies furthest below the line between a front's ends, both axes scaled to 1.

    Returns:
        Its number; None where no point lies below, or there are fewer than three.

    References:
        Das, "On characterizing the 'knee' of the Pareto curve based on normal-boundary
        intersection", Structural Optimization 1999.
    """
    if len(points) < 3:
        return None
    span = points.max(axis=0) - points.min(axis=0)
    if not (span > 0).all() or not np.isfinite(span).all():
        return None
    x, y = ((points - points.min(axis=0)) / span).T
    below = 1 - x - y
    best = int(below.argmax())
    return best if below[best] > 0 else None
