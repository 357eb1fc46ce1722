"""Compiles a launch for a GPU that need not be there: shows that it is legal, not that it runs."""

from __future__ import annotations

# mypy: disable-error-code="import-untyped"
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from autocompress_kernels.triton_kernels.ops import Launch

POINTERS = {
    "torch.uint8": "*u8",
    "torch.int32": "*i32",
    "torch.float16": "*fp16",
    "torch.bfloat16": "*bf16",
    "torch.float32": "*fp32",
}


def compile_launch(
    work: Launch,
    capability: int,  # 80 for compute capability 8.0
) -> Any:  # Triton's CompiledKernel: .asm['cubin'] bytes, .asm['ptx'] str, .metadata
    """The machine code that the launch would use; needs no GPU, and tensors on any device."""
    signature: dict[str, str] = {}
    constants: dict[str, int | None] = dict(work.tiles)
    aligned = {}
    arguments = zip(work.kernel.arg_names, work.arguments, strict=False)  # tiles come last
    for i, (name, value) in enumerate(arguments):
        if value is None:
            constants[name] = None
        signature[name] = POINTERS[str(value.dtype)] if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or (value and value % 16 == 0):
            aligned[(i,)] = [["tt.divisibility", 16]]  # as Triton finds when it launches
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in work.kernel.arg_names}  # Triton counts them
    source = ASTSource(work.kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))
