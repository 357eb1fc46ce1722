"""Decoding without Python between the matrices, for models of the Llama family.

Whether a model is of that family is read from its modules and configuration, then checked: its
logits must agree with those of the model's own forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autocompress.errors import GenerationError
from autocompress.models import weight_of
from autocompress.removal import Nothing, Skipped, ZeroLinear

KINDS = ("llama", "mistral", "qwen2", "qwen3")  # configurations whose blocks are what llama.py runs
ROPES = ("default", "linear", "llama3", "yarn")  # rotations that depend on the position alone
PROBE = 9  # tokens on which the two forwards are compared
AGREEMENT = 0.98  # least cosine of their logits: int8 activations alone give above 0.999


class LeanDecoder:
    """One native call per step.

    Args:
        steps: the opened decoder.
    """

    name = "lean"

    def __init__(self, steps: Any) -> None:
        self._steps, self.capacity = steps, steps.capacity
        self._length = 0

    def reset(self) -> None:
        self._length = 0

    def truncate(self, length: int) -> bool:
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
        return self._read(tokens.to(torch.int64).contiguous())

    def step(self, token: int) -> Tensor:
        return self._read(torch.tensor([token]))

    def _read(self, tokens: Tensor) -> Tensor:  # (length,) -> (vocab,), float32
        if self._length + len(tokens) > self.capacity:
            raise GenerationError(
                f"a sequence must have at most {self.capacity} tokens, this decoder's capacity. "
                f"Got {self._length + len(tokens)}. Shorten it or make a larger decoder."
            )
        logits: Tensor = self._steps.step(tokens, self._length)
        self._length += len(tokens)
        return logits


def lean_decoder(model: Any, capacity: int) -> LeanDecoder | str:
    """A decoder of `capacity` tokens, or the reason why this model must use its own forward."""
    from autocompress_kernels.library import missing

    reason = missing() or unfit(model, capacity)
    if reason is not None:
        return reason
    from autocompress.runtime import prepare
    from autocompress_kernels.llama import Steps

    prepare(model)  # all weights side by side, before the decoder points at them
    reason = in_parts(model) or narrower(model)
    if reason is not None:
        return reason
    try:
        decoder = LeanDecoder(Steps(describe(model, capacity)))
    except ValueError as error:
        return str(error)
    return disagreement(model, decoder) or decoder


def unfit(model: Any, capacity: int) -> str | None:
    """What about the model's configuration the native decoder does not have."""
    config = model.config
    if config.model_type not in KINDS:
        return f"'{config.model_type}' is none of {', '.join(KINDS)}"
    if getattr(config, "hidden_act", None) not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}, not silu"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPES:
        return f"its rotary positions are of type '{rope}'"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < capacity:
        return f"its attention slides over {window} tokens, fewer than {capacity}"
    if getattr(config, "mlp_bias", False):
        return "its feed-forward layers have biases"
    return None


def in_parts(model: Any) -> str | None:
    """Which prepared layer is not the one matrix that a native decoder has for it."""
    for name, module in model.named_modules():
        if isinstance(module, ZeroLinear):
            return f"'{name}' is dropped alone, without the sublayer around it"
        if isinstance(module, Nothing) and module.bias is not None:
            return f"'{name}' is dropped and leaves a bias"
        if len(getattr(getattr(module, "op", None), "matrices", ())) > 1:
            return f"'{name}' at {module.level} is more than one matrix"
    return None


def narrower(model: Any) -> str | None:
    """Which layer has other sizes than a native decoder gives to all of its kind."""
    config = model.config
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    ffn: set[int] = set()
    for number, block in enumerate(model.model.layers):
        if not isinstance(block, Skipped):
            attention, mlp = block.self_attn, block.mlp
            if not isinstance(attention, Nothing) and _rows(attention.q_proj) != heads * dim:
                return f"attention of block {number} has fewer than {heads} heads"
            if not isinstance(mlp, Nothing):
                ffn.add(_rows(mlp.gate_proj))
    return f"its FFNs have {len(ffn)} widths, not one" if len(ffn) > 1 else None


def _rows(module: Any) -> int:
    """Outputs of a linear map, packed or not."""
    return int(module.shape[0] if hasattr(module, "shape") else len(module.weight))


def describe(model: Any, capacity: int) -> Any:
    """The model as a native decoder sees it."""
    from autocompress_kernels.llama import Llama

    config, body = model.config, model.model
    heads = config.num_attention_heads
    blocks = [block for block in body.layers if not isinstance(block, Skipped)]
    positions = torch.arange(capacity).unsqueeze(0)
    cosine, sine = body.rotary_emb(torch.zeros(1, 1, dtype=torch.float32), positions)
    half = cosine.shape[-1] // 2
    embedding = packed_weight(body.embed_tokens)
    head = model.get_output_embeddings()
    tied = getattr(head, "shared", None) or head.weight is getattr(body.embed_tokens, "weight", 0)
    return Llama(
        blocks=[_block(block) for block in blocks],
        embedding=embedding,
        head=embedding if tied else packed_weight(head),
        final_norm=_vector(body.norm.weight),
        cosine=_vector(cosine[0, :, :half]),
        sine=_vector(sine[0, :, :half]),
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        epsilon=config.rms_norm_eps,
        mode=activations(model),
    )


def activations(model: Any) -> str:
    """The mode that the model's packed layers compute in; bf16 where none is packed."""
    for module in model.modules():
        mode = getattr(module, "mode", None)
        if isinstance(mode, str):
            return mode
    return "a16"


def packed_weight(module: nn.Module) -> Any:
    """A module's weight in the kernels' layout: the one it computes with, or dense in bf16."""
    from autocompress_kernels.pack import pack_bf16

    packed = getattr(module, "kernel_weight", None)
    found = packed() if packed is not None else None
    return found if found is not None else pack_bf16(weight_of(module).detach().bfloat16())


def _block(block: Any) -> Any:
    from autocompress_kernels.llama import Block

    attention, mlp = block.self_attn, block.mlp
    matrices: dict[str, Any] = {}
    vectors: dict[str, Any] = {}
    if not isinstance(attention, Nothing):
        matrices |= {name: packed_weight(getattr(attention, f"{name}_proj")) for name in "qkvo"}
        vectors = {
            "input_norm": block.input_layernorm.weight,
            **{f"{name}_bias": getattr(attention, f"{name}_proj").bias for name in "qkvo"},
            **{f"{name}_norm": getattr(attention, f"{name}_norm", None) for name in "qk"},
        }
    if not isinstance(mlp, Nothing):
        parts = ("gate", "up", "down")
        matrices |= {name: packed_weight(getattr(mlp, f"{name}_proj")) for name in parts}
        vectors["post_norm"] = block.post_attention_layernorm.weight
    found = {name: _vector(getattr(v, "weight", v)) for name, v in vectors.items() if v is not None}
    return Block(matrices, found)


def _vector(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


@torch.inference_mode()
def disagreement(model: Any, decoder: LeanDecoder) -> str | None:
    """Why the decoder is not this model: both read the same few tokens."""
    vocab = model.config.vocab_size
    tokens = torch.arange(1, min(PROBE, decoder.capacity) + 1) * 7919 % vocab
    ours = decoder.prefill(tokens)
    decoder.reset()
    theirs = model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0, -1].float()
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))
    if not cosine >= AGREEMENT:  # also where it is NaN
        return f"its own forward gives other logits: their cosine is {cosine:.3f}"
    return None
