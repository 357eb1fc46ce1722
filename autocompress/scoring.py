"""Score a packed model against its dense model: on test windows, on any text, on tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autocompress.calibration import calibration_windows, cut_windows
from autocompress.comparison import Comparison, compare
from autocompress.documents import SPLITS, SplitTokens, read_documents
from autocompress.errors import CalibrationError, ModelError, StudyError
from autocompress.exporters.native import load
from autocompress.models import LoadedModel, load_model
from autocompress.output import read_manifest
from autocompress.progress import Progress, Silent
from autocompress.runtime import used_backends
from autocompress.session import SPLIT_SEED
from autocompress.tasks import check_tasks, score_tasks
from autocompress.text import first_token

WINDOW = 512  # tokens, of text that no search was run on


def evaluate(
    folder: str | Path,
    data: str | None = None,
    *,
    model: str | None = None,
    window: int | None = None,
    tokens: int = 16384,
    activations: str | None = None,
    tasks: Sequence[str] = (),
    task_folder: str | Path | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A packed model beside its dense model: what it predicts otherwise, and how well both do.

    Args:
        folder: result of a search.
        data: what `read_documents` reads; None is the search's own text, its test windows, which
            no decision of the search saw.
        model: the dense model; None is the one recorded in the folder.
        window: tokens per window, at least 2; None is 512, or the search's for its test windows.
        tokens: scored at most; whole windows.
        activations: what kernels round them to: 'int8', 'bfloat16' or 'float32', which does not
            round; None is what the folder says: what ships is scored.
        tasks: names of lm-eval tasks that both models are scored on, too.
        task_folder: where tasks of your own are, as YAML files; None is lm-eval's own tasks.
        limit: questions of each task, at most.
        progress: told what happens.

    Returns:
        `dense` and `packed`, each with kl (KL(dense ‖ model), exact), kl_reverse
        (KL(model ‖ dense)), kl_top (as a search measures it: a lower bound), their standard
        errors over windows (nats/token), agreement (share of equal likeliest tokens), perplexity
        and bits_per_byte; `text`, `window`, `tokens`, `bytes`; `activations`; `backends`, name ->
        version; `tasks`, name -> metric -> {dense, packed, stderr of both}.

    Raises:
        AutocompressError: not a result, not its dense model, less than one window of text, or an
            unknown task.
    """
    shown = progress or Silent()
    manifest = read_manifest(Path(folder))
    check_tasks(tasks, task_folder, limit)
    packed, tokenizer = load(folder, activations=activations)
    windows, text = _windows(manifest, data, tokenizer, window, tokens)
    shown.say("loading the dense model")
    dense = _dense_model(model, manifest["model"], folder, packed.dtype)
    with shown.task("both models") as advance:
        found = compare(dense.model, packed, windows, advance)
    models = {"dense": dense.model, "packed": packed}
    return {
        "folder": str(folder),
        "data": text,
        "activations": activations or packed.config.quantization_config.activations,
        "backends": used_backends(packed),
        **text_facts(found, windows, tokenizer),
        "tasks": score_tasks(models, tokenizer, tasks, task_folder, limit, shown),
    }


def _dense_model(
    model: str | None, recorded: Mapping[str, Any], folder: str | Path, dtype: torch.dtype
) -> LoadedModel:
    """The dense model of a result.

    Raises:
        ModelError: its weights are not those that were compressed.
    """
    dense = load_model(model or recorded["source"], dtype)
    if dense.fingerprint != recorded["fingerprint"]:
        raise ModelError(
            f"--model must be the dense model that '{folder}' was made from "
            f"({recorded['name']}). Got '{dense.name}', whose weights differ."
        )
    return dense


def text_facts(found: Comparison, windows: np.ndarray, tokenizer: Any) -> dict[str, Any]:
    """Both models' figures on the windows, and how much text these are."""
    size = sum(map(len, predicted_text(windows, tokenizer)))
    distances = ("kl", "kl_reverse", "kl_top")
    dense = dict.fromkeys((*distances, *(f"{it}_stderr" for it in distances)), 0.0)
    packed = {it: found.mean(it) for it in distances}
    packed |= {f"{it}_stderr": found.stderr(it) for it in distances}
    return {
        "window": int(windows.shape[1]),
        "tokens": int(windows.size),
        "bytes": size,
        "dense": {**dense, "agreement": 1.0, **_likelihood(found, size, "nll_dense")},
        "packed": {
            **packed,
            "agreement": found.mean("agreement"),
            **_likelihood(found, size, "nll"),
        },
    }


def _likelihood(found: Comparison, size: int, figure: str) -> dict[str, float | None]:
    """How well a model predicts the text itself; windows of separators alone have no bytes."""
    per_byte = found.bits_per_byte(size, figure) if size else None
    return {"perplexity": found.perplexity(figure), "bits_per_byte": per_byte}


def predicted_text(windows: np.ndarray, tokenizer: Any) -> list[bytes]:
    """UTF-8 text of the tokens of each window that are predicted: all but the first."""

    def text(ids: np.ndarray) -> bytes:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(ids.tolist(), **options)).encode()

    return [text(row)[len(text(row[:1])) :] for row in windows]


def _windows(
    manifest: Mapping[str, Any], data: str | None, tokenizer: Any, window: int | None, tokens: int
) -> tuple[np.ndarray, str]:  # (n, window) int64, what it is
    """Windows of a text or, where none is named, the test windows of the search."""
    recorded = manifest["calibration"]
    length = window or (WINDOW if data is not None else int(recorded["window"]))
    if length < 2 or tokens < length:
        raise CalibrationError(
            f"--window must be at least 2 and --tokens at least one window. Got {length}, {tokens}."
        )
    if data is not None:
        return text_windows(data, tokenizer, length, tokens), data
    if length != recorded["window"]:
        raise CalibrationError(
            f"--window must be {recorded['window']} for the search's test windows. Got {length}. "
            "Leave it out, or name a text with --data."
        )
    source = manifest.get("text")
    name = "test windows of " + ("the built-in text" if source is None else str(source))
    return _test_windows(recorded, source, tokenizer)[: tokens // length], name


def _test_windows(recorded: Mapping[str, Any], source: str | None, tokenizer: Any) -> np.ndarray:
    """The test windows of a search, cut again from its text and checked.

    Raises:
        CalibrationError: the text is gone, or no longer what it was.
    """
    sizes = SplitTokens(**{name: recorded["splits"][name]["tokens"] for name in SPLITS})
    windows = calibration_windows(
        source,
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        int(recorded["window"]),
        sizes,
        SPLIT_SEED,
        tokenizer.eos_token_id,
        first_token(tokenizer),
    )
    try:
        windows.check_recorded(recorded)
    except StudyError as error:
        raise CalibrationError(
            f"the search's text must be as it was, to find its test windows again. {error} "
            "Name a text with --data."
        ) from error
    return windows.test


def text_windows(data: str | None, tokenizer: Any, window: int, tokens: int) -> np.ndarray:
    """The first whole windows of a text, (n, window) int64.

    Raises:
        CalibrationError: the text has less than one window.
    """
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
    return cut_windows(ids, count, window, first_token(tokenizer))
