"""GGUF types: llama.cpp's encoder with importance, then GPTQ on the codes beside its scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autocompress.errors import ConfigError
from autocompress.levels import GgufType, Level
from autocompress.levels.gguf import BLOCKS
from autocompress.operators import Solution, Solver, Statistics, operator
from autocompress.operators.measure import Measure
from autocompress.operators.sweep import ordered_factor, sweep
from autocompress.packed.gguf import LAYOUTS, Array, as_blocks, pack_gguf

ELEMENTS = 1 << 26  # of a stack, at most, unless one level takes more


@operator(GgufType)
def gguf(
    weights: Sequence[Tensor], statistics: Statistics, levels: Sequence[Level], solver: Solver
) -> list[list[Solution]]:
    """Every weight at every GGUF type.

    The encoder chooses a block's scales for the least squared error, weighted by an importance of
    every input. They stay, and columns are solved on the grid that they span. Lattice types (IQ1 to
    IQ3) have no such grid: the encoder's codes stay, as they do with `rtn` and without statistics;
    their importance is the Hessian's diagonal, which llama.cpp calls an importance matrix.

    Args:
        weights: each (out_i, in), float32; they share one input.
        statistics: of that input.
        levels: all `GgufType`.
        solver: settings.

    Returns:
        [weight][level] solutions.

    Raises:
        ConfigError: the encoder is not installed.
        LevelError: the block's length does not divide the inputs.
        ModelError: the Hessian cannot be factorised at any damping up to 1.

    References:
        Frantar et al., GPTQ, arXiv:2210.17323, algorithm 1; ggml-quants.c of llama.cpp.
    """
    wanted = [level for level in levels if isinstance(level, GgufType)]
    measure = Measure.of(statistics, solver)
    stacked = torch.cat(list(weights)).float()
    solving = statistics.known is not None and solver.method == "gptq"
    chosen = [level for level in wanted if solving and level.name in LAYOUTS]
    importance = column_importance(statistics)
    encoded = {lv: encode(stacked, lv, importance) for lv in wanted if lv not in chosen}
    if chosen:
        importance = solved_importance(statistics, solver)
        encoded |= {level: encode(stacked, level, importance) for level in chosen}
        encoded |= solve_codes(stacked, encoded, chosen, statistics, solver)
    found: list[list[Solution]] = []
    start = 0
    for weight in weights:
        rows = slice(start, start + len(weight))
        start = rows.stop
        packed = [pack_gguf(lv, encoded[lv][rows].copy(), weight.shape[1]) for lv in wanted]
        found.append([measure(weight, part) for part in packed])
    return found


def column_importance(statistics: Statistics) -> Tensor | None:  # (in,), float32, positive
    """Mean square of every input; one that was never active counts as the mean.

    None without statistics.
    """
    if statistics.known is None:
        return None
    diagonal = statistics.known.diagonal().clone()
    diagonal[diagonal <= 0] = diagonal.mean()
    return diagonal


def solved_importance(statistics: Statistics, solver: Solver) -> Tensor:  # (in,), positive
    """Importance of every input where later columns make up for the error of earlier ones.

    The geometric mean of the Hessian's diagonal, which counts an error that nothing repairs, and of
    1/u², u the column's entry on the diagonal of the sweep's factor: what is left of it when the
    later columns have done their best (GPTQ's error of a column is (gap/u)²/2). Chosen on
    validation windows (studies/gguf).
    """
    plain = column_importance(statistics)
    assert plain is not None
    order, factor = ordered_factor(statistics, None, solver)
    left = torch.empty_like(plain)
    left[order] = 1 / factor.diagonal().square().to(plain.dtype)
    return (plain * left).sqrt()


def encode(weight: Tensor, level: GgufType, importance: Tensor | None) -> Array:
    """Blocks as llama.cpp's quantizer writes them, (out, bytes of a row), uint8.

    Args:
        weight: (out, in), float32.
        importance: (in,), mean square of every input; None weighs all alike.

    Raises:
        ConfigError: the encoder is not installed.
        LevelError: the block's length does not divide the inputs.
    """
    size = level.row_bytes(weight.shape[1])
    try:
        import libgguf
    except ImportError as error:
        raise ConfigError(
            f"levels such as {level} need llama.cpp's encoder, the package libgguf. Got: {error}. "
            "Install it: pip install 'autocompress[gguf]'."
        ) from error
    kind = libgguf.GGMLQuantizationType[level.name]
    if importance is None and libgguf.quantize_requires_imatrix(kind):
        importance = torch.ones(weight.shape[1])
    matrix = None if importance is None else importance.float().contiguous().numpy()
    data = np.ascontiguousarray(weight.numpy(), dtype=np.float32)
    blocks: Any = libgguf.quantize_rows(data, kind, imatrix=matrix)
    return np.asarray(blocks, dtype=np.uint8).reshape(len(data), size)


def solve_codes(
    weight: Tensor,  # (out, in), float32
    encoded: dict[GgufType, Array],
    levels: Sequence[GgufType],
    statistics: Statistics,
    solver: Solver,
) -> dict[GgufType, Array]:
    """The blocks of `encoded` with their scales and with codes that GPTQ solved."""
    order, factor = ordered_factor(statistics, None, solver)
    each = max(1, ELEMENTS // weight.numel())
    solved: dict[GgufType, Array] = {}
    for start in range(0, len(levels), each):
        parts = [_Part.of(level, encoded[level], order) for level in levels[start : start + each]]
        stack = weight.T[order].repeat(1, len(parts)).contiguous()
        rows = len(weight)

        def step(
            j: int,
            column: Tensor,
            pivot: float,
            gap: Tensor,
            parts: Sequence[_Part] = parts,
            rows: int = rows,
        ) -> None:
            for number, part in enumerate(parts):
                part.round(j, *(t[number * rows : (number + 1) * rows] for t in (column, gap)))
            gap.mul_(1.0 / pivot)

        sweep(stack, factor, step)
        back = torch.argsort(order)
        for part, codes in zip(parts, stack[back].split(rows, 1), strict=True):
            solved[part.level] = part.blocks(codes.T, encoded[part.level])
    return solved


@dataclass(frozen=True)
class _Part:
    """One level's grid on the way of a sweep.

    Args:
        scales, offsets: (sub-blocks of a row, out).
        index: (in,), the sub-block of every column, in the order of the sweep.
        values, middles: what codes stand for, and where they meet; None for themselves.
    """

    level: GgufType
    scales: Tensor
    offsets: Tensor
    index: list[int]
    values: Tensor | None
    middles: Tensor | None

    @classmethod
    def of(cls, level: GgufType, encoded: Array, order: Tensor) -> _Part:
        layout = LAYOUTS[level.name]
        rows, width = len(encoded), len(order)
        grids = layout.grid(as_blocks(level, encoded))
        scales, offsets = (torch.from_numpy(g).view(rows, -1).T.contiguous() for g in grids)
        index = (torch.arange(width) // (width // len(scales)))[order].tolist()
        if layout.values is None:
            return cls(level, scales, offsets, index, None, None)
        values = torch.tensor(layout.values, dtype=torch.float32)
        return cls(level, scales, offsets, index, values, (values[1:] + values[:-1]) / 2)

    def round(self, j: int, column: Tensor, gap: Tensor) -> None:
        """A column's weights become codes; the gap is what they stand for less the weights."""
        layout = LAYOUTS[self.level.name]
        scale, offset = self.scales[self.index[j]], self.offsets[self.index[j]]
        # A scale of 0 leaves nothing to choose: any code stands for the offset.
        code = torch.where(scale == 0, 0.0, (column - offset) / scale)
        if self.values is None or self.middles is None:
            value = code.round_().clamp_(layout.low, layout.high)
            code = value
        else:
            found = torch.bucketize(code, self.middles)
            value, code = self.values[found], found.float()
        torch.addcmul(offset, scale, value, out=gap).sub_(column)
        column.copy_(code)

    def blocks(self, codes: Tensor, encoded: Array) -> Array:
        """Solved codes, (out, in), in blocks: (out, bytes of a row)."""
        length = BLOCKS[self.level.name][0]
        single = codes.to(torch.uint8).contiguous().numpy().reshape(-1, length)
        whole = LAYOUTS[self.level.name].with_codes(as_blocks(self.level, encoded), single)
        return whole.reshape(encoded.shape)
