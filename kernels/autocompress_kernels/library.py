"""Finds, loads and declares the C library; turns its error codes into exceptions.

The library lies beside this file. `AUTOCOMPRESS_KERNELS_LIBRARY` names another one, for
development. `AUTOCOMPRESS_ISA` forces an instruction set; the library reads it itself.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

ABI = 2
SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
OVERRIDE = "AUTOCOMPRESS_KERNELS_LIBRARY"
MATRIX = c_char_p  # a `struct ack_matrix` as bytes: made per call, nothing shared between threads
ERRORS = {  # ack_error -> what must hold
    1: "shapes must be at least 1 and rows must not overlap",
    2: "bits, group, pattern, mode and type must be a combination that has a kernel",
    3: "every buffer must be as large as the shape needs",
    5: "row numbers must be in range, and so must the offsets of sparse tiles",
}
NO_MEMORY = 4
SIGNATURES = {  # name -> result, arguments
    "ack_abi": (c_int32, ()),
    "ack_isa": (c_char_p, ()),
    "ack_isas": (c_char_p, ()),
    "ack_select_isa": (c_int32, (c_char_p,)),
    "ack_linear": (
        c_int32,
        (
            *(MATRIX, c_int32, c_int64, c_void_p, c_int32, c_int64, c_void_p),  # w, mode, m, x, b
            *(c_void_p, c_int32, c_int64, c_int32, c_void_p, c_int32),  # y, accumulate, threads
        ),
    ),
    "ack_linears": (
        c_int32,
        (
            *(
                c_char_p,
                c_int32,
                c_int32,
                c_int64,
                c_void_p,
                c_int32,
                c_int64,
            ),  # w, count, mode, m, x
            *(c_char_p, c_char_p, c_int32, c_void_p, c_int32),  # biases, ys, threads
        ),
    ),
    "ack_equal": (c_int32, (c_void_p, c_void_p, c_int64)),
    "ack_rows": (
        c_int32,
        (
            *(MATRIX, c_void_p, c_int64, c_int64),  # w, rows, begin, count
            *(c_void_p, c_int32, c_int64, c_void_p, c_int32),  # y, threads
        ),
    ),
    "ack_values_bytes": (c_int64, (c_int64, c_int64, c_int32)),
    "ack_pack_codes": (c_int32, (c_void_p, c_int64, c_int64, c_int32, c_void_p, c_int64)),
    "ack_pack_bf16": (c_int32, (c_void_p, c_int64, c_int64, c_void_p, c_int64)),
    "ack_pack_sparse": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_int64, c_int64, c_int32, c_int32),
            *(c_void_p, c_int64, c_void_p, c_int64, c_void_p),
        ),
    ),
    "ack_huge_pages": (c_int32, (c_void_p, c_int64)),
    "ack_llama_open": (c_void_p, (c_char_p, POINTER(c_int32))),
    "ack_llama_close": (None, (c_void_p,)),
    "ack_llama_step": (
        c_int32,
        (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int32),
    ),
}


class Library:
    """The loaded C library.

    `linear`, `linears`, `rows` and `equal` are its functions as they are, the first three returning
    error codes; `parallel` is the
    address of torch's parallel loop to hand them, None to run on one thread.

    Args:
        path: of the shared library.

    Raises:
        OSError: it cannot be loaded, lacks a function or has another interface version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        handle = ctypes.CDLL(str(path))
        for name, (result, arguments) in SIGNATURES.items():
            try:
                function = getattr(handle, name)
            except AttributeError as error:
                raise OSError(f"'{path}' must export {name}. Got a library without it.") from error
            function.restype, function.argtypes = result, arguments
        self.linear, self.rows = handle.ack_linear, handle.ack_rows  # at hand, for speed
        self.linears, self.equal = handle.ack_linears, handle.ack_equal
        self.llama_step = handle.ack_llama_step
        self._handle = handle
        if handle.ack_abi() != ABI:
            raise OSError(
                f"'{path}' must have interface version {ABI}. Got {handle.ack_abi()}. "
                "Install autocompress again: library and package are of different versions."
            )
        if not self.isa():
            raise OSError(
                f"AUTOCOMPRESS_ISA must be one of {', '.join(self.isas())} on this machine. "
                f"Got '{os.environ.get('AUTOCOMPRESS_ISA')}'."
            )
        self.parallel = _parallel_for()

    def isa(self) -> str:
        """The instruction set in use: avx512bf16, avx512vnni, avx2vnni, avx2, neon, portable."""
        name: bytes = self._handle.ack_isa()
        return name.decode()

    def isas(self) -> tuple[str, ...]:
        """All instruction sets that run here, best first."""
        names: bytes = self._handle.ack_isas()
        return tuple(names.decode().split(","))

    def select_isa(self, name: str) -> None:
        """Use another instruction set from now on, in all threads; for tests.

        Raises:
            ValueError: it does not run here.
        """
        if self._handle.ack_select_isa(name.encode()):
            raise ValueError(f"an instruction set must be one of {self.isas()}. Got '{name}'.")

    def pack(self, what: str, name: str, *arguments: object) -> None:
        """Call `ack_pack_<name>`.

        Args:
            what: is packed, for an error.

        Raises:
            ValueError: the arguments do not fit together; says how.
        """
        code = getattr(self._handle, f"ack_pack_{name}")(*arguments)
        if code:
            raise failure(code, what)

    def open_llama(self, description: bytes) -> int:
        """A handle for `struct ack_llama`, whose pointers must stay valid until it is closed.

        Raises:
            ValueError: shapes or buffers do not fit together.
            MemoryError: no memory.
        """
        code = c_int32(0)
        handle = self._handle.ack_llama_open(description, byref(code))
        if not handle:
            raise failure(code.value, "the matrices of a decoder")
        return int(handle)

    def close_llama(self, handle: int) -> None:
        """Free what `open_llama` made."""
        self._handle.ack_llama_close(handle)

    def values_bytes(self, rows: int, width: int, bits: int) -> int:
        """Bytes that the values of a full weight take, padding included."""
        return int(self._handle.ack_values_bytes(rows, width, bits))

    def huge_pages(self, tensor: torch.Tensor) -> bool:
        """Ask for huge pages behind a tensor, before it is first written; whether that worked."""
        return bool(self._handle.ack_huge_pages(tensor.data_ptr(), tensor.nbytes) == 0)


def failure(code: int, what: str) -> Exception:
    """The exception for an error code of the library.

    Args:
        code: not 0.
        what: the matrix or the call it came from.
    """
    if code == NO_MEMORY:
        return MemoryError(f"a kernel must have memory for its activations. Got none for {what}.")
    rule = ERRORS.get(code, f"a kernel must succeed (code {code})")
    return ValueError(f"{rule}. Got {what}.")


def library_path() -> Path:
    """Where the library is expected."""
    beside = Path(__file__).parent / f"libautocompress_kernels.{SUFFIX}"
    return Path(os.environ.get(OVERRIDE) or beside)


@cache
def _open() -> Library | str:
    """The library, or why there is none."""
    path = library_path()
    if not path.exists():
        return (
            f"'{path}' is not there: the kernels were not built, for lack of a C++ compiler at "
            "install time. Install one, then: pip install --force-reinstall --no-deps autocompress"
        )
    try:
        return Library(path)
    except OSError as error:
        return str(error)


def missing() -> str | None:
    """Why the library cannot be used, or None where it can."""
    found = _open()
    return found if isinstance(found, str) else None


@cache
def load() -> Library:
    """The library, loaded once.

    Raises:
        RuntimeError: it cannot be used; says why, as `missing()` does.
    """
    found = _open()
    if isinstance(found, str):
        raise RuntimeError(f"the kernels must be usable. {found}")
    return found


def _parallel_for() -> int | None:
    """Address of torch's own `torch_parallel_for`; None before torch 2.10: one thread then."""
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(
        sys.platform, "libtorch_cpu.so"
    )
    path = Path(torch.__file__).parent / "lib" / name
    try:
        function = ctypes.CDLL(str(path)).torch_parallel_for
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, c_void_p).value
