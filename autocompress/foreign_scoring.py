"""Score a model of any format on any text; beside its dense model where that is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from autocompress.comparison import compare
from autocompress.errors import CalibrationError, ModelError
from autocompress.folders import MANIFEST
from autocompress.loading import load_any
from autocompress.models import load_model
from autocompress.progress import Progress, Silent
from autocompress.quality import vocabulary_of
from autocompress.scoring import WINDOW, text_facts, text_windows

DISTANCES = ("kl", "agreement")  # figures that begin so need a dense model


def evaluate_foreign(
    path: Path,
    data: str | None = None,
    *,
    model: str | None = None,
    window: int | None = None,
    tokens: int = 16384,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A model folder or GGUF file beside its dense model, its weights exactly as it holds them.

    Computed by transformers in float32; other runtimes round activations and differ by what that
    costs.

    Args:
        path: a GGUF file, or a folder that is no result of ours.
        data: what `read_documents` reads; None is the built-in text.
        model: the dense model; None is the one an export of ours records beside the file, if any.
        window: tokens per window, at least 2; None is 512.
        tokens: scored at most; whole windows.
        progress: told what happens.

    Returns:
        As `scoring.evaluate`, without what belongs to kernels and tasks. Where no dense model is
        known, `dense` and the distances of `packed` are None.

    Raises:
        AutocompressError: damaged files or unknown architecture, a dense model with other tokens,
            or less than one window of text.
    """
    shown, length = progress or Silent(), window or WINDOW
    if length < 2 or tokens < length:
        raise CalibrationError(
            f"--window must be at least 2 and --tokens at least one window. Got {length}, {tokens}."
        )
    shown.say(f"decoding {path}")
    packed, tokenizer, method = load_any(path, torch.float32)
    windows = text_windows(data, tokenizer, length, tokens)
    known, source = (True, model) if model else _recorded(path)
    dense = _dense(path, packed, source, shown) if known else packed
    with shown.task("both models" if known else "the model") as advance:
        found = compare(dense, packed, windows, advance)
    facts = text_facts(found, windows, tokenizer)
    if not known:
        facts["dense"] = None
        facts["packed"] |= {name: None for name in facts["packed"] if name.startswith(DISTANCES)}
    text = data or "the built-in text"
    return {"file": str(path), "method": method, "data": text, **facts, "tasks": {}}


def _dense(path: Path, packed: Any, source: str | None, shown: Progress) -> Any:
    """The dense model.

    Raises:
        ModelError: it has other tokens.
    """
    shown.say("loading the dense model")
    dense = load_model(source, torch.float32)
    if vocabulary_of(dense.model) != vocabulary_of(packed):
        raise ModelError(
            f"--model must have the tokens of '{path}', {vocabulary_of(packed)} of them. Got "
            f"'{dense.name}' with {vocabulary_of(dense.model)}. Name the model it was made from."
        )
    return dense.model


def _recorded(path: Path) -> tuple[bool, str | None]:
    """Whether an export of ours records its dense model, and which; None is the default model."""
    try:
        manifest = json.loads(((path.parent if path.is_file() else path) / MANIFEST).read_text())
        return True, manifest["model"]["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return False, None
