"""Exports, read back in a fresh process and compared with the stitched model."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autocompress.errors import AutocompressError, OutputError
from autocompress.exporters import reader
from autocompress.exporters.source import Source
from autocompress.models import load_model
from autocompress.quality import Teacher, score, teacher, window_logits
from autocompress.scoring import text_windows

CLOSE = 1e-5  # of logits, relative: what another order of sums makes (fused experts, adapters)
SAME = 1e-3  # of KL, relative, and a millionth of a nat beside it
# Where inputs are rounded to 8 bits: one that lies between two codes may fall on either side.
CLOSE_ROUNDED, SAME_ROUNDED = 0.01, 0.02
WINDOW = 512  # tokens, where no run has windows


def verify(
    source: Source,
    out: Path,
    facts: Mapping[str, Any],
    reader_name: str,
    windows: int = 2,
    model: str | None = None,
) -> dict[str, Any]:
    """Read an export back and compare weights, logits, bytes and KL.

    Args:
        source: what it was made from.
        facts: what its exporter said of it.
        windows: how many are computed; KL needs the run's dense distributions or the dense model.
        model: the dense model; None is the one recorded in the source.

    Returns:
        `passed`, `problems` and every figure.
    """
    known, why = dense_distributions(source, windows, model)
    rounded, eight = facts.get("rounded", {}), facts.get("int8_activations", ())
    stitched = source.stitched(rounded)
    unrounded = score(stitched, _teacher(known)).loss if eight and why is None else None
    for name in eight:
        stitched.get_submodule(name).register_forward_pre_hook(round_inputs)
    with torch.inference_mode():
        expected = next(iter(window_logits(stitched, known["windows"][:1]))).float()
    losses = score(stitched, _teacher(known)).losses if why is None else ()
    del stitched
    found, logits = read_back(source, out, facts, reader_name, known)
    checks: dict[str, Any] = {
        "reader": reader_name,
        "windows": list(known["windows"].shape),
        "weights": _compare_weights(source, found["weights"], rounded),
        "logits": float((logits - expected).abs().max()),
        "largest_logit": float(expected.abs().max()),
        "file_bytes": sum((out / name).stat().st_size for name in facts["files"]),
        "promised_bytes": facts["bytes"],
        "kl": sum(found["kl"]) / len(found["kl"]) if losses else None,
        "kl_stitched": sum(losses) / len(losses) if losses else None,
        "kl_unknown": why,
        "int8_activations": len(eight),
        "kl_unrounded": unrounded,
    }
    problems = list(_problems(checks))
    return {"passed": not problems, "problems": problems, **checks}


def round_inputs(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Round a module's input, (..., tokens, in), to 8 bits a token as compressed-tensors does."""
    given, *others = args
    scale = given.abs().amax(-1, keepdim=True) / 127.5
    scale = scale.where(scale > 0, torch.finfo(given.dtype).eps)
    return (given.div(scale).round().clamp(-128, 127) * scale, *others)


def tolerances(checks: Mapping[str, Any]) -> tuple[float, float]:
    """Relative differences that logits and KL may have."""
    return (CLOSE_ROUNDED, SAME_ROUNDED) if checks["int8_activations"] else (CLOSE, SAME)


def _problems(checks: Mapping[str, Any]) -> Any:
    """What must not be."""
    weights, logits = checks["weights"], checks["logits"]
    close, same = tolerances(checks)
    if weights["different"]:
        yield (
            f"{len(weights['different'])} of {weights['compared']} weights differ, such as "
            f"{weights['different'][0]}"
        )
    if not logits <= checks["largest_logit"] * close:
        yield f"logits differ by {logits:.3g} where the largest is {checks['largest_logit']:.3g}"
    if checks["file_bytes"] > checks["promised_bytes"]:
        yield f"{checks['file_bytes']} bytes, the cost table has {checks['promised_bytes']}"
    kl, stitched = checks["kl"], checks["kl_stitched"]
    if kl is not None and not abs(kl - stitched) <= same * stitched + 1e-6:
        yield f"KL is {kl:.6f} where the stitched model has {stitched:.6f}"


def _compare_weights(
    source: Source, found: Mapping[str, str | None], rounded: Mapping[str, str]
) -> dict[str, Any]:
    """Digests of the weights in scope beside those of the source."""
    different = [
        name for name, there in found.items() if there != _digest(source.decoded(name, rounded))
    ]
    return {"compared": len(found), "different": different}


def _digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.float().contiguous().numpy().tobytes()).hexdigest()


def read_back(
    source: Source,
    out: Path,
    facts: Mapping[str, Any],
    reader_name: str,
    known: Mapping[str, Tensor],
) -> tuple[dict[str, Any], Tensor]:
    """What a fresh process finds in an export: digests and losses, logits of the first window.

    Raises:
        OutputError: it could not read it.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_file(dict(known), f"{folder}/teacher.safetensors")
        job = {
            "reader": reader_name,
            "folder": str(out.resolve()),
            "file": str(out.resolve() / facts["files"][0]),
            "modules": [[source.their(name), name] for name in source.scope],
            "teacher": f"{folder}/teacher.safetensors",
            "out": f"{folder}/found",
        }
        # -P: the reader's own folder, which holds modules of our names, stays off its path.
        child = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", reader.__file__],
            input=json.dumps(job),
            capture_output=True,
            text=True,
        )
        if child.returncode:
            lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
            raise OutputError(f"'{out}' must be read by {reader_name}. Got: {lines[-1]}")
        found = json.loads(Path(f"{folder}/found.json").read_text())
        return found, load_file(f"{folder}/found.safetensors")["logits"]


def dense_distributions(
    source: Source, windows: int, model: str | None
) -> tuple[dict[str, Tensor], str | None]:
    """Windows and the dense model's distributions on them; without these, why.

    They are the run's test windows where the run still stands beside the result.
    """
    run = source.folder.with_name(f"{source.folder.resolve().name}.run")
    kept = run / "teacher-test.safetensors"
    if model is None and kept.exists() and _same_model(run, source):
        return {k: v[:windows].contiguous() for k, v in load_file(kept).items()}, None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    length = min(WINDOW, int(source.config.get("max_position_embeddings") or WINDOW))
    tokens = text_windows(None, tokenizer, length, length * windows)
    named = model or source.manifest["model"]["source"]
    try:
        dense = load_model(named, torch.float32)
    except AutocompressError as error:
        return {"windows": torch.from_numpy(tokens)}, str(error)
    if dense.fingerprint != source.manifest["model"]["fingerprint"]:
        return {"windows": torch.from_numpy(tokens)}, f"'{dense.name}' has other weights"
    return {k: v.contiguous() for k, v in vars(teacher(dense.model, tokens)).items()}, None


def _same_model(run: Path, source: Source) -> bool:
    """Whether a run folder belongs to the source's dense model."""
    try:
        content = json.loads((run / "database" / "manifest.json").read_text())
        return bool(content["identity"]["model"] == source.manifest["model"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _teacher(known: Mapping[str, Tensor]) -> Teacher:
    return Teacher(**known)
