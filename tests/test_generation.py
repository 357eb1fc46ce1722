"""Decoders against the plain forward, sampling, and text in whole characters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import finished
from test_models import ARCHITECTURES, make_model

from autocompress import load
from autocompress.errors import GenerationError, ModelError
from autocompress.generation import (
    Decoder,
    PlainDecoder,
    checked_capacity,
    generate,
    generate_tokens,
    make_decoder,
    time_decode,
    time_prefill,
)
from autocompress.sampling import Sampling
from autocompress.text import UNKNOWN, encode_prompt, stop_tokens, text_pieces

PROMPT = torch.arange(20) * 31 % 512
CAPACITY = 32  # tokens


@pytest.fixture(scope="module")
def packed(tiny_folder: Path) -> Any:
    """A packed model and its tokenizer; computes in float32."""
    return load(finished(tiny_folder))


@pytest.fixture(params=["plain", "made"])
def decoder(request: pytest.FixtureRequest, packed: Any) -> Decoder:
    """Every decoder there is for the packed model."""
    make = {"plain": PlainDecoder, "made": make_decoder}[request.param]
    return make(packed[0], CAPACITY)


@torch.inference_mode()
def forward(model: Any, tokens: list[int]) -> torch.Tensor:  # (vocab,)
    """Logits behind `tokens`, without a cache."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


def check_steps(decoder: Decoder, model: Any, tokens: list[int], steps: int) -> None:
    """Prefill and then every step gives the logits of a forward over all tokens so far."""
    # Kernels of another decoder may round activations, to int8 by default.
    most = 1e-4 if decoder.name.startswith("plain") else 3e-2
    tokens = list(tokens)
    logits = decoder.prefill(torch.tensor(tokens))
    for number in range(steps + 1):
        expected = forward(model, tokens)
        assert logits.shape == expected.shape
        assert (logits - expected).norm() < most * expected.norm(), f"step {number}"
        if number < steps:
            tokens.append((7 * number + 3) % 512)
            logits = decoder.step(tokens[-1])


# --- decoders --------------------------------------------------------------------------------


def test_every_step_gives_the_logits_of_the_forward(decoder: Decoder, packed: Any) -> None:
    check_steps(decoder, packed[0], PROMPT.tolist(), CAPACITY - len(PROMPT))


def test_after_a_reset_nothing_is_left(decoder: Decoder, packed: Any) -> None:
    check_steps(decoder, packed[0], PROMPT.tolist(), 3)
    decoder.reset()
    check_steps(decoder, packed[0], [5], 6)
    decoder.reset()
    check_steps(decoder, packed[0], list(range(CAPACITY)), 0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_causal_model_can_be_decoded(name: str) -> None:
    # Gemma's windows shorter than the sequence, so that its cache drops tokens.
    window = {"sliding_window": 8} if "gemma" in name else {}
    model = make_model(name, **window)
    for decoder in (PlainDecoder(model, 30), make_decoder(model, 30)):
        check_steps(decoder, model, PROMPT.tolist(), 10)


def test_a_model_that_returns_all_logits_gives_the_last() -> None:
    model = make_model("llama")
    plain = model.forward

    def without_logits_to_keep(input_ids: torch.Tensor, use_cache: bool, **cache: Any) -> Any:
        return plain(input_ids=input_ids, use_cache=use_cache, **cache)

    expected = forward(model, PROMPT.tolist())
    model.forward = without_logits_to_keep
    assert torch.allclose(PlainDecoder(model).prefill(PROMPT), expected, atol=1e-4)


def test_beyond_its_capacity_a_decoder_refuses(decoder: Decoder) -> None:
    decoder.prefill(PROMPT)
    for token in range(CAPACITY - len(PROMPT)):
        decoder.step(token)
    for _ in range(2):
        with pytest.raises(GenerationError, match=f"at most {CAPACITY} tokens.*Got {CAPACITY + 1}"):
            decoder.step(1)
    decoder.reset()
    with pytest.raises(GenerationError, match=f"at most {CAPACITY} tokens.*Got {CAPACITY + 1}"):
        decoder.prefill(torch.arange(CAPACITY + 1))
    decoder.prefill(PROMPT)


def test_a_prompt_is_a_row_and_comes_first(decoder: Decoder) -> None:
    for wrong in (torch.tensor([], dtype=torch.long), PROMPT.view(2, -1)):
        with pytest.raises(GenerationError, match="a row of at least one token"):
            decoder.prefill(wrong)
    decoder.prefill(PROMPT)
    with pytest.raises(GenerationError, match="a prompt must come first"):
        decoder.prefill(PROMPT)


@pytest.mark.parametrize("capacity", [0, -1, 1025])
def test_a_capacity_lies_within_the_models_context(packed: Any, capacity: int) -> None:
    for make in (PlainDecoder, make_decoder):
        with pytest.raises(GenerationError, match=f"at most 1024, .* Got {capacity}"):
            make(packed[0], capacity)
    assert checked_capacity(packed[0], None) == 1024
    assert PlainDecoder(packed[0]).capacity == 1024


BLOOM = {"n_layer": 2, "n_head": 4, "initializer_range": 0.1}
MAMBA = {"num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.1}


@pytest.mark.parametrize(("name", "settings"), [("Bloom", BLOOM), ("Mamba", MAMBA)])
def test_models_without_a_context_need_a_capacity(name: str, settings: dict[str, Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(vocab_size=512, hidden_size=64, **settings)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(GenerationError, match="a capacity must be given"):
        PlainDecoder(model)
    check_steps(PlainDecoder(model, 10**6), model, PROMPT.tolist(), 5)


def test_a_model_without_a_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    plain = model.forward
    monkeypatch.setattr(
        model, "forward", lambda use_cache, **options: plain(use_cache=False, **options)
    )
    with pytest.raises(ModelError, match="must keep a cache"):
        PlainDecoder(model, 4).prefill(torch.tensor([1]))


# --- sampling --------------------------------------------------------------------------------

LOGITS = torch.tensor([1.0, 3.0, -math.inf, 2.0, 0.0])


def draws(count: int, logits: torch.Tensor = LOGITS, **options: Any) -> list[int]:
    pick = Sampling(**options).picker()
    return [pick(logits) for _ in range(count)]


def test_without_temperature_the_likeliest_is_taken() -> None:
    assert set(draws(5)) == {1}
    assert set(draws(5, top_k=3, top_p=0.9, seed=4)) == {1}


def test_draws_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = draws(50, temperature=1.0, seed=3)
    torch.manual_seed(2)
    assert draws(50, temperature=1.0, seed=3) == first
    assert draws(50, temperature=1.0, seed=4) != first


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_k": 99}, {"top_p": 0.9}])
def test_shares_are_those_of_the_kept_tokens(temperature: float, options: dict[str, Any]) -> None:
    count = 4000
    shares = (LOGITS / temperature).softmax(0)
    order = shares.argsort(descending=True).tolist()
    kept = order[: options.get("top_k", len(order))]
    if "top_p" in options:
        sums = shares[order].cumsum(0).tolist()
        kept = order[: next(i for i, total in enumerate(sums) if total >= options["top_p"]) + 1]
    found = Counter(draws(count, temperature=temperature, **options))
    total = float(shares[kept].sum())
    for token in range(len(LOGITS)):
        expected = float(shares[token]) / total if token in kept else 0.0
        error = 4 * math.sqrt(expected * (1 - expected) / count)
        assert abs(found[token] / count - expected) <= error, (token, found)


def test_the_first_token_is_always_kept() -> None:
    assert set(draws(20, temperature=9.0, top_p=1e-9)) == {1}
    assert set(draws(20, temperature=9.0, top_k=1)) == {1}
    assert set(draws(20, temperature=1e-300)) == {1}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_logits_are_refused(value: float, temperature: float) -> None:
    logits = torch.full((4,), value)
    with pytest.raises(GenerationError, match="largest logit must be finite"):
        draws(1, logits, temperature=temperature)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(GenerationError, match=f"{name} must be .* Got"):
        Sampling(**options)


# --- continuing ------------------------------------------------------------------------------


class Counting:
    """A decoder of ten tokens: behind token t, t + 1 is the likeliest. Counts its steps."""

    name, capacity = "counting", 64

    def __init__(self) -> None:
        self.calls: list[str] = []

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls.append(f"prefill {len(tokens)}")
        return self._behind(int(tokens[-1]))

    def step(self, token: int) -> torch.Tensor:
        self.calls.append(f"step {token}")
        return self._behind(token)

    def reset(self) -> None:
        self.calls.append("reset")

    def _behind(self, token: int) -> torch.Tensor:
        return torch.eye(10)[(token + 1) % 10]


def test_no_step_is_taken_whose_token_nobody_needs() -> None:
    decoder = Counting()
    tokens = list(generate_tokens(decoder, torch.tensor([0, 4]), max_tokens=3))
    assert tokens == [5, 6, 7]
    assert decoder.calls == ["reset", "prefill 2", "step 5", "step 6"]


def test_a_stop_token_ends_the_text_and_is_not_in_it() -> None:
    decoder = Counting()
    prompt = torch.tensor([4])
    assert list(generate_tokens(decoder, prompt, max_tokens=9, stop={7})) == [5, 6]
    assert decoder.calls[-1] == "step 6"
    assert list(generate_tokens(decoder, prompt, max_tokens=9, stop={5})) == []


def test_what_cannot_run_is_refused_at_once() -> None:
    decoder = Counting()
    with pytest.raises(GenerationError, match=r"max_tokens must be at least 1\. Got 0"):
        generate_tokens(decoder, PROMPT, max_tokens=0)
    with pytest.raises(GenerationError, match=r"at most 64 tokens\. Got 20 \+ 45"):
        generate_tokens(decoder, PROMPT, max_tokens=45)
    with pytest.raises(GenerationError, match="temperature"):
        generate(decoder, None, PROMPT, max_tokens=1, temperature=-1)
    assert decoder.calls == []


def test_greedy_text_is_always_the_same(decoder: Decoder, packed: Any) -> None:
    prompt = encode_prompt(packed[1], "The statement")
    first, second = (
        "".join(generate(decoder, packed[1], prompt, max_tokens=8, seed=seed)) for seed in (0, 1)
    )
    assert first == second


def test_greedy_text_is_the_forwards(packed: Any) -> None:
    model, tokenizer = packed
    prompt = encode_prompt(tokenizer, "The statement")
    text = "".join(generate(PlainDecoder(model), tokenizer, prompt, max_tokens=8))
    ids = prompt.tolist()
    for _ in range(8):
        ids.append(int(forward(model, ids).argmax()))
    assert text == tokenizer.decode(ids[len(prompt) :])


def test_drawn_text_is_the_seeds(decoder: Decoder, packed: Any) -> None:
    tokenizer = packed[1]
    prompt = encode_prompt(tokenizer, "The statement")

    def text(seed: int) -> str:
        options = {"max_tokens": 16, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
        return "".join(generate(decoder, tokenizer, prompt, seed=seed, **options))

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


# --- text ------------------------------------------------------------------------------------


def byte_tokenizer() -> Any:
    """A tokenizer in Llama 2's manner: spaces begin words, unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh"]
    vocabulary = {word: number for number, word in enumerate([*words, "▁a", "▁b", "ab"])}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    bpe = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<s>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", bos_token="<s>")


TOKENIZERS = {"bytes of BPE": cache(train_tokenizer), "bytes of the unknown": cache(byte_tokenizer)}
TEXTS = [
    *("plain words", "naïve – façade", "日本語", "🙂🙃 👩\u200d👩\u200d👧", "a🙂b 𝔘nicode\n\t ü"),
    *("\ufffd", "a\ufffdb", "안녕"),
]


def split(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_that_make_the_text(tokenizer: Any, text: str) -> None:
    ids = split(tokenizer, text)
    pieces = list(text_pieces(tokenizer, ids))
    assert "".join(pieces) == decoded(tokenizer, ids) == text
    if UNKNOWN not in text:
        assert not any(UNKNOWN in piece for piece in pieces)
    assert all(pieces)


@given(
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.sampled_from(sorted(TOKENIZERS)),
)
@settings(max_examples=300, deadline=None)
def test_pieces_behind_a_prompt_are_the_rest_of_the_text(prompt: str, rest: str, name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    context, ids = split(tokenizer, prompt), split(tokenizer, prompt + rest)
    if ids[: len(context)] != context:
        context = split(tokenizer, prompt)  # merged over the border: tokens of its own
        ids = [*context, *split(tokenizer, rest)]
    whole = decoded(tokenizer, ids)
    start = decoded(tokenizer, context)
    pieces = list(text_pieces(tokenizer, ids[len(context) :], context))
    assert start + "".join(pieces) == whole


def test_a_word_behind_the_prompt_keeps_its_space() -> None:
    tokenizer = TOKENIZERS["bytes of the unknown"]()
    prompt, ids = split(tokenizer, "ab a"), tokenizer.convert_tokens_to_ids(["▁b", "▁", "a"])
    assert "".join(text_pieces(tokenizer, ids, prompt)) == " b a"
    assert "".join(text_pieces(tokenizer, ids)) == "b a", "nothing is before it"


def test_a_piece_is_out_as_soon_as_it_is_final(tokenizer: Any) -> None:
    read = 0

    def tokens() -> Iterator[int]:
        nonlocal read
        for token in split(tokenizer, "ab🙂ab"):
            read += 1
            yield token

    seen = {}
    for piece in text_pieces(tokenizer, tokens()):
        seen[piece] = read
    behind = len(split(tokenizer, "ab🙂"))
    assert seen["🙂"] == behind, "at its last byte"


def test_bytes_that_are_no_character_are_shown_in_the_end() -> None:
    tokenizer = TOKENIZERS["bytes of the unknown"]()
    face, letter = split(tokenizer, "🙂")[-4:], tokenizer.convert_tokens_to_ids(["a"])
    assert list(text_pieces(tokenizer, [*letter, *face[:2]])) == ["a", UNKNOWN * 2]
    # Its decoder now holds all five bytes for damaged; what is out stays out.
    assert list(text_pieces(tokenizer, [*face, face[0], *letter])) == ["🙂", f"{UNKNOWN}a"]


def test_special_tokens_are_not_text(tokenizer: Any) -> None:
    ids, end = split(tokenizer, "ab"), tokenizer.eos_token_id
    marked = [end, *ids, end, *ids, end]
    assert "".join(text_pieces(tokenizer, marked)) == decoded(tokenizer, ids + ids)


# --- prompts ---------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"


@pytest.fixture
def chatting() -> Any:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_prompt_goes_into_the_chat_template(chatting: Any) -> None:
    assert decoded(chatting, encode_prompt(chatting, "Hé 🙂").tolist()) == "<user>Hé 🙂<answer>"
    assert decoded(chatting, encode_prompt(chatting, "Hé 🙂", chat=False).tolist()) == "Hé 🙂"
    assert encode_prompt(TOKENIZERS["bytes of BPE"](), "Hi").dtype == torch.long


def test_prompts_that_make_no_tokens_are_refused(chatting: Any) -> None:
    with pytest.raises(GenerationError, match="at least one token"):
        encode_prompt(chatting, "", chat=False)
    with pytest.raises(GenerationError, match="must be Unicode text"):
        encode_prompt(chatting, "\udcff")
    chatting.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(GenerationError, match=r"no users.*--no-chat"):
        encode_prompt(chatting, "Hi")


def test_all_ends_stop(packed: Any) -> None:
    model, tokenizer = make_model("llama"), packed[1]
    end = tokenizer.eos_token_id
    for ends, expected in ((7, {7, end}), ([7, 8], {7, 8, end}), (None, {end})):
        model.generation_config.eos_token_id = ends
        assert stop_tokens(model, tokenizer) == expected


# --- timing ----------------------------------------------------------------------------------


class Clocked(Counting):
    """A prompt token takes 1 s, the n-th step n seconds; `reset` takes 100 s."""

    now, steps = 0.0, 0

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        self.now += len(tokens)
        return super().prefill(tokens)

    def step(self, token: int) -> torch.Tensor:
        self.steps += 1
        self.now += self.steps
        return super().step(token)

    def reset(self) -> None:
        self.steps = 0
        self.now += 100
        super().reset()


def test_only_what_is_asked_for_is_timed() -> None:
    decoder = Clocked()
    for _ in range(2):
        assert time_prefill(decoder, PROMPT % 10, lambda: decoder.now) == len(PROMPT)
        assert time_decode(decoder, PROMPT % 10, 4, lambda: decoder.now) == [1, 2, 3, 4]
    assert decoder.calls.count("reset") == 4


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_truncated_sequences_go_on_as_if_nothing_had_been_behind(name):
    decoder = PlainDecoder(make_model(name))
    assert not decoder.truncate(1), "there is nothing yet"
    decoder.prefill(PROMPT)
    first = decoder.step(3)
    for token in (5, 6, 7):
        decoder.step(token)
    assert decoder.truncate(len(PROMPT))
    torch.testing.assert_close(decoder.step(3), first)
