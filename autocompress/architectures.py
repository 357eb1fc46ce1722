"""Which architectures transformers and llama.cpp know: asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from autocompress.errors import ModelError
from autocompress.tables import did_you_mean

FAMILIAR = (  # that a message names first
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text"),
    *("phi3", "gpt2", "olmo2", "smollm3"),
)


def check_causal(config: Mapping[str, Any], where: object) -> None:
    """Check that transformers knows a configuration's causal LM.

    Args:
        config: content of a config.json.
        where: what is named as its place.

    Raises:
        ModelError: it does not, and the configuration brings no code of its own.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    kind, own = str(config.get("model_type")), config.get("auto_map") or {}
    if kind not in KNOWN and "AutoModelForCausalLM" not in own:
        raise ModelError(
            f"the model must be a causal LM that transformers knows: {_named(KNOWN)}. "
            f"Got '{where}' of type '{kind}'.{did_you_mean(kind, KNOWN)}"
        )


def check_llama_cpp(name: str, where: object) -> None:
    """Check that llama.cpp knows an architecture, as the package `gguf` lists them.

    Raises:
        ModelError: it does not.
    """
    from gguf import MODEL_ARCH_NAMES

    known = set(MODEL_ARCH_NAMES.values())
    if name not in known:
        raise ModelError(
            f"a GGUF file's architecture must be one that llama.cpp knows: {_named(known)}. Got "
            f"'{name}' in '{where}'.{did_you_mean(name, known)}"
        )


def _named(known: Collection[str]) -> str:
    """The familiar ones, and how many others."""
    first = [name for name in FAMILIAR if name in known]
    return f"{', '.join(first)} and {len(known) - len(first)} others"
