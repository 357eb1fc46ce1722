"""Levels that store a weight in one of the block types of GGUF files, as llama.cpp reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from autocompress.errors import LevelError
from autocompress.levels.storage import Shape

# Type -> (weights, bytes) of a block, as ggml.h and `gguf.GGML_QUANT_SIZES` have them.
BLOCKS: dict[str, tuple[int, int]] = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "IQ4_NL": (32, 18),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
    "IQ4_XS": (256, 136),
}


@dataclass(frozen=True, slots=True, order=True)
class GgufType:
    """A tensor type of GGUF: blocks of 32 or 256 consecutive inputs of one output row.

    Args:
        name: one of `BLOCKS`, which is also the key.
    """

    form: ClassVar[str] = "a GGUF type, such as Q4_K, Q5_0, IQ4_XS"

    name: str

    def __post_init__(self) -> None:
        if self.name not in BLOCKS:
            raise LevelError(f"a GGUF type must be one of {', '.join(BLOCKS)}. Got '{self.name}'.")

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, key: str) -> Self | None:
        return cls(key) if key in BLOCKS else None

    @property
    def rate(self) -> float:
        """Bits per weight."""
        length, size = BLOCKS[self.name]
        return 8 * size / length

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` inputs.

        Raises:
            LevelError: the block's length does not divide the inputs.
        """
        length, size = BLOCKS[self.name]
        if width % length:
            small = "a type of 32-blocks such as Q4_0" if width % 32 == 0 else "dense"
            raise LevelError(
                f"the inputs of a layer at {self} must be a multiple of {length}. Got {width}. "
                f"Give the layer {small}."
            )
        return width // length * size

    def storage_bits(self, shape: Shape) -> int:
        return shape[0] * self.row_bytes(shape[1]) * 8

    def parameters(self, shape: Shape) -> int:
        self.row_bytes(shape[1])
        return shape[0] * shape[1]
