"""Effort: how many tokens a search may spend, and on what."""

from __future__ import annotations

from dataclasses import dataclass

from autocompress.core import GRADIENT
from autocompress.errors import ConfigError
from autocompress.tables import did_you_mean

EFFORTS = {"quick": 30_000, "normal": 300_000, "thorough": 1_000_000}  # tokens

SENSITIVITIES, DESCENT = 0.36, 0.36  # shares of a small budget; the rest is for scores
REFINE = 0.5  # share of refinement where sensitivities are known
WARM = 8  # a search of a run folder that knows another spends one in so many tokens of the first
FRONT = 1.4  # tokens of a whole front, in those that one search may spend, not all of which it does
UNIFORM = 4  # windows on which the uniform allocation is raced before it leaves
STEPS = 8  # of the descent at most; more tokens make larger batches
REFINED = 16  # windows that the descent must have to be worth it; evolution has them otherwise
SCORED = 4  # windows that candidates are compared on where there is no descent


@dataclass(frozen=True)
class Plan:
    """What a token budget buys.

    Args:
        tokens: in all; a token of a gradient pass counts `GRADIENT` times.
        sensitivities: tokens of the sensitivities.
        steps: linearizations of the refinement; 0 leaves it, and exchanges, out.
        batch: tokens of each.
        contenders: of its answers, that race the start.
        compare: tokens that candidates are compared on in the end.
    """

    tokens: int
    sensitivities: int
    steps: int
    batch: int
    contenders: int
    compare: int


def plan(tokens: int, window: int, available: int) -> Plan:
    """How `auto` spends `tokens`; all of a plan's sizes are whole windows.

    Gradients that say what every layer costs come first, because no candidate is better than
    they are; of as many tokens as the search split has, at most. What is left over goes to
    exchanges and evolution. Where tokens are few refinement's gradients say too little, and
    evolution has theirs, too.

    Args:
        tokens: to spend.
        window: tokens per window.
        available: tokens of the search split.

    Raises:
        ConfigError: not enough for gradients and scores of one window each.
    """
    least = (2 * GRADIENT + 3) * window
    if tokens < least:
        raise ConfigError(
            f"a search must have at least {least} tokens to spend: one window of {window} for "
            f"each gradient pass and each of three candidates. Got {tokens}. Raise --tokens, or "
            "use --strategy uniform."
        )

    def whole(share: float, passes: float, most: int) -> int:
        return max(1, min(int(share * tokens / passes), most) // window) * window

    sensitivities = whole(SENSITIVITIES, GRADIENT, available)
    descent = whole(DESCENT, GRADIENT, tokens) // window  # windows
    left = tokens - GRADIENT * sensitivities
    if descent < REFINED:
        compare = min(SCORED * window, available, max(1, left // 4 // window) * window)
        return Plan(tokens, sensitivities, 0, window, 1, compare)
    steps = max(1, min(STEPS, descent // 4))
    contenders = max(1, min(4, steps // 2))
    batch = max(1, min(descent // steps, available // window)) * window
    left -= GRADIENT * steps * batch
    uniform = min(UNIFORM * window, left // 3)
    compare = whole((left - uniform) / tokens, 1 + contenders, available)
    return Plan(tokens, sensitivities, steps, batch, contenders, compare)


def share(base: Plan, extra: int, window: int, available: int) -> Plan:
    """A plan that shares its sensitivities with `base` and spends `extra` tokens beside them.

    For another budget or another point of a front, gradients beside the dense model are known.
    What is left is spent in halves: on refinement, and on scores.

    Args:
        extra: tokens beyond the sensitivities; at least one window is taken for each purpose.
        window: tokens per window.
        available: tokens of the search split.
    """
    descent = max(1, int(REFINE * extra / GRADIENT) // window)  # windows
    steps = max(1, min(STEPS, descent // 2))
    contenders = max(1, min(3, steps // 2))
    batch = max(1, min(descent // steps, available // window)) * window
    left = max(0, extra - GRADIENT * steps * batch - min(UNIFORM * window, extra // 6))
    compare = max(1, min(left // (1 + contenders), available) // window) * window
    tokens = GRADIENT * base.sensitivities + max(extra, window)
    return Plan(tokens, base.sensitivities, steps, batch, contenders, compare)


def front_plan(tokens: int, points: int, window: int, available: int) -> Plan:
    """What each point of a front may spend where one search may spend `tokens`.

    All points together spend less than half as much again as one search: sensitivities are paid
    once, and answers to neighbouring limits are alike.
    """
    base = plan(tokens, window, available)
    extra = int(FRONT * tokens) - GRADIENT * base.sensitivities
    return share(base, extra // points, window, available)


def effort_tokens(effort: str) -> int:
    """Tokens of a named effort.

    Raises:
        ConfigError: no effort has this name.
    """
    if effort not in EFFORTS:
        raise ConfigError(
            f"an effort must be one of {', '.join(EFFORTS)}. Got '{effort}'."
            f"{did_you_mean(effort, EFFORTS)}"
        )
    return EFFORTS[effort]
