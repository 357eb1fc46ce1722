import time
from types import SimpleNamespace

import pytest

from autocompress.session import Session


def test_a_phase_does_not_count_the_phases_inside_it():
    session = SimpleNamespace(seconds={})
    with Session.clock(session, "search"):
        time.sleep(0.02)
        with Session.clock(session, "sensitivities"):
            time.sleep(0.05)
        with Session.clock(session, "sensitivities"):
            time.sleep(0.05)
    assert set(session.seconds) == {"search", "sensitivities"}
    assert 0.1 <= session.seconds["sensitivities"] < 1
    assert 0.02 <= session.seconds["search"] < session.seconds["sensitivities"]


def test_a_phase_that_fails_is_counted_too():
    session = SimpleNamespace(seconds={})
    with pytest.raises(KeyError), Session.clock(session, "database"):
        time.sleep(0.01)
        raise KeyError
    assert session.seconds["database"] >= 0.01
