"""Where modules stand in a model, as rules of runtimes ask."""

from __future__ import annotations

from typing import Any

from autocompress.models import is_transposed, module_name


def module_parts(model: Any) -> dict[str, str]:
    """Modules that are no plain linears of blocks: 'embedding', 'head' or 'conv1d'."""
    parts = {name: "conv1d" for name, module in model.named_modules() if is_transposed(module)}
    if model.get_output_embeddings() is not None:
        parts[module_name(model, model.get_output_embeddings())] = "head"
    return parts | {module_name(model, model.get_input_embeddings()): "embedding"}
