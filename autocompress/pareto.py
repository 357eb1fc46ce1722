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
