"""Shared prefixes: a forward pass starts at the first block whose input is not known.

Passes over the same tokens form a trie: a node is what the blocks up to one of them returned, and
its path is the levels of all layers up to there. Two candidates that agree up to a block share its
node.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.core import Allocation
from autocompress.levels import Level
from autocompress.models import find_blocks
from autocompress.stitch import StitchedModel

MEMORY = 1 << 30  # bytes of hidden states kept

Part = tuple[Level | None, ...]  # levels of the layers in one block, or of those before all blocks


class PrefixModel:
    """A stitched model whose passes skip the blocks that earlier passes ran with the same levels.

    Outputs are those of the whole model, bit by bit, for any model whose blocks read nothing but
    the hidden states of the block before; others run whole.

    Args:
        stitched: its allocation may change between passes.
        memory: bytes of block outputs kept; those that were not used longest are forgotten, the
            last blocks of a pass before its first.

    Attributes:
        keep: blocks from the first whose outputs the next passes leave behind; None is all.
        blocks_run: since the start, skipped ones not counted.
        shares: whether blocks are skipped at all.
    """

    def __init__(self, stitched: StitchedModel, memory: int = MEMORY) -> None:
        self.model, self.memory, self.blocks_run = stitched.model, memory, 0
        self.keep: int | None = None
        prefix, self._blocks = find_blocks(self.model)
        self.stitched = stitched
        self._members = _members(stitched, prefix, len(self._blocks))
        self._kept: OrderedDict[bytes, Any] = OrderedDict()  # node -> output of its block
        self._bytes = 0
        self.shares = self._is_exact()

    @property
    def forward(self) -> Any:
        """The model's, which takes the options of a pass."""
        return self.model.forward

    def get_output_embeddings(self) -> Any:
        """The head."""
        return self.model.get_output_embeddings()

    def agreement(self, one: Allocation, other: Allocation) -> int:
        """Blocks at the start that are the same, with all that comes before them."""
        layers = self.stitched.space.layers
        differing = {
            name
            for layer, a, b in zip(layers, one.levels, other.levels, strict=True)
            if a != b
            for name in layer.modules
        }
        for place, names in enumerate(self._members):
            if not differing.isdisjoint(names):
                return max(0, place - 1)  # the first entry is what comes before the blocks
        return len(self._blocks)

    def __call__(self, input_ids: Tensor, use_cache: bool = False, **options: Any) -> Any:
        """Output of the model on (windows, window) tokens; no cache is made.

        Args:
            options: of the model's forward that are read behind its blocks.
        """
        if not self.shares:
            self.blocks_run += len(self._blocks)
            return self.model(input_ids=input_ids, use_cache=False, **options)
        return self._run(input_ids, self.keep, options)

    def forget(self) -> None:
        """Free all hidden states."""
        self._kept.clear()
        self._bytes = 0

    def _run(self, input_ids: Tensor, keep: int | None, options: dict[str, Any]) -> Any:
        path = self._path(input_ids)
        known = [node for node in path if node in self._kept]
        first = path.index(known[-1]) + 1 if known else 0
        made: list[Any] = []
        skipped = self._kept[known[-1]] if known else None
        with _skipping(self._blocks, first, skipped, keep, made):
            result = self.model(input_ids=input_ids, use_cache=False, **options)
        self.blocks_run += len(self._blocks) - first
        self._keep(zip(path[first:], made, strict=False))
        for node in reversed(known):
            if node in self._kept:
                self._kept.move_to_end(node)
        return result

    def _keep(self, made: Iterator[tuple[bytes, Any]]) -> None:
        """Remember nodes of one pass, and forget what there is no room for."""
        for node, output in reversed(list(made)):
            self._kept[node] = output
            self._bytes += _bytes(output)
        while self._bytes > self.memory:
            self._bytes -= _bytes(self._kept.popitem(last=False)[1])

    def _path(self, tokens: Tensor) -> list[bytes]:
        """The node of every block; fewer where a weight is no level's."""
        nodes, node = [], hashlib.sha256(tokens.contiguous().numpy().tobytes())
        node.update(repr(tuple(tokens.shape)).encode())
        current = self.stitched.current
        for names in self._members:
            part = [current[name] for name in names]
            if None in part:
                break
            node.update("|".join(map(str, part)).encode() + b"\n")
            nodes.append(node.digest())
        return nodes[1:]  # the first entry is what comes before the blocks

    @torch.inference_mode()
    def _is_exact(self) -> bool:
        """Whether skipping half of the blocks changes no logit, with other tokens in between."""
        tokens = torch.arange(8).view(1, 8) % self.model.config.get_text_config().vocab_size
        whole = self._run(tokens, len(self._blocks) // 2, {}).logits
        self._run(tokens.flip(1), None, {})
        try:
            return torch.equal(self._run(tokens, None, {}).logits, whole)
        except Exception:  # a block that misses what a skipped one leaves behind may raise anything
            return False
        finally:
            self.forget()
            self.blocks_run = 0


def _members(stitched: StitchedModel, prefix: str, count: int) -> list[list[str]]:
    """Modules in scope that a pass reads before the blocks, then those of every block.

    What is neither, such as a head, is read behind them and changes nothing before.
    """
    names = list(stitched.current)
    embedding = stitched.model.get_input_embeddings()
    first = [name for name in names if stitched.model.get_submodule(name) is embedding]
    blocks = [[n for n in names if n.startswith(f"{prefix}.{i}.")] for i in range(count)]
    return [first, *blocks]


@contextmanager
def _skipping(
    blocks: nn.ModuleList, first: int, output: Any, keep: int | None, made: list[Any]
) -> Iterator[None]:
    """The blocks before the `first` return `output`; those of the others before `keep` are `made`.

    Only the last of the skipped ones is read, by the first that runs.
    """
    skipped: Sequence[nn.Module] = list(blocks)[:first]
    for block in skipped:
        block.forward = lambda *args, **kwargs: output
    handles = [
        block.register_forward_hook(lambda module, args, output: made.append(output))
        for block in list(blocks)[first:keep]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in skipped:
            del block.forward


def _bytes(output: Any) -> int:
    return int((output if isinstance(output, Tensor) else output[0]).nbytes)
