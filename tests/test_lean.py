"""The native decoder against the models' own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from autocompress.errors import GenerationError
from autocompress.lean import LeanDecoder, disagreement, lean_decoder, unfit
from autocompress_kernels.library import missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SMALL = {
    "vocab_size": 203,
    "hidden_size": 96,
    "intermediate_size": 136,  # nothing that tiles or superblocks divide
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama biased": {"attention_bias": True},
    "llama scaled": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
}


def small_model(family: str, **changes: Any) -> Any:
    """A model of random weights that bf16 holds exactly."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split()[0], **{**SMALL, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # ones and zeros would hide a forgotten one
                parameter.add_(torch.randn_like(parameter) * 0.3)
            parameter.copy_(parameter.mul(3.0 if parameter.dim() > 1 else 1.0).bfloat16())
    return model


def lean(model: Any, capacity: int = 100) -> LeanDecoder:
    decoder = lean_decoder(model, capacity)
    assert isinstance(decoder, LeanDecoder), decoder
    return decoder


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_logits_are_those_of_the_forward(family: str) -> None:
    model = small_model(family)
    tokens = torch.randint(203, (90,), generator=torch.Generator().manual_seed(1))
    wanted = model(input_ids=tokens.unsqueeze(0)).logits[0]
    decoder = lean(model)
    for _ in range(2):  # the second time after a reset
        got = [decoder.prefill(tokens[:70])]  # more than one chunk of 64
        got += [decoder.step(int(token)) for token in tokens[70:]]
        error = (torch.stack(got) - wanted[69:]).norm() / wanted[69:].norm()
        assert error < 0.01  # weights, activations, keys and values are bf16
        decoder.reset()


def test_two_threads_give_the_same_logits() -> None:
    model = small_model("llama")
    decoder, tokens, threads = lean(model), torch.arange(30), torch.get_num_threads()
    one = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            decoder.reset()
            one.append(torch.stack([decoder.prefill(tokens), decoder.step(7)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], one[1])
    assert torch.equal(one[0], one[2])


def test_a_sequence_ends_at_the_capacity() -> None:
    decoder = lean(small_model("llama"), capacity=12)
    decoder.prefill(torch.arange(11))
    decoder.step(1)
    with pytest.raises(GenerationError, match="at most 12 tokens"):
        decoder.step(1)
    with pytest.raises(GenerationError, match="must come first"):
        decoder.prefill(torch.arange(2))
    decoder.reset()
    with pytest.raises(GenerationError, match="at least one token"):
        decoder.prefill(torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be in range"):
        decoder.prefill(torch.tensor([203]))


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("llama", {"head_dim": 12}, "shapes"),
        ("llama", {"mlp_bias": True}, "biases"),
        ("mistral", {"sliding_window": 50}, "slides over 50"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic'",
        ),
    ],
)
def test_models_it_does_not_have_say_why(family: str, changes: Any, reason: str) -> None:
    found = lean_decoder(small_model(family, **changes), 100)
    assert isinstance(found, str)
    assert reason in found


def test_other_families_say_why() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=50)
    assert "gpt2" in str(unfit(AutoModelForCausalLM.from_config(config), 10))


def test_another_forward_is_noticed() -> None:
    model = small_model("llama")
    decoder = lean(model)
    assert disagreement(model, decoder) is None
    for layer in model.model.layers:
        layer.self_attn.scaling *= 30  # what no configuration key tells
    assert "cosine" in str(disagreement(model, decoder))
