"""Shared prefixes: a forward pass starts at the first block that changed since the last one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.levels import Level
from autocompress.models import find_blocks
from autocompress.stitch import StitchedModel

MEMORY = 1 << 30  # bytes of hidden states kept

Part = tuple[Level | None, ...]  # levels of the layers in one block, or of those before all blocks


class PrefixModel:
    """A stitched model whose passes skip the blocks that the last pass over the same tokens ran.

    Blocks before the first one with another level than then see what they saw and return what
    they returned. Outputs are those of the whole model, bit by bit, for any model whose blocks
    read nothing but the hidden states of the block before; others run whole.

    Args:
        stitched: its allocation may change between passes.
        memory: bytes of block outputs kept; the tokens that were not seen longest are forgotten.

    Attributes:
        blocks_run: since the start, skipped ones not counted.
        shares: whether blocks are skipped at all.
    """

    def __init__(self, stitched: StitchedModel, memory: int = MEMORY) -> None:
        self.model, self.memory, self.blocks_run = stitched.model, memory, 0
        prefix, self._blocks = find_blocks(self.model)
        self._stitched = stitched
        self._members = _members(stitched, prefix, len(self._blocks))
        self._kept: OrderedDict[bytes, tuple[list[Part], list[Any]]] = OrderedDict()
        self.shares = self._is_exact()

    def get_output_embeddings(self) -> Any:
        """The head."""
        return self.model.get_output_embeddings()

    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """Output of the model on (windows, window) tokens; no cache is made."""
        if not self.shares:
            self.blocks_run += len(self._blocks)
            return self.model(input_ids=input_ids, use_cache=False)
        return self._run(input_ids)

    def _run(self, input_ids: Tensor) -> Any:
        key, parts = _key(input_ids), self._parts()
        before, outputs = self._kept.pop(key, ([], []))
        first = _agreement(before, parts)
        outputs = outputs[:first]
        with _skipping(self._blocks, outputs):
            result = self.model(input_ids=input_ids, use_cache=False)
        self.blocks_run += len(self._blocks) - first
        self._kept[key] = parts, outputs
        while sum(map(_bytes, self._kept.values())) > self.memory:
            self._kept.popitem(last=False)
        return result

    def _parts(self) -> list[Part]:
        """Levels before the blocks, then of every block."""
        current = self._stitched.current
        return [tuple(current[name] for name in names) for names in self._members]

    @torch.inference_mode()
    def _is_exact(self) -> bool:
        """Whether skipping half of the blocks changes no logit, with other tokens in between."""
        tokens = torch.arange(8).view(1, 8) % self.model.config.get_text_config().vocab_size
        whole, middle = self._run(tokens).logits, len(self._blocks) // 2
        self._run(tokens.flip(1))
        parts, outputs = self._kept[_key(tokens)]
        self._kept[_key(tokens)] = parts[: middle + 1], outputs[:middle]
        try:
            return torch.equal(self._run(tokens).logits, whole)
        except Exception:  # a block that misses what a skipped one leaves behind may raise anything
            return False
        finally:
            self._kept.clear()
            self.blocks_run = 0


def _key(tokens: Tensor) -> bytes:
    return tokens.contiguous().numpy().tobytes()


def _members(stitched: StitchedModel, prefix: str, count: int) -> list[list[str]]:
    """Modules in scope that a pass reads before the blocks, then those of every block.

    What is neither, such as a head, is read behind them and changes nothing before.
    """
    names = list(stitched.current)
    embedding = stitched.model.get_input_embeddings()
    first = [name for name in names if stitched.model.get_submodule(name) is embedding]
    blocks = [[n for n in names if n.startswith(f"{prefix}.{i}.")] for i in range(count)]
    return [first, *blocks]


def _agreement(before: list[Part], parts: list[Part]) -> int:
    """Blocks at the start that both ran with the same levels."""
    same = 0
    for one, other in zip(before, parts, strict=False):
        if one != other:
            break
        same += 1
    return max(0, same - 1)  # the first entry is what comes before the blocks


@contextmanager
def _skipping(blocks: nn.ModuleList, outputs: list[Any]) -> Iterator[None]:
    """As many blocks as there are `outputs` return them; those of the others are appended."""
    skipped = list(blocks)[: len(outputs)]
    for block, output in zip(skipped, list(outputs), strict=True):
        block.forward = lambda *args, _output=output, **kwargs: _output
    handles = [
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
        for block in list(blocks)[len(outputs) :]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in skipped:
            del block.forward


def _bytes(kept: tuple[list[Part], list[Any]]) -> int:
    tensors = [output if isinstance(output, Tensor) else output[0] for output in kept[1]]
    return sum(tensor.nbytes for tensor in tensors)
