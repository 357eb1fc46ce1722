"""Text from a causal LM, one token at a time: decoders, and the seconds of their steps."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from autocompress.errors import GenerationError, ModelError
from autocompress.lean import lean_decoder
from autocompress.sampling import Sampling
from autocompress.text import text_pieces

Clock = Callable[[], float]  # seconds

CACHES = ("past_key_values", "cache_params")  # what models call their memory of former tokens


class Decoder(Protocol):
    """One sequence, read and continued token by token.

    Args:
        name: which implementation this is.
        capacity: tokens that the sequence may have, prompt included.
    """

    name: str
    capacity: int

    def prefill(self, tokens: Tensor) -> Tensor:
        """Read a prompt, (length,) int64, into an empty sequence; logits (vocab,) of its end.

        Raises:
            GenerationError: no tokens, more than `capacity`, or the sequence is not empty.
        """

    def step(self, token: int) -> Tensor:
        """Append one token; logits (vocab,) behind it.

        Raises:
            GenerationError: the sequence has `capacity` tokens already.
        """

    def reset(self) -> None:
        """Forget the sequence."""

    def truncate(self, length: int) -> bool:
        """Forget all but its first `length` tokens; False where that cannot be: reset it then."""


class PlainDecoder:
    """Through the model's own forward and the cache that it makes.

    Args:
        model: any causal LM of transformers.
        capacity: tokens, at most the model's context; None is that context.
        name: what to call it.

    Raises:
        GenerationError: `capacity` is out of range.
    """

    def __init__(self, model: Any, capacity: int | None = None, name: str = "plain") -> None:
        self.model, self.name = model, name
        self.capacity = checked_capacity(model, capacity)
        known = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.reset()

    def reset(self) -> None:
        self._cache: dict[str, Any] = {}
        self._length = 0

    def truncate(self, length: int) -> bool:
        if not self._cache or not all(crop_cache(it, length) for it in self._cache.values()):
            return False
        self._length = length
        return True

    def prefill(self, tokens: Tensor) -> Tensor:
        if self._length:
            raise GenerationError(
                f"a prompt must come first. Got one behind {self._length} tokens. Call reset()."
            )
        if tokens.dim() != 1 or not len(tokens):
            raise GenerationError(
                f"a prompt must be a row of at least one token. Got shape {tuple(tokens.shape)}."
            )
        return self._read(tokens)

    def step(self, token: int) -> Tensor:
        return self._read(torch.tensor([token]))

    @torch.inference_mode()
    def _read(self, tokens: Tensor) -> Tensor:  # (length,) -> (vocab,)
        if self._length + len(tokens) > self.capacity:
            raise GenerationError(
                f"a sequence must have at most {self.capacity} tokens, this decoder's capacity. "
                f"Got {self._length + len(tokens)}. Shorten it or make a larger decoder."
            )
        out = self.model(
            input_ids=tokens.view(1, -1), use_cache=True, **self._cache, **self._options
        )
        self._cache = {name: out[name] for name in CACHES if out.get(name) is not None}
        if not self._cache:
            raise ModelError(
                f"a model must keep a cache of the tokens it has read, as {' or '.join(CACHES)}. "
                f"Got {type(self.model).__name__}, which returns neither."
            )
        self._length += len(tokens)
        logits: Tensor = out.logits[0, -1]
        return logits


def crop_cache(cache: Any, length: int) -> bool:
    """Shorten a cache of transformers to `length` tokens; False where it cannot, such as states."""
    if not hasattr(cache, "crop"):
        return False
    extra = cache.get_seq_length() - length
    try:
        if extra > 0:
            cache.crop(-extra)
    except ValueError:  # a sliding window has lost the tokens that would come back
        return False
    return bool(cache.get_seq_length() == length)


def checked_capacity(model: Any, capacity: int | None) -> int:
    """Tokens that a sequence of `model` may have: `capacity`, or all that the model can see.

    Raises:
        GenerationError: it is below 1, above the model's context, or None without such a limit.
    """
    limit = context_length(model)
    if capacity is None:
        if limit is None:
            raise GenerationError(
                f"{type(model).__name__} states no context, so a capacity must be given. Got none."
            )
        capacity = limit
    if capacity < 1 or (limit is not None and capacity > limit):
        most = "" if limit is None else f" and at most {limit}, the model's context"
        raise GenerationError(
            f"prompt and continuation must have at least 1 token{most}. Got {capacity}. "
            "Shorten the prompt or ask for fewer tokens."
        )
    return capacity


def context_length(model: Any) -> int | None:
    """Tokens the model's positions reach; None where the configuration states no limit."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return None if limit is None else int(limit)


def make_decoder(model: Any, capacity: int | None = None) -> Decoder:
    """The fastest decoder for `model`; a plain one says in its name why it is not the lean one.

    Raises:
        GenerationError: `capacity` is out of range.
    """
    capacity = checked_capacity(model, capacity)
    made: Decoder | str = lean_decoder(model, capacity)
    return PlainDecoder(model, capacity, f"plain ({made})") if isinstance(made, str) else made


def generate_tokens(
    decoder: Decoder,
    prompt: Tensor,  # (length,) int64
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Tokens that continue the prompt, until one of `stop` (not given out) or `max_tokens`.

    Args:
        decoder: reset first.
        max_tokens: at least 1; with the prompt at most the decoder's capacity.
        sampling: None takes the likeliest token.

    Raises:
        GenerationError: at once, before the first token is asked for: a value is out of range.
    """
    if max_tokens < 1:
        raise GenerationError(f"max_tokens must be at least 1. Got {max_tokens}.")
    if len(prompt) + max_tokens > decoder.capacity:
        raise GenerationError(
            f"prompt and continuation must have at most {decoder.capacity} tokens. "
            f"Got {len(prompt)} + {max_tokens}. Shorten the prompt or lower max_tokens."
        )
    return _continue(decoder, prompt, max_tokens, (sampling or Sampling()).picker(), stop)


def _continue(
    decoder: Decoder,
    prompt: Tensor,
    max_tokens: int,
    pick: Callable[[Tensor], int],
    stop: Collection[int],
) -> Iterator[int]:
    decoder.reset()
    token = pick(decoder.prefill(prompt))
    for left in reversed(range(max_tokens)):
        if token in stop:
            return
        yield token
        if left:
            token = pick(decoder.step(token))


def generate(
    decoder: Decoder,
    tokenizer: Any,
    prompt: Tensor,  # (length,) int64
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[str]:
    """Pieces of text that continue the prompt; see `generate_tokens`, `Sampling`, `text_pieces`.

    Raises:
        GenerationError: a value is out of range.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    tokens = generate_tokens(decoder, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop)
    return text_pieces(tokenizer, tokens, prompt.tolist())


def time_prefill(decoder: Decoder, prompt: Tensor, clock: Clock = time.perf_counter) -> float:
    """Seconds from an empty sequence to the first token behind the prompt (length,)."""
    decoder.reset()
    start = clock()
    int(decoder.prefill(prompt).argmax())
    return clock() - start


def time_decode(
    decoder: Decoder, prompt: Tensor, tokens: int, clock: Clock = time.perf_counter
) -> list[float]:
    """Seconds of each of `tokens` greedy steps behind the prompt (length,); `prefill` not timed."""
    decoder.reset()
    token, seconds = int(decoder.prefill(prompt).argmax()), []
    for _ in range(tokens):
        start = clock()
        token = int(decoder.step(token).argmax())
        seconds.append(clock() - start)
    return seconds
