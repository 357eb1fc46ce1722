"""Who wins on validation windows: a search must prove that it beats the simple answers."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from toys import toy_space

from autocompress import finalists
from autocompress.core import Fidelity, Score, Trial
from autocompress.finalists import race_finalists
from autocompress.levels import parse_level

SPACE = toy_space(1)
UNIFORM, ILP, FOUND = (SPACE.uniform(parse_level(f"w{bits}g64")) for bits in (2, 3, 4))
FINALISTS = {"uniform": (UNIFORM, "u"), "ilp": (ILP, "ilp"), "refinement": (FOUND, "refinement")}


def opened(gain, said):
    """A search whose refinement is `gain` below the ILP; the difference's standard error is 0.1."""
    base = np.random.default_rng(0).normal(10, 2, 16)
    wobble = np.tile([1.0, -1.0], 8) * 0.4 * (15 / 16) ** 0.5
    losses = {UNIFORM: base + 1, ILP: base, FOUND: base - gain + wobble}

    def evaluate(allocations, fidelity, origin):
        rows = [tuple(losses[one].tolist()) for one in allocations]
        pairs = zip(allocations, rows, strict=True)
        return [Trial(0, one, fidelity, Score(row, row), (), origin) for one, row in pairs]

    windows = SimpleNamespace(validate=np.zeros((16, 16)))
    return SimpleNamespace(
        session=SimpleNamespace(windows=windows, progress=SimpleNamespace(say=said.append)),
        study=SimpleNamespace(evaluate=evaluate),
        mirror=SimpleNamespace(report=lambda *_: None),
    )


@pytest.mark.parametrize(("gain", "winner"), [(0.3, "refinement"), (0.1, "ilp")])
def test_an_unproven_gain_changes_nothing_and_is_told(gain, winner):
    said = []
    raced = race_finalists(opened(gain, said), FINALISTS)
    assert next(iter(raced)) == winner
    assert set(raced) == set(FINALISTS)
    assert raced["ilp"].fidelity == Fidelity(256, 0, "validate")
    assert any("'refinement' has KL" in line for line in said) == (winner == "ilp")


def test_measurements_beyond_the_budget_are_no_candidates(monkeypatch):
    """Removal is scored over the budget, too, to learn what it loses."""
    fidelity = Fidelity(256, 0)
    trials = [
        Trial(number, one, fidelity, Score((1.0,), (1.0,)), (), "removal")
        for number, one in enumerate((UNIFORM, FOUND))
    ]
    reported = []
    search = SimpleNamespace(
        session=SimpleNamespace(
            config=SimpleNamespace(seed=0),
            spending=None,
            progress=SimpleNamespace(say=lambda _: None),
        ),
        problem=SimpleNamespace(fits=lambda it: it == UNIFORM),
        study=SimpleNamespace(at=lambda _: trials, tokens=0),
        mirror=SimpleNamespace(report=lambda trial, role: reported.append((trial, role))),
        stop=SimpleNamespace(search=nullcontext),
    )
    monkeypatch.setattr(finalists, "configured", lambda *_: lambda *_: iter(trials[:1]))
    assert finalists.run_strategy(search) == {"removal": trials[0]}
    assert reported == [(trials[0], "candidate")]
