import time
from types import SimpleNamespace

import pytest

from autocompress.session import Session


@pytest.fixture
def passes(monkeypatch):
    """A clock that moves when told to, in seconds."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def test_a_phase_does_not_count_the_phases_inside_it(passes):
    session = SimpleNamespace(seconds={})
    with Session.clock(session, "search"):
        passes(1)
        for _ in range(2):
            with Session.clock(session, "sensitivities"):
                passes(5)
        passes(1)
    assert session.seconds == {"search": 2, "sensitivities": 10}


def test_a_phase_that_fails_is_counted_too(passes):
    session = SimpleNamespace(seconds={})
    with pytest.raises(KeyError), Session.clock(session, "database"):
        passes(3)
        raise KeyError
    assert session.seconds == {"database": 3}
