"""Models of any format, ours and others', to be scored or decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autocompress.architectures import check_causal
from autocompress.errors import ModelError, OutputError
from autocompress.exporters.dense import EXPORTER
from autocompress.exporters.depth import without_dropped
from autocompress.exporters.narrow import narrowed
from autocompress.exporters.native import load, silence
from autocompress.exporters.reader import expert_settings
from autocompress.exporters.source import Source
from autocompress.files import disk_errors
from autocompress.folders import ADAPTER, read_folder
from autocompress.gguf_files import check_loadable, only_gguf
from autocompress.integration import METHOD


def load_any(path: Path, dtype: torch.dtype) -> tuple[Any, Any, str]:
    """A model, its tokenizer and its format: 'autocompress', 'gguf', 'peft', 'dense' or others'.

    Args:
        path: folder, or GGUF file.
        dtype: to compute in.

    Raises:
        ModelError: nothing there, half-written, pickled, damaged, or tensors are missing.
    """
    file = only_gguf(path)
    if file is not None:
        check_loadable(file)
        return *_read(file.parent, dtype, gguf_file=file.name), "gguf"
    folder = read_folder(path)
    if folder.method == METHOD:
        return *load(path, dtype=dtype), METHOD
    check_causal(folder.config, path)
    model, tokenizer = _read(path, dtype)
    decompress(model)
    if (path / ADAPTER / "adapter_config.json").exists():
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, str(path / ADAPTER))
        return adapted.merge_and_unload(), tokenizer, "peft"
    return model, tokenizer, folder.method


def _read(folder: Path, dtype: torch.dtype, **how: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with silence():
            experts = expert_settings(folder / how["gguf_file"]) if how else {}
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, **how, **experts
            )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder, **how)
    except Exception as error:  # transformers and its quantizers raise many kinds
        raise ModelError(
            f"'{folder}' must be a causal LM that transformers can load here. "
            f"Got: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
        ) from error
    if info["missing_keys"]:
        raise ModelError(
            f"'{folder}' must hold every weight of its model. Got none for "
            f"{sorted(info['missing_keys'])[:3]} ({len(info['missing_keys'])} in all)."
        )
    return model.eval(), tokenizer


@torch.inference_mode()
def decompress(model: Any) -> None:
    """Run one token: compressed-tensors makes its dense weights then, and only then."""
    if getattr(model, "hf_quantizer", None) is not None:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)


def dequantize(path: Path, out: Path) -> dict[str, Any]:
    """Write a model of any format as a plain dense folder in bf16.

    Args:
        path: folder or GGUF file; decoded in float32.
        out: new folder.

    Returns:
        `out`, `from`, `method` and `bytes`.

    Raises:
        ModelError: as `load_any`.
        OutputError: something is at `out`, or the disk refused.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"--out must be new or empty. Got '{out}', which exists. Choose another.")
    if only_gguf(path) is None and read_folder(path).method == METHOD:
        source = without_dropped(narrowed(Source.open(path)))
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        EXPORTER.write(source, None, out)
        return _written(path, out, METHOD)
    model, tokenizer, method = load_any(path, torch.float32)
    plain = _plain_copy(model).to(torch.bfloat16)
    with disk_errors(out), silence():
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return _written(path, out, method)


def _plain_copy(model: Any) -> Any:
    """The same weights in a model that knows of no quantization."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    factory: Any = AutoModelForCausalLM
    plain = factory.from_config(AutoConfig.for_model(**settings))
    state = model.state_dict()
    wanted = plain.state_dict()
    plain.load_state_dict({name: state[name] for name in wanted})
    return plain.eval()


def _written(path: Path, out: Path, method: str) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {"out": str(out), "from": str(path), "method": method, "bytes": size}
