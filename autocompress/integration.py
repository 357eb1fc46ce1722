"""The quantizer that lets `AutoModelForCausalLM.from_pretrained` read our folders.

Imported by the hook in `autocompress/__init__.py` as soon as transformers' registry is.

The weights file is not called `model.safetensors`: transformers without autocompress would build
the model, find no dense weights in the file and leave them random, with a warning only. So it
stops with "no file named model.safetensors". With autocompress the quantizer names the file.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from autocompress.errors import ModelError
from autocompress.experts import unfuse_experts
from autocompress.levels import parse_level
from autocompress.packing import pack_modules
from autocompress.runtime import ACTIVATIONS
from autocompress.targets import MODES

METHOD = "autocompress"
FORMAT = 1
WEIGHTS = "autocompress.safetensors"


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json.

    Args:
        levels: module name -> level key; modules not named are dense.
        format: version of the file layout.
        removed: module -> how many values it returned; taken out, with all modules in it.
        activations: what kernels round them to: 'int8', 'bfloat16' or 'float32' (not at all).
    """

    def __init__(
        self,
        levels: dict[str, str],
        format: int = FORMAT,
        activations: str = ACTIVATIONS,
        removed: dict[str, int] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.levels, self.format, self.activations = levels, format, activations
        self.removed = removed or {}
        if format != FORMAT:
            raise ModelError(
                f"this autocompress reads format {FORMAT}. Got format {format}. Upgrade it."
            )
        if activations not in MODES:
            raise ModelError(
                f"activations of a packed model must be {', '.join(MODES)}. Got '{activations}'."
            )


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Builds packed modules before the weights are read."""

    requires_calibration = False
    quantization_config: PackedConfig

    def update_attn_implementation(self, config: Any) -> Any:
        # Called before transformers looks for files: the one place that can name ours.
        config.transformers_weights = WEIGHTS
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        unfuse_experts(model)
        config = self.quantization_config
        levels = {k: parse_level(v) for k, v in config.levels.items()}
        pack_modules(model, levels, model.dtype, config.activations, config.removed)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
