"""Loss: KL(dense || candidate) in nats per token over whole windows, and perplexity beside it.

The dense model's distribution is computed once and kept as its `k` most likely tokens plus the mass
of all others. Lumping the others together can only lower a KL divergence (data processing
inequality), so the loss is a lower bound of the full one. On SmolLM2 (vocabulary 49,152) with
k = 512 it is short by 3 to 5 % at 2 to 4 bits (`studies/main_job/measure.py exactness`);
`tests/test_quality.py` compares it with full logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from autocompress.core import Score
from autocompress.errors import StudyError
from autocompress.files import write_atomically

TOP = 512
BATCH = 4  # windows per forward pass at most
ROWS = 32  # rows of logits worked on together
LOGITS = 1 << 27  # logits per forward pass at most: 256 MB in bf16
ALL = slice(None)  # positions of a window


@dataclass(frozen=True)
class Teacher:
    """The dense model's compact next-token distributions.

    Args:
        windows: (n, window) int64.
        index: (n, window, k) int32, most likely tokens.
        logp: (n, window, k) float32, nats.
        tail: (n, window) float32, mass of all other tokens.
        nll: (n,) float32, the dense model's mean negative log-likelihood of each window.
    """

    windows: Tensor
    index: Tensor
    logp: Tensor
    tail: Tensor
    nll: Tensor

    def rows(self, chosen: Tensor | int | slice) -> Teacher:
        """The teacher of some of its windows, or of one alone, by number."""
        return Teacher(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def batches(self, vocabulary: int) -> list[Teacher]:
        """Its windows in order, as many at a time as one pass takes."""
        size = batch_size(self.windows.shape[1], vocabulary)
        return [self.rows(slice(i, i + size)) for i in range(0, len(self.windows), size)]

    @property
    def perplexity(self) -> float:
        """Perplexity of the dense model on all windows."""
        return float(self.nll.double().mean().exp())


def vocabulary_of(model: Any) -> int:
    """Logits of a position."""
    return int(model.get_output_embeddings().weight.shape[0])


def batch_size(window: int, vocabulary: int) -> int:
    """Windows per forward pass."""
    return max(1, min(BATCH, LOGITS // (window * vocabulary)))


def window_logits(model: Any, windows: Tensor, positions: slice = ALL) -> Iterator[Tensor]:
    """Yields (positions, vocab) logits, one window of (n, window) tokens after the other.

    The head runs at these positions only, where the model's forward can spare it the others.
    """
    for part in windows.split(batch_size(windows.shape[1], vocabulary_of(model))):
        yield from _logits(model, part, positions)


def _logits(model: Any, part: Tensor, positions: slice) -> Tensor:  # (n, positions, vocab)
    if positions == ALL or not _spares_head(model):
        logits: Tensor = model(input_ids=part, use_cache=False).logits
        return logits[:, positions]
    kept = torch.arange(part.shape[1])[positions]
    found: Tensor = model(input_ids=part, use_cache=False, logits_to_keep=kept).logits
    return found


def _spares_head(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@torch.inference_mode()
def teacher(
    model: Any,
    windows: np.ndarray,
    top: int = TOP,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Teacher:
    """The distributions of the dense `model` on (n, window) tokens."""
    tokens = torch.from_numpy(windows)
    n, window = tokens.shape
    k = min(top, vocabulary_of(model))
    index = torch.empty(n, window, k, dtype=torch.int32)
    logp = torch.empty(n, window, k)
    tail = torch.empty(n, window)
    nll = torch.empty(n)
    for i, logits in enumerate(window_logits(model, tokens)):
        index[i] = torch.cat([part.topk(k, 1, sorted=False).indices for part in logits.split(ROWS)])
        logp[i], nlls = log_probabilities(logits, index[i], tokens[i])
        tail[i] = (1 - logp[i].double().exp().sum(1)).clamp_min(0)
        nll[i] = nlls.mean()
        progress(i + 1, n)
    return Teacher(tokens, index, logp, tail, nll)


def log_probabilities(
    logits: Tensor,  # (positions, vocab), any float type
    index: Tensor,  # (positions, k), tokens wanted
    tokens: Tensor,  # (window,), int64, the text itself
    positions: slice = ALL,  # of the window
) -> tuple[Tensor, Tensor]:  # log p (positions, k), nll of the text (positions with a next,), nats
    """In float32, a few rows at a time: a whole window at 49 k tokens would leave the caches."""
    following = tokens.roll(-1)[positions]
    wanted = torch.cat([index.long(), following.unsqueeze(1)], 1)
    rows = []
    for part, columns in zip(logits.split(ROWS), wanted.split(ROWS), strict=True):
        rows.append(part.float().log_softmax(1).gather(1, columns))
    found = torch.cat(rows)
    followed = torch.arange(len(tokens))[positions] < len(tokens) - 1
    return found[:, :-1], -found[followed, -1]


def divergence(
    logp: Tensor,  # (window, k), dense model's most likely tokens, nats
    tail: Tensor,  # (window,), its mass elsewhere
    logq: Tensor,  # (window, k), the candidate's at the same tokens, nats
) -> Tensor:  # (window,), nats
    """KL(dense || candidate) with all other tokens lumped into one."""
    rest = (1 - logq.exp().sum(1)).clamp_min(1e-9)  # float32 cannot tell a smaller rest from none
    return (logp.exp() * (logp - logq)).sum(1) + torch.special.xlogy(tail, tail / rest)


def divergence_slope(
    logits: Tensor,  # (window, vocab), any float type
    reference: Teacher,  # of this window: no leading dimension
) -> Tensor:  # (window, vocab), float32
    """Gradient of the sum of `divergence` over the window with respect to the logits.

    q - p at the dense model's most likely tokens; the rest share what is left in proportion to q.
    """
    chance = logits.float().softmax(1)
    index = reference.index.long()
    known = chance.gather(1, index)
    rest = (1 - known.sum(1)).clamp_min(1e-9)
    slope = chance * (1 - reference.tail / rest).unsqueeze(1)
    return slope.scatter_(1, index, known - reference.logp.exp())


@torch.inference_mode()
def score(model: Any, reference: Teacher, positions: slice = ALL) -> Score:
    """How far `model` is from the reference's dense model on the reference's windows.

    Args:
        positions: of every window, to compare at; one at least that is not its last.
    """
    losses, nlls = [], []
    for i, logits in enumerate(window_logits(model, reference.windows, positions)):
        dense = reference.rows(i)
        logq, nll = log_probabilities(logits, dense.index[positions], dense.windows, positions)
        loss = divergence(dense.logp[positions], dense.tail[positions], logq).mean()
        losses.append(float(loss))
        nlls.append(float(nll.mean()))
    return Score(tuple(losses), tuple(nlls))


def stored_teacher(path: Path, compute: Callable[[], Teacher], windows: np.ndarray) -> Teacher:
    """The teacher kept at `path`, computed and written there the first time.

    Raises:
        StudyError: the file is damaged or was made for other windows.
    """
    if not path.exists():
        made = compute()
        tensors = {field.name: getattr(made, field.name).contiguous() for field in fields(made)}
        write_atomically(path, lambda draft: save_file(tensors, draft))
        return made
    found = read_teacher(path)
    if not torch.equal(found.windows, torch.from_numpy(windows)):
        raise StudyError(f"'{path}' must hold this run's windows. Got others. Use another --run.")
    return found


def read_teacher(path: Path) -> Teacher:
    """The teacher kept at `path`.

    Raises:
        StudyError: the file is missing or damaged.
    """
    try:
        return Teacher(**load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise StudyError(
            f"'{path}' must be whole. Got: {error}. Delete it; it is remade."
        ) from error
