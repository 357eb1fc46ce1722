"""Score a packed model on any text against its dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from autocompress.documents import read_documents
from autocompress.errors import CalibrationError, ModelError
from autocompress.exporters.native import load
from autocompress.models import load_model
from autocompress.output import read_manifest
from autocompress.progress import Progress, Silent
from autocompress.quality import score, teacher
from autocompress.runtime import used_backends


def evaluate(
    folder: str | Path,
    data: str | None = None,
    *,
    model: str | None = None,
    window: int = 512,
    tokens: int = 16384,
    activations: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """KL to the dense model and perplexity of a packed model.

    Args:
        folder: result of a search.
        data: what `read_documents` reads; None is the built-in text, which the search also used.
        model: the dense model; None is the one recorded in the folder.
        window: tokens per window, at least 2.
        tokens: scored at most; whole windows.
        activations: what kernels round them to: 'int8', 'bfloat16' or 'float32', which does not
            round; None is what the folder says: what ships is scored.
        progress: told what happens.

    Returns:
        `dense` and `packed`, each with kl, kl_stderr (nats/token) and perplexity; `tokens`;
        `activations`; `backends`, name -> version.

    Raises:
        AutocompressError: not a result, not its dense model, or less than one window of text.
    """
    shown = progress or Silent()
    manifest = read_manifest(Path(folder))
    packed, tokenizer = load(folder, activations=activations)
    shown.say("loading the dense model")
    dense = load_model(model or manifest["model"]["source"], packed.dtype)
    if dense.fingerprint != manifest["model"]["fingerprint"]:
        raise ModelError(
            f"--model must be the dense model that '{folder}' was made from "
            f"({manifest['model']['name']}). Got '{dense.name}', whose weights differ."
        )
    windows = text_windows(data, tokenizer, window, tokens)
    with shown.task("dense model") as advance:
        reference = teacher(dense.model, windows, progress=advance)
    shown.say("scoring the packed model")
    found = score(packed, reference)
    return {
        "folder": str(folder),
        "data": data or "the built-in text",
        "window": window,
        "tokens": int(windows.size),
        "activations": activations or packed.config.quantization_config.activations,
        "backends": used_backends(packed),
        "dense": {"kl": 0.0, "kl_stderr": 0.0, "perplexity": reference.perplexity},
        "packed": {"kl": found.loss, "kl_stderr": found.stderr, "perplexity": found.perplexity},
    }


def text_windows(data: str | None, tokenizer: Any, window: int, tokens: int) -> np.ndarray:
    """The first whole windows of a text, (n, window) int64.

    Raises:
        CalibrationError: the text has less than one window.
    """
    if window < 2 or tokens < window:
        raise CalibrationError(
            f"--window must be at least 2 and --tokens at least one window. Got {window}, {tokens}."
        )
    ids: list[int] = []
    for document in read_documents(data):
        ids += tokenizer(document, add_special_tokens=False)["input_ids"]
        ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if len(ids) >= tokens:
            break
    count = min(len(ids), tokens) // window
    if count == 0:
        raise CalibrationError(
            f"the text must have at least one window of {window} tokens. Got {len(ids)} tokens."
        )
    return np.array(ids[: count * window], dtype=np.int64).reshape(count, window)
