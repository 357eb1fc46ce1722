"""Finalists: what a search proposes, raced on validation windows, and scored on test windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from autocompress.core import Allocation, Fidelity, Trial
from autocompress.gguf_mixes import largest_mix
from autocompress.opening import Opened
from autocompress.result import candidate_facts
from autocompress.strategies import configured
from autocompress.strategies.ends import ends_high
from autocompress.strategies.ilp import solve
from autocompress.strategies.racing import SIMPLE, ranked
from autocompress.strategies.uniform import nearest_uniform, uniform_origin

NOTHING_YET = "stopped before the first candidate was scored: the simplest answers are raced"
Finalists = dict[str, tuple[Allocation, str]]  # role -> allocation, origin; simplest first
TESTED = ("uniform", "mix", "ilp")  # baselines that are scored on test windows, too
SEARCH_TOKENS = 8192  # of the search split, on which the report compares winner and baselines


def run_strategy(opened: Opened) -> dict[str, Trial]:
    """Origin -> what each phase of the configured strategy ended with, until Ctrl-C."""
    session, study = opened.session, opened.study
    phases: dict[str, Trial] = {}
    strategy = configured(session.config, session.spending)
    with opened.stop.search():
        for found in strategy(opened.problem, np.random.default_rng(session.config.seed)):
            phases[found.origin] = found
            session.progress.say(
                f"{found.origin}: KL {found.loss:.4f} on {found.fidelity.tokens:,} tokens, "
                f"{study.tokens:,} spent"
            )
            for trial in study.at(found.fidelity):  # all of the last stage; known ones are skipped
                if opened.problem.fits(trial.allocation):  # removal measures over the budget, too
                    opened.mirror.report(trial, "candidate")
    return phases


def find_finalists(opened: Opened) -> Finalists:
    """Run the strategy: the baselines, and what each of its phases ended with.

    Where Ctrl-C comes before the first phase has ended, the baselines alone.
    """
    phases = run_strategy(opened)
    if not phases:
        opened.session.progress.say(NOTHING_YET)
    roles = baselines(opened)
    simple = {allocation for allocation, _ in roles.values()}
    for origin, found in phases.items():
        if found.allocation not in simple:
            roles[origin] = found.allocation, origin
    return roles


def baselines(opened: Opened) -> Finalists:
    """The simple answers that every search must beat, within the same budgets."""
    problem = opened.problem
    predicted = problem.sensitivities(opened.session.spending.sensitivities).mean
    uniform = nearest_uniform(problem)
    mix = largest_mix(problem, opened.session.loaded.model.config)
    return {
        "uniform": (uniform, uniform_origin(problem, uniform)),
        **({} if mix is None else {"mix": (mix[0], f"mix {mix[1]}")}),
        "ends": (ends_high(problem), "ends"),
        "ilp": (solve(problem.space, problem.costs, problem.budgets, predicted), "ilp"),
    }


def race_finalists(opened: Opened, finalists: Finalists) -> dict[str, Trial]:
    """Role -> trial on validation windows, best first; a search must prove that it is better."""
    fidelity = Fidelity(int(opened.session.windows.validate.size), 0, "validate")
    found = {role: score_one(opened, finalists, role, fidelity) for role in finalists}
    order = ranked(found, SIMPLE)
    least = min(found, key=lambda role: found[role].loss)  # ties: the simplest
    if least != order[0]:
        opened.session.progress.say(
            f"'{least}' has KL {found[least].loss:.4f} on validation windows, too little below "
            f"{SIMPLE[order[0]]} ({found[order[0]].loss:.4f}) to be no accident: that stays"
        )
    return {role: found[role] for role in order}


def score_one(opened: Opened, finalists: Finalists, role: str, fidelity: Fidelity) -> Trial:
    """The trial of one finalist, known or new."""
    allocation, origin = finalists[role]
    name = SIMPLE.get(role, f"the answer of '{role}'")
    opened.session.progress.say(f"scoring {name} on {fidelity.split} windows")
    (trial,) = opened.study.evaluate([allocation], fidelity, origin)
    opened.mirror.report(trial, "baseline" if role in SIMPLE else "finalist")
    return trial


def score_finalists(
    opened: Opened, finalists: Finalists, best: str, raced: Mapping[str, Trial]
) -> dict[str, Any]:
    """Scores of the baselines and the winner; only here is any test window looked at.

    On those, uniform, llama.cpp's mix, ILP and winner suffice: the other baseline has lost on
    validation windows.
    """
    problem = opened.problem
    search = problem.fidelity(SEARCH_TOKENS)
    test = Fidelity(int(opened.session.windows.test.size), 0, "test")
    simple = [role for role in SIMPLE if role in raced]
    results = {role: candidate_facts(problem, {"validate": raced[role]}) for role in simple}
    tested = [role for role in TESTED if role in finalists]
    for role in dict.fromkeys((*tested, best)):
        before, after = (
            score_one(opened, finalists, role, fidelity) for fidelity in (search, test)
        )
        trials = {"search": before, "validate": raced[role], "test": after}
        results[role] = candidate_facts(problem, trials)
    return {**{role: results[role] for role in simple}, "winner": results[best]}
