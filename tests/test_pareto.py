import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from autocompress.pareto import front

SMALL = st.sampled_from([0.0, 1.0, 2.0, 3.0, np.inf])  # few values, so that ties are common


@given(arrays(np.float64, st.tuples(st.integers(0, 12), st.integers(1, 3)), elements=SMALL))
def test_front_is_the_definition(points):
    expected = [
        not any(np.all(other <= point) and np.any(other < point) for other in points)
        for point in points
    ]
    assert front(points).tolist() == expected


def test_duplicates_stay_and_nan_never_does():
    points = np.array([[1.0, 2.0], [1.0, 2.0], [np.nan, 0.0], [2.0, 1.0], [2.0, 2.0]])
    assert front(points).tolist() == [True, True, False, True, False]


def test_front_of_nothing_is_nothing():
    assert front(np.empty((0, 2))).shape == (0,)
