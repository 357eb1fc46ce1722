"""Strategies by the tokens that they may spend: `NAME@TOKENS`."""

from __future__ import annotations

from autocompress.core import GRADIENT, Problem, Strategy
from autocompress.effort import Plan, plan
from autocompress.strategies.auto import Auto
from autocompress.strategies.bayesian import Bayesian
from autocompress.strategies.evolution import Evolution
from autocompress.strategies.evopress import EvoPress, RoundedUp
from autocompress.strategies.ilp import ILP
from autocompress.strategies.random_search import RandomSearch
from autocompress.strategies.refinement import Refinement
from autocompress.strategies.spdy import SPDY
from autocompress.strategies.surrogate import SurrogateSearch

CANDIDATES = 32  # that all tokens would score; those that gradients take are fewer candidates


def contender(name: str, problem: Problem) -> Strategy:
    """A strategy that spends no more, with sensitivities of as many tokens as `auto` gives them.

    Args:
        name: such as 'auto@30000'.
    """
    family, _, tokens = name.partition("@")
    spending = plan(int(tokens), problem.window, problem.tokens)
    if family == "auto":
        return Auto(spending)
    if family == "evopress":
        return _evopress(spending.tokens)
    scored = max(1, round(spending.tokens / CANDIDATES / problem.window)) * problem.window
    return _other(family, spending, scored)


def _other(family: str, spending: Plan, scored: int) -> Strategy:
    """Those that score each candidate on `scored` tokens."""
    tokens, gradients = spending.tokens, spending.sensitivities
    left = (tokens - GRADIENT * gradients) // scored
    start = ILP(gradients, tokens=scored)
    stages = ((2, scored // 2), (1, scored))
    if family == "random":
        return RandomSearch(tokens // scored - 1, scored)
    if family == "spdy":
        return SPDY(candidates=left, tokens=scored, sensitivity_tokens=gradients)
    if family == "bayesian":
        return Bayesian(candidates=left, tokens=scored, sensitivity_tokens=gradients)
    if family == "evolution":
        return Evolution(start, None, stages=stages, tokens=left * scored)
    if family == "surrogate":
        return SurrogateSearch(
            start,
            None,
            tokens=tokens,
            patience=None,
            screen=scored // 2,
            race_tokens=scored,
            sensitivity_tokens=gradients,
        )
    if family == "refinement" and spending.steps:
        return Refinement(
            start,
            steps=spending.steps,
            sensitivity_tokens=gradients,
            batch=spending.batch,
            contenders=spending.contenders,
            tokens=spending.compare,
        )
    raise SystemExit(f"there is no contender '{family}' of {tokens:,} tokens.")


def _evopress(tokens: int) -> Strategy:
    """EvoPress with 16 offspring in stages of 512 and 4,096 tokens: 28,672 a generation.

    Its example's own generation takes 1.2 million.
    """
    return EvoPress(
        start=RoundedUp(tokens=512),
        generations=None,
        offspring=16,
        stages=((4, 512), (1, 4096)),
        tokens=tokens,
    )
