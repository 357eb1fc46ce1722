"""Modules that hold packed weights and compute with them: what a loaded result is made of."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.backends import BACKENDS, Op, choose_backend
from autocompress.errors import BackendError
from autocompress.fusion import Fused, fuse
from autocompress.levels import Level, Shape
from autocompress.packed import Packed, tensor_shapes
from autocompress.tables import did_you_mean
from autocompress.targets import MODES

ACTIVATIONS = "int8"  # what a folder that names none computes with
FASTEST = "native"


class PackedWeight(nn.Module):
    """A compressed (out, in) weight: as files hold it until it is prepared, then as a backend does.

    Until then buffers named as in `tensor_shapes` hold it; afterwards they are None, and the state
    dict still has them. `dtype` is what the model computes in.
    """

    def __init__(self, level: Level, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.level, self.shape, self.dtype = level, shape, dtype
        self.mode = MODES[ACTIVATIONS]
        self.wanted: str | None = None  # name of a backend, or the fastest that can
        self.backend: str | None = None  # name of the one in use
        self.op: Op | None = None
        for name, (kind, size) in tensor_shapes(level, shape).items():
            self.register_buffer(name, torch.zeros(size, dtype=kind))

    def prepare(self) -> Op:
        """Hand the weight over to its backend, once.

        Raises:
            BackendError: the wanted backend cannot run it, or the model is being compiled.
        """
        if self.op is None:
            if torch.compiler.is_compiling():
                raise BackendError(
                    "a model must be prepared before it is compiled. Got one that is not. Call "
                    "autocompress.runtime.prepare(model) first."
                )
            backend = choose_backend(self.level, self.shape, self.mode, self.wanted)
            with torch.inference_mode(False):  # it outlives the forward that made it
                self.op = backend.prepare(self.stored(), self.dtype, self.mode)
            self.backend = backend.name
            for name in self._buffers:
                self._buffers[name] = None
        return self.op

    def release(self) -> None:
        """Take the weight back from its backend: it is prepared again when it is used."""
        if self.op is not None:
            with torch.inference_mode(False):
                self._buffers.update(self.op.stored().tensors)
            self.op, self.backend = None, None

    def stored(self) -> Packed:
        """The weight as files hold it."""
        if self.op is not None:
            return self.op.stored()
        tensors = {name: t for name, t in self._buffers.items() if t is not None}
        return Packed(self.level, self.shape, tensors)

    def kernel_weight(self) -> Any | None:
        """The weight in the layout of `autocompress_kernels`; None where it runs on others."""
        op = self.prepare()
        return getattr(op, "packed", None) if self.backend == FASTEST else None

    def dense_weight(self) -> Tensor:  # (out, in), in the dtype the model computes in
        """The weight the tensors stand for, exactly as the search stitched it."""
        return (self.stored() if self.op is None else self.op).dense().to(self.dtype)

    @property
    def weight(self) -> Tensor:  # (out, in)
        """The dense weight, for code that reads a module's weight."""
        weight = self.dense_weight()
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # GPT-2 would fill c_proj
        return weight

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.op is not None:
            parts = self.op.stored().tensors
            destination.update({f"{prefix}{name}": tensor for name, tensor in parts.items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.shape[1]} -> {self.shape[0]}, {self.level}, {self.backend or 'not prepared'}"


class PackedLinear(PackedWeight):
    """`x @ W.T + bias` with a packed weight."""

    def __init__(
        self, level: Level, shape: Shape, dtype: torch.dtype, bias: nn.Parameter | None
    ) -> None:
        super().__init__(level, shape, dtype)
        self.bias = bias
        self.fused: Fused | None = None  # with modules that read the same input

    def release(self) -> None:
        super().release()
        if self.fused is not None:
            self.fused.dissolve()

    def forward(self, x: Tensor) -> Tensor:
        op = self.op
        if op is None:
            op = self.prepare()
        y = None if self.fused is None else self.fused(self, x)
        return op(x, self.bias) if y is None else y


class PackedEmbedding(PackedWeight):
    """Rows of a packed (vocab, hidden) weight; `scale` is what some models multiply them with."""

    def __init__(self, level: Level, shape: Shape, dtype: torch.dtype, scale: float | None) -> None:
        super().__init__(level, shape, dtype)
        self.embed_scale = scale

    def forward(self, tokens: Tensor) -> Tensor:
        op = self.op
        if op is None:
            op = self.prepare()
        rows = op.rows(tokens)
        if self.embed_scale is None:
            return rows
        return rows * torch.tensor(self.embed_scale).to(rows.dtype)


class TiedHead(nn.Module):
    """The LM head of a model whose packed embedding it shares."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        self.shared = (embedding,)  # in a tuple: not a submodule, stored once

    @property
    def weight(self) -> Tensor:
        """The shared dense weight, (vocab, hidden)."""
        return self.shared[0].dense_weight()

    def forward(self, x: Tensor) -> Tensor:
        op = self.shared[0].op
        if op is None:
            op = self.shared[0].prepare()
        return op(x)


def packed_modules(model: nn.Module) -> list[PackedWeight]:
    """Every packed module of a model, in the order of its definition."""
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


def configure(model: Any, activations: str | None = None, backend: str | None = None) -> None:
    """Choose what packed modules compute with; they are prepared again when they are used.

    Args:
        activations: inside kernels: 'int8', 'bfloat16' or 'float32'.
        backend: 'native', 'aten' or 'dequantize'. Where none was ever chosen, the first that can
            run a module does.

    None leaves what was chosen.

    Raises:
        BackendError: unknown names, or a backend that cannot run all packed modules.
    """
    if activations is not None and activations not in MODES:
        raise BackendError(
            f"activations must be one of {', '.join(MODES)}. Got '{activations}'."
            f"{did_you_mean(activations, MODES)}"
        )
    wanted = {
        module: (
            module.mode if activations is None else MODES[activations],
            module.wanted if backend is None else backend,
        )
        for module in packed_modules(model)
    }
    for module, (mode, name) in wanted.items():
        choose_backend(module.level, module.shape, mode, name)
    for module, (mode, name) in wanted.items():
        if (module.mode, module.wanted) != (mode, name):
            module.release()
            module.mode, module.wanted = mode, name


def prepare(
    model: Any, activations: str | None = None, backend: str | None = None
) -> dict[str, str]:
    """Hand all packed modules over to their backends, side by side in memory; before compiling.

    Args:
        activations, backend: as `configure` takes them.

    Returns:
        Name -> version of every backend in use.

    Raises:
        BackendError: as `configure`.
    """
    configure(model, activations, backend)
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is prepare_first:
            del model._forward_pre_hooks[key]
    modules = packed_modules(model)
    changed = any(module.op is None for module in modules)
    ops = [(module.prepare(), module.backend) for module in modules]
    with torch.inference_mode(False):
        for name, used in BACKENDS.items():
            used.place([op for op, backend in ops if backend == name])
    if changed:
        fuse(model, {k: one for k, one in model.named_modules() if isinstance(one, PackedLinear)})
    _warn_of_others(modules)
    return used_backends(model)


def used_backends(model: nn.Module) -> dict[str, str]:
    """Name -> version of every backend that prepared modules of a model compute with."""
    names = {module.backend for module in packed_modules(model)} - {None}
    return {name: backend.version() for name, backend in BACKENDS.items() if name in names}


def prepare_first(model: Any, args: Any) -> None:
    """Before the first forward."""
    prepare(model)


def _warn_of_others(modules: list[PackedWeight]) -> None:
    """Say which layers do not run on the kernels made for them, where nobody chose that."""
    reasons = Counter(
        (module.backend, BACKENDS[FASTEST].supports(module.level, module.shape, module.mode))
        for module in modules
        if module.wanted is None and module.backend != FASTEST
    )
    for (name, reason), count in reasons.items():
        warnings.warn(
            f"{count} of {len(modules)} packed layers run on '{name}', not '{FASTEST}': {reason}",
            stacklevel=3,
        )
