"""Between text and tokens: a prompt in, pieces of text out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from autocompress.errors import GenerationError

CONTEXT = 5  # tokens of the prompt that the first pieces are decoded behind
UNKNOWN = "\ufffd"  # what bytes that are no whole character decode to


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text, by the model's generation settings and by its tokenizer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    found = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    return frozenset(found - {None})


def first_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text (Llama's, Gemma's), if it does."""
    marked = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return int(marked[0]) if marked[1 : 1 + len(plain)] == plain else None


def encode_prompt(tokenizer: Any, text: str, chat: bool = True) -> Tensor:  # (length,) int64
    """The tokens of a prompt.

    Args:
        chat: as a user's message in the tokenizer's chat template, if it has one.

    Raises:
        GenerationError: no tokens, not Unicode, or a template that takes no such message.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GenerationError(f"the prompt must be Unicode text. Got: {error}.") from error
    templated = chat and tokenizer.chat_template is not None
    if templated:
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates are programs, and raise what they like
            raise GenerationError(
                f"the chat template must take one message of a user. Got: {error}. Try --no-chat."
            ) from error
    ids = tokenizer(text, add_special_tokens=not templated)["input_ids"]
    if not ids:
        raise GenerationError("the prompt must have at least one token. Got none. Write some text.")
    return torch.tensor(ids)


def text_pieces(
    tokenizer: Any, tokens: Iterable[int], context: Sequence[int] = ()
) -> Iterator[str]:
    """The text of tokens, piece by piece, as soon as each piece is final.

    A character may be spread over several tokens, and whether a token begins with a space may
    depend on the one before. So a piece is what a token adds to the text of the tokens just
    before it, held back while it ends within a character.

    Args:
        tokens: pulled one at a time.
        context: tokens before them, such as the prompt; not given out.
    """

    def text(ids: Sequence[int]) -> str:
        decoded = tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(decoded)

    size = min(CONTEXT, len(context))
    while size < len(context) and text(context[-size:]).startswith(UNKNOWN):
        size += 1  # not from within a character
    shown, new = list(context[len(context) - size :]), list[int]()
    for token in tokens:
        new.append(token)
        piece = _added(text, shown, new)
        if piece and not piece.endswith(UNKNOWN):
            yield piece
            shown, new = new, []
    if new and (rest := _added(text, shown, new)):
        yield rest


def _added(text: Callable[[Sequence[int]], str], shown: list[int], new: list[int]) -> str:
    """What `new` adds to the text of `shown`."""
    before, after = text(shown), text(shown + new)
    # Tokenizers with byte tokens take back a character when bytes behind it are none.
    return after[len(before) :] if after.startswith(before) else text(new)
