"""What llama.cpp, and whoever else reads GGUF files, can load."""

from __future__ import annotations

from dataclasses import dataclass

from autocompress.errors import LevelError
from autocompress.levels import Dense, GgufType, Level, Shape, parse_level

ENTRY = 128  # bytes of a tensor's description at most, besides its name, and of its alignment

# K-quants where 256 divides the inputs; the 32-blocks below for the others.
LEVELS = tuple(
    map(
        parse_level,
        (
            *("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K"),
            *("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        ),
    )
)


@dataclass(frozen=True)
class Gguf:
    """One file, a type for every tensor; nothing is fused."""

    name: str = "gguf"
    summary: str = "llama.cpp and what is built on it (Ollama, LM Studio); transformers decodes it"
    format: str = "gguf"
    levels: tuple[Level, ...] = LEVELS
    scope: tuple[str, ...] = ("blocks", "embedding", "head")
    tie: tuple[tuple[str, ...], ...] = ()
    ties_experts: bool = True  # they are stacked in one tensor
    scale_bits: int = 11

    def refuses(self, level: Level, shape: Shape, part: str) -> str | None:
        if isinstance(level, Dense):
            return None
        if not isinstance(level, GgufType):
            return "it takes GGUF types, such as Q4_K, or dense weights only"
        try:
            level.storage_bits(shape)
        except LevelError as error:
            return str(error).split(". Give")[0]
        return None

    def extra_bytes(self, name: str, level: Level, shape: Shape) -> int:
        return ENTRY + len(name)


GGUF = Gguf()
