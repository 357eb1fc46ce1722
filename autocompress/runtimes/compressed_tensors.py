"""What runtimes of compressed-tensors folders can load: transformers, vLLM, SGLang.

Every rule was met in a run or read in the source of the versions that `VERSIONS` names.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from autocompress.levels import Dense, Level, Quantize, Shape, parse_level

# A fused layer takes the scheme of its first shard; others die on an assertion (vLLM 0.32).
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ENTRY = 420  # bytes that a header says of one module at most, besides its name three times
VERSIONS = "compressed-tensors 0.20, transformers 5.23, vLLM 0.32"


@dataclass(frozen=True)
class CompressedTensors:
    """A preset: one set of runtimes that read `pack-quantized` folders.

    Args:
        bits: of codes.
        groups: group sizes; None among them is one group per row. An empty tuple is any.
        even_groups: whether group sizes must be even.
        inputs, outputs: what must divide a quantized weight's width and height.
        tie, ties_experts: see `Runtime`. transformers 5.23 reads all experts with one scheme.
        dense_experts: whether experts can be dense: transformers reads them fused only where
            others are quantized, vLLM one by one only.
        quantized_head: whether a head that is not tied to the embedding can be.
        int8_activations: whether 8 bits run with activations rounded to int8 (W8A8), which
            takes one group per row.
    """

    name: str
    summary: str
    levels: tuple[Level, ...]
    bits: tuple[int, ...]
    groups: tuple[int | None, ...] = ()
    even_groups: bool = False
    inputs: int = 1
    outputs: int = 1
    tie: tuple[tuple[str, ...], ...] = FUSED
    ties_experts: bool = True
    dense_experts: bool = False
    quantized_head: bool = False
    int8_activations: bool = False
    format: str = "compressed-tensors"
    scope: tuple[str, ...] = ("blocks",)
    scale_bits: int = 8

    def refuses(self, level: Level, shape: Shape, part: str) -> str | None:
        if isinstance(level, Dense):
            if part == "experts" and not self.dense_experts:
                return "experts must be quantized: loaders want dense ones under different names"
            return None
        if not isinstance(level, Quantize):
            return "it takes symmetric codes or dense weights only"
        return self._refuses_part(part) or self._refuses_codes(level) or self._shape(level, shape)

    def _refuses_part(self, part: str) -> str | None:
        if part == "embedding":
            return "embeddings stay dense"
        if part == "head" and not self.quantized_head:
            return "heads stay dense"
        if part == "conv1d":
            return "compressed-tensors knows no Conv1D"
        return None

    def _refuses_codes(self, level: Quantize) -> str | None:
        if not level.symmetric:
            return (
                "codes must be symmetric (append 'sym'): compressed-tensors 0.18 cannot load zeros"
            )
        if level.bits not in self.bits:
            return f"bits must be one of {', '.join(map(str, self.bits))}"
        if self.int8_activations and level.bits == 8:
            return (
                None if level.group_size is None else "8 bits must be one group per row ('w8sym')"
            )
        if self.groups and level.group_size not in self.groups:
            known = ", ".join("one per row" if g is None else str(g) for g in self.groups)
            return f"groups must be one of {known}"
        if self.even_groups and (level.group_size or 0) % 2:
            return "groups must be even"
        return None

    def _shape(self, level: Quantize, shape: Shape) -> str | None:
        rows, width = shape
        if level.group_size is not None and width % level.group_size:
            return f"{width} inputs must be a multiple of the group size, {level.group_size}"
        if width % self.inputs:
            return f"inputs must be a multiple of {self.inputs}. Got {width}"
        if rows % self.outputs:
            return f"outputs must be a multiple of {self.outputs}. Got {rows}"
        return None

    def extra_bytes(self, name: str, level: Level, shape: Shape) -> int:
        header = ENTRY + 3 * len(name)
        if not isinstance(level, Quantize):
            return header
        rows, width = shape
        words = rows * ceil(width * level.bits / 32) * 4  # rows begin at a word
        return words - level.code_bits(rows * width) // 8 + 16 + header  # 16: the shape


def _levels(*keys: str) -> tuple[Level, ...]:
    return tuple(map(parse_level, keys))


PRESETS = (
    CompressedTensors(
        name="ct-universal",
        summary="transformers with any compressed-tensors, vLLM and SGLang on CUDA (Marlin)",
        levels=_levels("w4g128sym", "w4g64sym", "w4g32sym", "w8g128sym", "w8sym", "dense"),
        bits=(4, 8),
        groups=(32, 64, 128, None),
        inputs=128,
        outputs=64,
    ),
    CompressedTensors(
        name="ct-transformers",
        summary="transformers with compressed-tensors 0.18 or later; a layer alone, any bits",
        levels=_levels(
            *("w2g64sym", "w2g32sym", "w3g64sym", "w3g32sym", "w4g64sym", "w4g32sym"),
            *("w5g64sym", "w5g32sym", "w6g64sym", "w6g32sym", "w8g64sym", "w8sym"),
        ),
        bits=(2, 3, 4, 5, 6, 8),
        tie=(),
        dense_experts=True,
        quantized_head=True,
    ),
    CompressedTensors(
        name="ct-vllm-cuda",
        summary="vLLM on CUDA; 2, 3, 5 and 6 bits need humming-kernels and SM75 or later",
        levels=_levels(
            *("w2g64sym", "w3g128sym", "w3g64sym", "w4g128sym", "w4g64sym", "w5g128sym"),
            *("w6g128sym", "w8g128sym", "w8sym", "dense"),
        ),
        bits=(2, 3, 4, 5, 6, 8),
    ),
    CompressedTensors(
        name="ct-vllm-cpu",
        summary="vLLM on CPU: 4 bits (AVX-512 only), and 8 bits with activations in int8",
        levels=_levels("w4g128sym", "w4g64sym", "w4g32sym", "w8sym", "dense"),
        bits=(4, 8),
        even_groups=True,
        inputs=32,
        outputs=32,
        int8_activations=True,
    ),
)
