"""`profile`: what every level of every layer takes at a target, measured once and kept."""

from __future__ import annotations

from typing import Any

from autocompress.config import DEFAULT_SPACE, StudyConfig, plain_settings
from autocompress.latency_setup import Latency, price
from autocompress.machine import compute_dtype
from autocompress.models import load_model
from autocompress.progress import Progress, Silent
from autocompress.spaces import build_space, load_space
from autocompress.structure import layers_for
from autocompress.targets import find_target


def profile(
    config: StudyConfig | None = None,
    *,
    again: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Latency:
    """Latency of every level of every layer of a search space at a target.

    What is known from an earlier call is not measured again. Later searches with a budget in time
    use it.

    Args:
        config: everything at once; None takes `settings`.
        again: measure what is known, too.
        progress: told what happens; None is silent.
        settings: fields of `StudyConfig`, such as model, space, target (a name or a `Target`),
            threads and batch.

    Returns:
        Prices: `table` in ms per token, `dropped` levels with reasons, `dense_ms`, `facts()`.

    Raises:
        AutocompressError: no such target, model or space, or a store that does not fit.
    """
    config, shown = config or StudyConfig(**plain_settings(settings)), progress or Silent()
    find_target(config.target)
    chosen = load_space(config.space or DEFAULT_SPACE)
    shown.say(f"loading {config.model or 'the default model'}")
    loaded = load_model(config.model, compute_dtype(config.dtype))
    space = build_space(chosen, layers_for(loaded.model, chosen), config.parsed_pins())
    return price(loaded, space, config.parsed_target(), shown, again=again)
