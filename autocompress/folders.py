"""Model folders of anyone: what is in them, read from headers alone."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from autocompress.errors import ModelError
from autocompress.plans import PLAN

MANIFEST = "autocompress.json"  # of results and exports
ADAPTER = "adapter"  # folder of low-rank parts beside their base
MARK = ".autocompress"  # a folder with it and without a manifest is half-written
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
WIDTH = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}  # bytes; others 1
CODES = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point")


@dataclass(frozen=True)
class Module:
    """A weight as a folder holds it.

    Args:
        name: of the module.
        shape: (out, in).
        stored: bytes of all its tensors.
        scheme: of compressed-tensors, `weights` and all; None is dense.
        packed: shape of its packed codes, if it has any.
    """

    name: str
    shape: tuple[int, ...]
    stored: int
    scheme: Mapping[str, Any] | None = None
    packed: tuple[int, ...] | None = None

    @property
    def level(self) -> str:
        """As our keys write it."""
        if self.scheme is None:
            return "dense"
        weights = self.scheme["weights"]
        group = f"g{weights['group_size']}" if weights.get("group_size") else ""
        sign = "sym" if weights.get("symmetric", True) else ""
        return f"w{weights['num_bits']}{group}{sign}"


@dataclass(frozen=True)
class Folder:
    """A model folder.

    Args:
        config: config.json.
        method: its `quant_method`, 'dense' without one.
        tensors: name -> (dtype, shape, bytes), of all safetensors files.
    """

    path: Path
    config: dict[str, Any]
    method: str
    tensors: dict[str, tuple[str, tuple[int, ...], int]]

    @property
    def quantization(self) -> dict[str, Any]:
        """`quantization_config`, empty where there is none."""
        return dict(self.config.get("quantization_config") or {})

    def modules(self) -> list[Module]:
        """Every matrix, in the order of the files.

        Raises:
            ModelError: codes that no group of the configuration describes.
        """
        found = []
        for name, (_, shape, size) in self.tensors.items():
            module = re.sub(r"\.(weight|weight_packed)$", "", name)
            if name.endswith(".weight_packed"):
                found.append(self._quantized(module, shape))
            elif f"{module}.weight_scale" in self.tensors and name.endswith(".weight"):
                found.append(self._quantized(module, None))
            elif len(shape) > 1 and not name.endswith(CODES):
                found.append(Module(module, shape, size))
        return found

    def _quantized(self, name: str, packed: tuple[int, ...] | None) -> Module:
        scheme = self._scheme(name)
        parts = {k: v for k, v in self.tensors.items() if k.rpartition(".")[0] == name}
        rows, groups = (*parts[f"{name}.weight_scale"][1], 1)[:2]
        weights = scheme["weights"]
        if packed is None:
            width = parts[f"{name}.weight"][1][1]
        elif weights.get("group_size"):
            width = groups * weights["group_size"]
        else:  # to within a word
            width = packed[1] * 32 // weights["num_bits"]
        size = sum(nbytes for _, _, nbytes in parts.values())
        return Module(name, (rows, width), size, scheme, packed)

    def _scheme(self, name: str) -> Mapping[str, Any]:
        groups = self.quantization.get("config_groups") or {}
        try:
            for group in groups.values():
                if any(_targets(target, name) for target in group["targets"]):
                    return {"weights": group["weights"], **group}
            for group in groups.values():
                if "Linear" in group["targets"]:
                    return dict(group)
        except (KeyError, TypeError, AttributeError, re.error) as error:
            raise ModelError(
                f"the groups of '{self.path / 'config.json'}' must name targets and weights. "
                f"Got: {error!r}."
            ) from error
        raise ModelError(
            f"'{self.path / 'config.json'}' must have a group for every quantized module. Got none "
            f"for '{name}'."
        )


def read_folder(path: Path) -> Folder:
    """A folder of config.json and safetensors files; headers only, nothing is run.

    Raises:
        ModelError: no such folder, half-written, pickled, truncated or of parts that do not fit.
    """
    if not path.is_dir():
        raise ModelError(f"a model must be a folder. Got '{path}', which is none. Check the path.")
    if (path / MARK).exists() and not (path / MANIFEST).exists():
        raise ModelError(
            f"a model folder must be whole. Got '{path}', half-written by a run that was stopped. "
            "Write it again."
        )
    if (path / PLAN).exists():
        raise ModelError(
            f"a model folder must hold weights. Got '{path}', a plan. Build it: "
            f"`autocompress build --plan {path} --out MODEL`."
        )
    try:
        config = dict(json.loads((path / "config.json").read_text()))
        method = str((config.get("quantization_config") or {}).get("quant_method", "dense"))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"a model folder must hold a readable config.json. Got '{path}': {error}."
        ) from error
    files = _files(path)
    tensors = {name: entry for file in files for name, entry in read_header(file).items()}
    return Folder(path, config, method, tensors)


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLES]
        held = f"pickled weights ({pickled[0]}), which can run any code" if pickled else "none"
        raise ModelError(
            f"a model's weights must be in safetensors files. Got '{path}' with {held}. "
            "Fetch or convert the safetensors version."
        )
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"'{index}' must be readable. Got: {error!r}.") from error
        if gone := sorted(named - {file.name for file in files}):
            raise ModelError(f"'{path}' must hold all files of its index. Got none of {gone}.")
    return files


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Name -> (dtype, shape, bytes) of a safetensors file.

    Raises:
        ModelError: it is none, or truncated.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 10**8)))
        found = {}
        end = 0
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = (entry["dtype"], tuple(entry["shape"]), last - first)
                end = max(end, last)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"'{path}' must be a safetensors file. Got: {error}.") from error
    if path.stat().st_size != 8 + length + end:
        raise ModelError(
            f"'{path}' must be {8 + length + end} bytes long by its header. Got "
            f"{path.stat().st_size}. It is truncated or damaged: fetch it again."
        )
    return found


def read_adapter(path: Path) -> dict[str, tuple[int, int]]:
    """Module -> (rank, bytes) of the low-rank parts beside a base; empty where there are none.

    Raises:
        ModelError: damaged.
    """
    file = path / ADAPTER / "adapter_model.safetensors"
    found: dict[str, tuple[int, int]] = {}
    for name, (_, shape, size) in read_header(file).items() if file.exists() else ():
        module, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
        rank, before = shape[0 if kind.startswith("A") else 1], found.get(module, (0, 0))[1]
        found[module] = (rank, before + size)
    return found


def describe_folder(path: Path) -> dict[str, Any]:
    """What a folder holds, module by module.

    Returns:
        `folder`, `method`, `file_bytes`, `weights`, `bits_per_weight`, `modules` (name, level,
        shape, weights, bits, bytes) and `levels`, level -> weights and bytes.

    Raises:
        ModelError: as `read_folder`.
    """
    folder, low_rank = read_folder(path), read_adapter(path)
    rows: list[dict[str, Any]] = []
    levels: dict[str, dict[str, int]] = {}
    for module in folder.modules():
        rank, more = low_rank.get(module.name, (0, 0))
        level, stored = f"r{rank}+{module.level}" if rank else module.level, module.stored + more
        weights = prod(module.shape)
        rows.append(
            {
                "name": module.name,
                "level": level,
                "shape": list(module.shape),
                "weights": weights,
                "bits": round(8 * stored / max(1, weights), 4),
                "bytes": stored,
            }
        )
        total = levels.setdefault(level, {"weights": 0, "bytes": 0})
        total["weights"] += weights
        total["bytes"] += stored
    files = [*path.glob("*.safetensors"), *(path / ADAPTER).glob("*.safetensors")]
    weights = sum(row["weights"] for row in rows)
    stored = sum(size for _, _, size in folder.tensors.values())
    stored += sum(size for _, size in low_rank.values())
    return {
        "folder": str(path),
        "method": folder.method,
        "architecture": folder.config.get("model_type"),
        "file_bytes": sum(file.stat().st_size for file in files),
        "weights": weights,
        "bits_per_weight": 8 * stored / max(1, weights),
        "levels": levels,
        "modules": rows,
    }


def _targets(target: str, name: str) -> bool:
    """Whether a target, a name or 're:' and an expression, names a module."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name
