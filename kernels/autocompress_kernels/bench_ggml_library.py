"""The C library of ggml, as Python packages install it.

`llama_cpp` (llama-cpp-python) is looked for first, then `libggml`; neither is imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint8, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autocompress_kernels.library import load

PACKAGES = ("llama_cpp", "libggml")
NAMES = ("libggml.so", "libggml.dylib", "ggml.dll")
CPU = 0  # of `enum ggml_backend_dev_type`
PLAIN = "plain"  # in place of the name of a buffer type


class _Init(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Feature(ctypes.Structure):
    """`struct ggml_backend_feature`."""

    _fields_ = (("name", c_char_p), ("value", c_char_p))


P = c_void_p
_LOG = CFUNCTYPE(None, c_int, c_char_p, P)
_SILENT = _LOG(lambda level, text, data: None)  # it names every tensor that it reorders
SIGNATURES = {  # name -> result, arguments
    "ggml_init": (P, (_Init,)),
    "ggml_free": (None, (P,)),
    "ggml_log_set": (None, (_LOG, P)),
    "ggml_version": (c_char_p, ()),
    "ggml_commit": (c_char_p, ()),
    "ggml_blck_size": (c_int64, (c_int,)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_new_tensor_2d": (P, (P, c_int, c_int64, c_int64)),
    "ggml_new_graph_custom": (P, (P, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (P, P)),
    "ggml_mul_mat": (P, (P, P, P)),
    "ggml_get_rows": (P, (P, P, P)),
    "ggml_quantize_chunk": (c_size_t, (c_int, P, P, c_int64, c_int64, c_int64, P)),
    "ggml_backend_load_all_from_path": (None, (c_char_p,)),
    "ggml_backend_dev_count": (c_size_t, ()),
    "ggml_backend_dev_by_type": (P, (c_int,)),
    "ggml_backend_dev_init": (P, (P, c_char_p)),
    "ggml_backend_dev_backend_reg": (P, (P,)),
    "ggml_backend_dev_buffer_type": (P, (P,)),
    "ggml_backend_dev_supports_op": (c_bool, (P, P)),
    "ggml_backend_reg_get_proc_address": (P, (P, c_char_p)),
    "ggml_backend_buft_name": (c_char_p, (P,)),
    "ggml_backend_buft_get_alloc_size": (c_size_t, (P, P)),
    "ggml_backend_buft_alloc_buffer": (P, (P, c_size_t)),
    "ggml_backend_buffer_get_base": (P, (P,)),
    "ggml_backend_buffer_set_usage": (None, (P, c_int)),
    "ggml_backend_buffer_free": (None, (P,)),
    "ggml_backend_tensor_alloc": (c_int, (P, P, P)),
    "ggml_backend_tensor_set": (None, (P, P, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (P, P)),
}


class Ggml:
    """The library's CPU backend.

    Args:
        path: of libggml; its dependencies lie beside it.

    Raises:
        OSError: it cannot be loaded, lacks a function, or has no CPU backend.
    """

    def __init__(self, path: Path) -> None:
        handle = ctypes.CDLL(str(path))
        self.call: dict[str, Callable[..., Any]] = {}
        for name, (result, arguments) in SIGNATURES.items():
            try:
                function = getattr(handle, name)
            except AttributeError as reason:
                raise OSError(f"'{path}' must export {name}. Got a library without it.") from reason
            function.restype, function.argtypes = result, arguments
            self.call[name.removeprefix("ggml_")] = function
        self.path = path
        self.call["log_set"](_SILENT, None)
        if not self.call["backend_dev_count"]():
            self.call["backend_load_all_from_path"](str(path.parent).encode())
        self.device = self.call["backend_dev_by_type"](CPU)
        if not self.device:
            raise OSError(f"'{path}' must have a CPU backend. Got none.")
        self.backend = self.call["backend_dev_init"](self.device, None)

    def _function(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        """A function of the CPU backend that is only found by its name."""
        registry = self.call["backend_dev_backend_reg"](self.device)
        address = self.call["backend_reg_get_proc_address"](registry, name.encode())
        if not address:
            raise OSError(f"'{self.path}' must have {name}. Got a library without it.")
        found: Callable[..., Any] = ctypes.cast(address, CFUNCTYPE(result, *arguments))
        return found

    def set_threads(self, count: int) -> None:
        """Use `count` threads from now on."""
        self._function("ggml_backend_set_n_threads", None, P, c_int)(self.backend, count)

    def buffer_types(self) -> dict[str, int]:
        """Name -> buffer type: the plain one, and those that reorder weights for this CPU."""
        found = {PLAIN: self.call["backend_dev_buffer_type"](self.device)}
        others = self._function("ggml_backend_dev_get_extra_bufts", POINTER(P), P)(self.device)
        for one in others:
            if not one:  # the end
                break
            name = self.call["backend_buft_name"](one).decode()
            found[name.removeprefix("CPU_").lower()] = one
        return found

    def version(self) -> str:
        """Package, version, commit and what its CPU backend was built with."""
        package = self.path.parents[1].name
        names = [self.call[name]().decode() for name in ("version", "commit")]
        return " ".join((package, *names, *self._features()))

    def _features(self) -> list[str]:
        registry = self.call["backend_dev_backend_reg"](self.device)
        found: list[str] = []
        for one in self._function("ggml_backend_get_features", POINTER(_Feature), P)(registry):
            if not one.name:  # the end
                break
            found.append(one.name.decode())
        return found

    @contextmanager
    def context(self, tensors: int, nodes: int) -> Iterator[int]:
        """What describes that many tensors and a graph of that many nodes; freed at the end."""
        size = tensors * self.call["tensor_overhead"]()
        size += self.call["graph_overhead_custom"](nodes, False)
        found = self.call["init"](_Init(size, None, True))
        try:
            yield found
        finally:
            self.call["free"](found)

    @contextmanager
    def memory(self, kind: int, size: int) -> Iterator[int]:
        """Address of a buffer of a buffer type on huge pages; freed at the end."""
        buffer = self.call["backend_buft_alloc_buffer"](kind, size)
        if not buffer:
            raise MemoryError(f"ggml must have {size} bytes of memory. Got none.")
        try:
            base = self.call["backend_buffer_get_base"](buffer)
            load().huge_pages(view(base, size))
            yield buffer
        finally:
            self.call["backend_buffer_free"](buffer)


def view(address: int, size: int) -> Tensor:  # (size,), uint8
    """Memory of ggml's."""
    return torch.frombuffer((c_uint8 * size).from_address(address), dtype=torch.uint8)


@cache
def find_ggml() -> Ggml | str:
    """The library, or why there is none."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for name in NAMES:
                for path in sorted(Path(folder).glob(f"lib*/{name}")):
                    try:
                        return Ggml(path)
                    except OSError as reason:
                        return str(reason)
    return f"neither {' nor '.join(PACKAGES)} is installed: pip install llama-cpp-python"
