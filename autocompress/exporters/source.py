"""A result on disk, as exporters read it: one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autocompress.errors import ModelError, SpaceError
from autocompress.experts import Expert, UnfusedExperts, unfuse_experts
from autocompress.exporters.native import check_weights
from autocompress.folders import MANIFEST, MARK
from autocompress.integration import FORMAT, METHOD, WEIGHTS
from autocompress.levels import Dense, Drop, Joint, Level, Rows, Shape, Width, parse_level
from autocompress.models import is_tied, weight_of
from autocompress.packed import Packed, dense_weight, tensor_shapes
from autocompress.packed.low_rank import low_rank_dense
from autocompress.parts import module_parts
from autocompress.runtimes.rules import part_of


@dataclass
class Source:
    """A packed result.

    Args:
        folder: written by `autocompress search` or `build --plan`.
        config: its config.json, without `quantization_config`.
        manifest: its autocompress.json.
        levels: module -> level of every packed module.
        packing: its whole `quantization_config`, as our quantizer reads it.
    """

    folder: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    levels: dict[str, Level]
    packing: dict[str, Any]
    _file: Any = field(repr=False, default=None)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The result in a folder.

        Raises:
            ModelError: it is no whole result.
        """
        try:
            config = json.loads((folder / "config.json").read_text())
            manifest = json.loads((folder / MANIFEST).read_text())
            packing = config.pop("quantization_config")
            if packing["quant_method"] != METHOD or packing["format"] != FORMAT:
                raise KeyError(METHOD)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"an export must start from a finished result of `autocompress search` or `build "
                f"--plan`. Got '{folder}': {_why(folder, error)}."
            ) from error
        check_weights(folder / WEIGHTS)
        levels = {name: parse_level(key) for name, key in packing["levels"].items()}
        file = safe_open(folder / WEIGHTS, "pt")
        return cls(folder, config, manifest, levels, packing, file)

    @cached_property
    def model(self) -> Any:
        """The model without its weights, experts one by one."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**self.config)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
            unfuse_experts(model)
        return model

    @cached_property
    def parts(self) -> dict[str, str]:
        """Modules that are no plain linears of blocks; see `module_parts`."""
        return module_parts(self.model)

    @property
    def removed(self) -> list[str]:
        """Sublayers and blocks that are not in the file; only our own format can say so."""
        return sorted(self.packing.get("removed") or ())

    @property
    def narrow(self) -> list[str]:
        """Modules that are smaller than the configuration says."""
        return [name for name, level in self.levels.items() if isinstance(level, Width | Rows)]

    def must_be_whole(self, format: str) -> None:
        """Check that no sublayer is dropped or narrower, for formats that have no word for it.

        Raises:
            SpaceError: some are.
        """
        if self.narrow:
            raise SpaceError(
                f"every channel must be there in format '{format}'. Got a result with "
                f"'{self.narrow[0]}' at {self.levels[self.narrow[0]]} ({len(self.narrow)} modules "
                "in all). Export it as dense, with weights of zero, or as native."
            )
        gone = [name for name, level in self.levels.items() if isinstance(level, Drop)]
        if gone:
            raise SpaceError(
                f"every sublayer must be there in format '{format}'. Got a result without the one "
                f"of '{gone[0]}' ({len(gone)} in all). Export it as dense, with weights of zero, "
                "or as native."
            )

    @property
    def tied(self) -> bool:
        """Whether head and embedding are one."""
        return is_tied(self.model)

    @property
    def scope(self) -> list[str]:
        """Every module in the search space, dense ones too, in the space's order."""
        return [name for row in self.manifest["allocation"] for name in row["modules"]]

    def level(self, name: str) -> Level:
        """The level of a module."""
        return self.levels.get(name, Dense())

    def shape(self, name: str) -> Shape:
        """(out, in) of a module's weight."""
        rows, width = weight_of(self.model.get_submodule(name)).shape
        return rows, width

    def packed(self, name: str) -> Packed:
        """A packed module's tensors.

        Raises:
            ModelError: they are missing or not of the level's sizes.
        """
        level, shape = self.level(name), self.shape(name)
        tensors = {part: self.tensor(f"{name}.{part}") for part in tensor_shapes(level, shape)}
        for part, (dtype, size) in tensor_shapes(level, shape).items():
            got = tensors[part]
            if (got.dtype, tuple(got.shape)) != (dtype, size):
                raise ModelError(
                    f"'{name}.{part}' must be {dtype}, {list(size)} at {level}. Got {got.dtype}, "
                    f"{list(got.shape)} in '{self.folder}'. Write the result again."
                )
        return Packed(level, shape, tensors)

    def weight(self, name: str) -> Tensor:  # (out, in), float32
        """A module's weight, decoded where it is packed."""
        if name in self.levels:
            return self.packed(name).dense()
        weight = self.tensor(f"{name}.weight").float()
        return weight.T if self.parts.get(name) == "conv1d" else weight

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file, read now.

        Raises:
            ModelError: it is not there.
        """
        try:
            tensor: Tensor = self._file.get_tensor(name)
            return tensor
        except SafetensorError as error:
            raise ModelError(
                f"'{self.folder / WEIGHTS}' must hold '{name}'. Got: {error}. Write it again."
            ) from error

    def full(self, name: str) -> Tensor:
        """A tensor that belongs to no packed weight; biases of gone channels are zeros."""
        found, module = self.tensor(name), name.rpartition(".")[0]
        if not isinstance(self.level(module), Rows):
            return found
        return torch.cat([found, found.new_zeros(self.shape(module)[0] - len(found))])

    def decoded(self, name: str, rounded: Mapping[str, str]) -> Tensor:  # (out, in), float32
        """A module's weight as a loader that cannot hold it exactly has it.

        Args:
            rounded: part of the model, or '*' for all -> name of a dtype; float32 where neither is.
                'base' is all but low-rank parts, which are then added exactly.
        """
        level = self.level(name)
        found = rounded.get(part_of(name, self.parts), rounded.get("*", rounded.get("base")))
        if found is None:
            return self.weight(name)
        dtype: torch.dtype = getattr(torch, found)
        if "base" in rounded and isinstance(level, Joint) and level.low_rank is not None:
            packed = self.packed(name)
            base = dense_weight(level.base, packed.shape, packed.tensors).to(dtype).float()
            return base + low_rank_dense(level.low_rank, packed.shape, packed.tensors)
        return self.weight(name).to(dtype).float()

    def stitched(self, rounded: Mapping[str, str] | None = None) -> Any:
        """The model with its decoded weights as plain parameters, computing in float32.

        Args:
            rounded: see `decoded`.
        """
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        with no_init_weights():
            config = AutoConfig.for_model(**self.config)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.tie_weights()
        unfuse_experts(model)
        state = {name: self.full(name) for name in self.plain()}
        for name in self.levels:
            weight = self.decoded(name, rounded or {})
            state[f"{name}.weight"] = weight.T if self.parts.get(name) == "conv1d" else weight
        missing, unknown = model.load_state_dict(state, strict=False)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        filled = {id(parameters[name]) for name in state if name in parameters}  # tied ones, too
        wrong = [name for name in missing if id(parameters.get(name)) not in filled] + unknown
        if wrong:
            raise ModelError(
                f"'{self.folder}' must hold exactly its model's tensors. Got {len(wrong)} that are "
                f"missing or unknown, such as {wrong[0]}. Write the result again."
            )
        return model.eval()

    def plain(self) -> Iterator[str]:
        """Names of all tensors that belong to no packed module."""
        owned = {f"{name}." for name in self.levels}
        for name in self._file.keys():
            if f"{name.rpartition('.')[0]}." not in owned:
                yield name
            elif name.endswith(".bias"):
                yield name

    @cached_property
    def names(self) -> Mapping[str, str]:
        """Our names of modules and tensors inside mixtures of experts -> those of other loaders."""
        return expert_names(self.model)

    def their(self, name: str) -> str:
        """The name by which others know one of our modules or tensors."""
        module, _, last = name.rpartition(".")
        if module in self.names:  # of an expert
            return f"{self.names[module]}.{last}"
        if f"{name}.weight" in self.names:
            return self.names[f"{name}.weight"].removesuffix(".weight")
        return self.names.get(name, name)


def expert_names(model: Any) -> dict[str, str]:
    """Our names of experts' modules, and of what else is renamed with them -> checkpoint names.

    transformers is asked to write a state whose tensors are numbers in place of weights: where a
    number comes out is its name.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, Tensor] = {}
    ours: dict[int, str] = {}
    experts = {n: m for n, m in model.named_modules() if isinstance(m, UnfusedExperts)}
    for name, module in experts.items():
        base = len(ours)
        for number, expert in enumerate(module.unfused):
            assert isinstance(expert, Expert)
            for kind in ("gate_proj", "up_proj", "down_proj"):
                ours[len(ours)] = f"{name}.unfused.{number}.{kind}"
        numbers = torch.arange(base, len(ours)).view(-1, 3, 1)
        state[f"{name}.gate_up_proj"] = numbers[:, :2].float()
        state[f"{name}.down_proj"] = numbers[:, 2:].float()
    if not experts:
        return {}
    for name in model.state_dict():
        if not any(name.startswith(f"{expert}.") for expert in experts):
            state[name] = torch.tensor([float(len(ours))])
            ours[len(ours)] = name
    theirs = revert_weight_conversion(model, state)
    found = {ours[int(number)]: name for name, number in theirs.items()}
    inside = {name: found[name].removesuffix(".weight") for name in found if ".unfused." in name}
    return {name: their for name, their in found.items() if name not in inside} | inside


def _why(folder: Path, error: Exception) -> str:
    if (folder / MARK).exists() and not (folder / MANIFEST).exists():
        return "it is half-written, as its writer was stopped; run that command again"
    if isinstance(error, KeyError):
        return "it holds a model in another format"
    return str(error)
