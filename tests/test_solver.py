"""A solver's settings: refused where wrong, and what a database records of them."""

import pytest

from autocompress.errors import ConfigError
from autocompress.operators import Solver


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "awq"}, r"'method' of a solver must be one of gptq, rtn\. Got 'awq'"),
        ({"pruning": "wanda2"}, "'pruning' of a solver must be one of sparsegpt, wanda, magnitude"),
        ({"low_rank": "qr"}, "'low_rank' of a solver must be one of whitened, svd"),
        ({"refit": -1}, r"must be 0 or more\. Got -1 and 2"),
        ({"alternations": -2}, "must be 0 or more"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Solver(**settings)


def test_databases_of_quantized_levels_stay_the_same_databases():
    first = {"method": "gptq", "damping": 0.01, "activation_order": True, "search_scales": True}
    assert Solver().identity() == first
    assert Solver(method="rtn").identity() == first | {"method": "rtn"}


@pytest.mark.parametrize(
    "changed", [{"pruning": "wanda"}, {"refit": 0}, {"low_rank": "svd"}, {"alternations": 0}]
)
def test_whatever_is_changed_counts(changed):
    assert Solver(**changed).identity() == Solver().identity() | changed
