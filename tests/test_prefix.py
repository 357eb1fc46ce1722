"""What a pass shares with the one before is not computed again, and nothing else changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_models import ARCHITECTURES, make_model

from autocompress.core import Allocation
from autocompress.levels import Dense, parse_level
from autocompress.models import find_blocks, find_layers, set_weight, weight_of
from autocompress.prefix import PrefixModel
from autocompress.quality import score, teacher

W2, W6 = parse_level("w2g64"), parse_level("w6g64")


@pytest.fixture
def base(tiny_space):
    return tiny_space.uniform(W6)


def changed(base: Allocation, name: str, space: Any) -> Allocation:
    """The base with one layer at 2 bits."""
    return base.swap([layer.name for layer in space.layers].index(name), W2)


def test_equals_whole_passes_and_runs_fewer_blocks(stitched, tiny_space, tiny_windows, base):
    reference = teacher(stitched.restore(), tiny_windows.search[:5])
    names = ["model.layers.2.mlp.down_proj", "model.layers.1.mlp.up_proj", "model.embed_tokens"]
    allocations = [base, *(changed(base, name, tiny_space) for name in names), base]
    whole = [score(stitched.stitch(it), reference) for it in allocations]
    model = PrefixModel(stitched)
    assert model.shares
    counts, blocks = [], len(find_blocks(stitched.model)[1])
    for allocation, expected in zip(allocations, whole, strict=True):
        before = model.blocks_run
        stitched.stitch(allocation)
        assert score(model, reference) == expected
        counts.append((model.blocks_run - before) // 2)  # five windows are two batches
    # Of the base nothing is forgotten: it is not run again.
    assert counts == [blocks, blocks - 2, blocks - 1, blocks, 0]


def test_nothing_is_run_twice_for_a_change_behind_the_blocks(stitched, tiny_windows, base):
    model, tokens = PrefixModel(stitched), torch.from_numpy(tiny_windows.search[:2])
    stitched.stitch(base)
    with torch.inference_mode():
        first = model(tokens).logits
        before = model.blocks_run
        assert torch.equal(model(tokens).logits, first) and model.blocks_run == before


def test_memory_is_limited_and_old_tokens_go_first(stitched, tiny_windows, base):
    a, b, c = (torch.from_numpy(tiny_windows.search[i : i + 1]) for i in range(3))
    blocks, width = find_blocks(stitched.model)[1], stitched.model.config.hidden_size
    room = 2 * len(blocks) * a.numel() * width * 4
    model = PrefixModel(stitched, memory=room)
    stitched.stitch(base)
    with torch.inference_mode():
        for tokens in (a, b, a, c):  # b was not seen longest
            model(tokens)
        seen = model.blocks_run
        model(a), model(c)
        assert model.blocks_run == seen
        model(b)
        assert model.blocks_run == seen + len(blocks)
        assert sum(output.nbytes for output in model._kept.values()) == model._bytes <= room


def test_the_last_blocks_of_a_pass_are_forgotten_first(stitched, tiny_windows, base):
    a, b = (torch.from_numpy(tiny_windows.search[i : i + 1]) for i in range(2))
    blocks, width = len(find_blocks(stitched.model)[1]), stitched.model.config.hidden_size
    model = PrefixModel(stitched, memory=(blocks + 1) * a.numel() * width * 4)
    stitched.stitch(base)
    with torch.inference_mode():
        model(a), model(b)
        seen = model.blocks_run
        model(a)
        assert model.blocks_run == seen + blocks - 1


def test_no_more_is_kept_than_was_asked_for(stitched, tiny_space, tiny_windows, base):
    model, tokens = PrefixModel(stitched), torch.from_numpy(tiny_windows.search[:2])
    model.keep = model.agreement(base, changed(base, "model.layers.1.mlp.up_proj", tiny_space))
    assert model.keep == 1
    stitched.stitch(base)
    with torch.inference_mode():
        first, seen = model(tokens).logits, model.blocks_run
        assert len(model._kept) == 1
        assert torch.equal(model(tokens).logits, first)
        assert model.blocks_run == seen + len(find_blocks(stitched.model)[1]) - 1


def test_agreement_is_what_passes_share(stitched, tiny_space, base):
    model, blocks = PrefixModel(stitched), len(find_blocks(stitched.model)[1])
    places = {"model.embed_tokens": 0, "model.layers.0.mlp.up_proj": 0}
    places |= {f"model.layers.{blocks - 1}.self_attn.q_proj": blocks - 1}
    for name, shared in places.items():
        assert model.agreement(base, changed(base, name, tiny_space)) == shared
    assert model.agreement(base, base) == blocks


def test_a_weight_between_levels_shares_nothing_behind_it(stitched, tiny_windows, base):
    model, tokens = PrefixModel(stitched), torch.from_numpy(tiny_windows.search[:2])
    with torch.inference_mode():
        for share in (0.25, 0.75):
            whole = stitched.blend(base, share)(input_ids=tokens, use_cache=False).logits
            assert torch.equal(model(tokens).logits, whole)


def test_the_model_is_left_as_it_was(stitched, tiny_windows, base):
    model, tokens = PrefixModel(stitched), torch.from_numpy(tiny_windows.search[:2])
    stitched.stitch(base)
    model(tokens), model(tokens)
    for block in find_blocks(stitched.model)[1]:
        assert "forward" not in vars(block) and not block._forward_hooks


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_shares(name: str) -> None:
    made = make_model(name).eval()
    layer = find_layers(made)[-1].name  # in the last block
    stitched = SimpleNamespace(model=made, current={layer: Dense()})
    model, tokens = PrefixModel(stitched), torch.arange(10).view(2, 5)
    blocks = len(find_blocks(made)[1])
    assert model.shares
    with torch.inference_mode():
        model(tokens)
        module = made.get_submodule(layer)
        set_weight(module, weight_of(module) * 1.5)
        stitched.current[layer] = W2
        assert torch.equal(model(tokens).logits, made(tokens, use_cache=False).logits)
    assert model.blocks_run == blocks + 1


@pytest.mark.parametrize("once", [False, True])
def test_a_model_whose_blocks_read_more_runs_whole(once: bool) -> None:
    made = make_model("llama").eval()
    first, last = (find_blocks(made)[1][i].mlp for i in (0, -1))
    left: dict[str, torch.Tensor] = {}  # such as keys and values that later blocks share
    first.register_forward_hook(lambda module, args, output: left.update(kept=output * 2))
    read = left.pop if once else left.__getitem__
    last.register_forward_hook(lambda module, args, output: output + read("kept"))
    stitched: Any = SimpleNamespace(model=made, current={})
    model, tokens = PrefixModel(stitched), torch.arange(10).view(2, 5)
    assert not model.shares
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, made(tokens, use_cache=False).logits)
