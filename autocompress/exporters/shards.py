"""Weights as the safetensors files that transformers and vLLM look for, written piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from autocompress.files import write_atomically, write_json

LIMIT = 2 * 10**9  # bytes of a file: what is in memory at a time


@dataclass(frozen=True)
class Piece:
    """Tensors that are made when their file is written.

    Args:
        size: about how many bytes they take.
        make: name -> tensor.
    """

    size: int
    make: Callable[[], Mapping[str, Tensor]]


def write_weights(out: Path, pieces: Sequence[Piece], limit: int = LIMIT) -> list[str]:
    """Write `model.safetensors`, or several files and their index; returns the files' names.

    Raises:
        OutputError: the disk refused; no file is left half-written.
    """
    groups: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if groups[-1] and filled + piece.size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.size
    if len(groups) == 1:
        _write(out / "model.safetensors", groups[0])
        return ["model.safetensors"]
    where: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = _write(out / name, group)
        where |= dict.fromkeys(tensors, name)
        total += sum(tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    write_json(out / "model.safetensors.index.json", index)
    return sorted(set(where.values()))


def _write(path: Path, pieces: Sequence[Piece]) -> dict[str, int]:
    """Write one file; name -> bytes of its tensors."""
    tensors = {
        name: tensor.contiguous() for piece in pieces for name, tensor in piece.make().items()
    }
    write_atomically(path, lambda draft: save_file(tensors, draft, metadata={"format": "pt"}))
    return {name: tensor.nbytes for name, tensor in tensors.items()}
