"""The native form: packed weights in safetensors, read back by `load` or by transformers."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from autocompress.core import Allocation, SearchSpace
from autocompress.database import LevelDatabase
from autocompress.errors import ModelError
from autocompress.files import disk_errors, write_atomically, write_json
from autocompress.folders import MANIFEST
from autocompress.integration import FORMAT, METHOD, WEIGHTS
from autocompress.levels import Dense, Level, Quantize, Rows, Shape, Unread
from autocompress.packed import tensor_shapes
from autocompress.removal import Removed, find_removed, kept_tensors
from autocompress.runtime import ACTIVATIONS, configure
from autocompress.runtime_facts import runtime_warning

STORAGE = torch.bfloat16  # of dense tensors


def outside_tensors(model: Any, modules: Iterable[str]) -> dict[str, Tensor]:
    """Everything a file must hold besides the weights of `modules`; tied weights once."""
    inside = {f"{name}.weight" for name in modules}
    owners = {id(model.get_submodule(name).weight) for name in modules}
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in inside and id(tensor) not in owners:
            owners.add(id(tensor))
            found[name] = tensor
    return found


def other_bytes(model: Any, space: SearchSpace) -> int:
    """Bytes of the weights file beyond the layers' own: dense tensors and the file's header.

    The header is counted at its largest, so a file never exceeds what the cost table says; the
    difference is a few hundred bytes.
    """
    widest = sum(
        max(_header_bytes(name, level, shape) for level in (Quantize(8, 8), *stored))
        for layer, allowed in zip(space.layers, space.levels, strict=True)
        for name, shape, stored in zip(
            layer.modules, layer.shapes, layer.stored_at(allowed), strict=True
        )
    )
    return outside_bytes(model, space) + widest


def outside_bytes(model: Any, space: SearchSpace) -> int:
    """Bytes of a weights file without any of the layers', at most; its header included."""
    modules = [name for layer in space.layers for name in layer.modules]
    outside = outside_tensors(model, modules)
    data = sum(
        t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in outside.values()
    )
    header: dict[str, Any] = {name: _entry("BF16", list(t.shape)) for name, t in outside.items()}
    return data + len(json.dumps(header)) + 8 + 8 + 64


def _header_bytes(module: str, level: Level, shape: Shape) -> int:
    """What a weights file's header says of one module at a level, at most."""
    parts = tensor_shapes(level, shape).items()
    return len(
        json.dumps({f"{module}.{part}": _entry("BF16", list(size)) for part, (_, size) in parts})
    )


def _entry(dtype: str, shape: list[int]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [10**11, 10**11]}


def save_native(
    model: Any,  # dense weights, as loaded
    tokenizer: Any,
    space: SearchSpace,
    allocation: Allocation,
    database: LevelDatabase,
    out: Path,
    activations: str = ACTIVATIONS,
) -> Path:
    """Write weights, configuration and tokenizer into the folder `out`; returns the weights file.

    Args:
        activations: what `load` computes with: 'int8', 'bfloat16' or 'float32'.

    Raises:
        OutputError: the disk refused; no file that looks whole is left half-written.
    """
    levels = space.module_levels(allocation)
    removed = find_removed(model, levels)
    tensors = _file_tensors(model, levels, removed, database)
    out.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict()
    config["quantization_config"] = {
        "quant_method": METHOD,
        "format": FORMAT,
        "activations": activations,
        "levels": {k: str(v) for k, v in levels.items() if not isinstance(v, Dense)},
        **({"removed": removed} if removed else {}),
    }
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")  # what `load` computes in
    write_atomically(
        out / WEIGHTS, lambda draft: save_file(tensors, draft, metadata={"format": "pt"})
    )
    write_json(out / "config.json", json.loads(json.dumps(config, default=str)))
    with disk_errors(out):
        tokenizer.save_pretrained(out)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(out)
    return out / WEIGHTS


def _file_tensors(
    model: Any, levels: Mapping[str, Level], removed: Removed, database: LevelDatabase
) -> dict[str, Tensor]:
    """What the weights file holds, by name."""
    outside = kept_tensors(model, outside_tensors(model, levels), removed, levels)
    tensors = {
        name: (t.detach().to(STORAGE) if t.is_floating_point() else t.detach()).contiguous()
        for name, t in outside.items()
    }
    for name, level in levels.items():
        if isinstance(level, Dense):
            weight = model.get_submodule(name).weight.detach()
            tensors[f"{name}.weight"] = weight.to(STORAGE).contiguous()
        elif not isinstance(level, Unread):
            packed = database.load(name, level)
            tensors.update({f"{name}.{part}": it for part, it in packed.tensors.items()})
            if isinstance(level, Rows) and packed.kept is not None and f"{name}.bias" in tensors:
                tensors[f"{name}.bias"] = tensors[f"{name}.bias"][packed.kept].contiguous()
    return tensors


def load(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    activations: str | None = None,
    backend: str | None = None,
) -> tuple[Any, Any]:
    """The packed model and tokenizer of a result folder.

    The first forward hands the weights over to their kernels; `autocompress.runtime.prepare` does
    so at once, which `torch.compile` needs. Warns where the search measured latency on other
    backends than the model runs on here.

    Args:
        folder: written by `autocompress search`.
        dtype: to compute in; by default what the search evaluated in.
        activations: what kernels round them to: 'int8', 'bfloat16' or 'float32', which does not
            round; by default what the folder says.
        backend: 'native', 'aten' or 'dequantize'; by default the first that can, layer by layer.

    Raises:
        ModelError: not a result folder, a file is missing or damaged.
        BackendError: no such activations or backend, or it cannot run this model here.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    if not (folder / MANIFEST).exists() and not (folder / WEIGHTS).exists():
        raise ModelError(
            f"a result folder must hold {MANIFEST} and {WEIGHTS}. Got '{folder}', which does not."
        )
    check_weights(folder / WEIGHTS)
    try:
        with silence():  # what is missing or of another shape is refused below, by name
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto" if dtype is None else dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"'{folder}' must be a whole result of autocompress. "
            f"Got: {type(error).__name__}: {error}"
        ) from error
    _check_tensors(folder, info)
    configure(model, activations, backend)
    measured_elsewhere = runtime_warning(_manifest(folder), model)
    if measured_elsewhere is not None:
        warnings.warn(measured_elsewhere, stacklevel=2)
    return model.eval(), tokenizer


def _check_tensors(folder: Path, info: dict[str, Any]) -> None:
    """Refuse what transformers would have let pass or replaced.

    Raises:
        ModelError: a tensor is missing, unknown or of another shape.
    """
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    for name, got, want in info["mismatched_keys"]:
        wrong.append(f"{name}, {list(got)} where {list(want)} belong")
    if wrong:
        raise ModelError(
            f"'{folder}' must hold exactly the tensors of its configuration. Got {len(wrong)} that "
            f"are missing, unknown or of another shape, such as {wrong[0]}. Write the result again."
        )


@contextmanager
def silence() -> Iterator[None]:
    """No warnings and no progress bars of transformers."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _manifest(folder: Path) -> dict[str, Any]:
    """What the search wrote down about a result; empty where only the model was kept.

    Raises:
        ModelError: it is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"'{path}' must be a manifest of autocompress. Got: {error}.") from error


def check_weights(path: Path) -> None:
    """Check that a safetensors file is as long as its header says.

    Raises:
        ModelError: it is missing or truncated.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        ends = [e["data_offsets"][1] for k, e in header.items() if k != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"'{path}' must be a safetensors file. Got: {error}.") from error
    if path.stat().st_size != expected:
        raise ModelError(
            f"'{path}' must be {expected} bytes long by its header. Got {path.stat().st_size}. "
            "It is truncated or damaged: write it again."
        )
