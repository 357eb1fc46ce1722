"""GGUF files of anyone: found, checked and described without loading the model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from autocompress.errors import ModelError

MAGIC = b"GGUF"
SHOWN = 200  # characters of a metadata value; a tokenizer's tokens are counted, not shown


def only_gguf(path: Path) -> Path | None:
    """The GGUF file that a path names: itself, or the only one in a folder."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    return found[0] if len(found) == 1 else None


def read_gguf(path: Path) -> Any:  # gguf.GGUFReader
    """A GGUF file, whole by its own description.

    Raises:
        ModelError: no GGUF file, or damaged or truncated.
    """
    from gguf import GGUFReader

    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(
            f"a GGUF file must be readable. Got '{path}': {error.strerror}."
        ) from error
    if magic != MAGIC:
        raise ModelError(
            f"a .gguf file must start with 'GGUF'. Got '{path}', which does not. It is another "
            "format, or damaged."
        )
    try:
        reader = GGUFReader(path)
    except Exception as error:  # the package raises whatever NumPy met beyond the file's end
        raise ModelError(
            f"a GGUF file must hold all that its header describes. Got '{path}' of "
            f"{path.stat().st_size} bytes: {type(error).__name__}: {error}. It is truncated or "
            "damaged: fetch it again."
        ) from error
    if not reader.tensors or "general.architecture" not in reader.fields:
        raise ModelError(
            f"a GGUF model must hold tensors and name its architecture. Got '{path}' with "
            f"{len(reader.tensors)} tensors. It is no model, or damaged."
        )
    return reader


def check_loadable(path: Path) -> None:
    """Check that transformers can decode a GGUF file.

    Raises:
        ModelError: it is damaged, or of an architecture that is not among those it names.
    """
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES as KNOWN

    name, known = architecture(read_gguf(path)), sorted({*KNOWN} - {"general", "tokenizer"})
    if _plain(name) not in map(_plain, known):
        raise ModelError(
            f"a GGUF file's architecture must be one that transformers decodes: "
            f"{', '.join(known)}. Got '{name}' in '{path}'. Use the original model."
        )


def architecture(reader: Any) -> str:
    """The name of the architecture, as llama.cpp calls it."""
    return str(reader.fields["general.architecture"].contents())


def _plain(name: str) -> str:
    """qwen3moe, which transformers calls qwen3_moe; gpt-oss, gpt_oss."""
    return name.replace("-", "").replace("_", "")


def describe_gguf(path: Path) -> dict[str, Any]:
    """What a GGUF file holds, tensor by tensor.

    Returns:
        `file`, `file_bytes`, `architecture`, `metadata` (scalars, and lengths of lists),
        `tensors` (name, type, shape (out, in), weights, bits, bytes), `types` (type -> weights and
        bytes), `weights` and `bits_per_weight` of all tensors.

    Raises:
        ModelError: no GGUF file, or damaged or truncated.
    """
    reader = read_gguf(path)
    tensors = [
        {
            "name": tensor.name,
            "type": tensor.tensor_type.name,
            "shape": [int(size) for size in reversed(tensor.shape)],
            "weights": int(tensor.n_elements),
            "bits": round(8 * int(tensor.n_bytes) / int(tensor.n_elements), 4),
            "bytes": int(tensor.n_bytes),
        }
        for tensor in reader.tensors
    ]
    weights, sizes = Counter[str](), Counter[str]()
    for tensor in tensors:
        weights[tensor["type"]] += tensor["weights"]
        sizes[tensor["type"]] += tensor["bytes"]
    total = sum(weights.values())
    return {
        "file": str(path),
        "file_bytes": path.stat().st_size,
        "architecture": architecture(reader),
        "metadata": {name: _shown(field) for name, field in reader.fields.items()},
        "tensors": tensors,
        "types": {kind: {"weights": weights[kind], "bytes": sizes[kind]} for kind in weights},
        "weights": total,
        "bits_per_weight": 8 * sum(sizes.values()) / total,
    }


def _shown(field: Any) -> Any:
    """A metadata value as JSON can hold it."""
    value = field.contents()
    if isinstance(value, list):
        return f"{len(value)} values"
    if isinstance(value, str):
        return value if len(value) <= SHOWN else f"{value[:SHOWN]}…"
    return value
