"""Modules that read one input compute in one call, and nobody can tell but by the time it takes."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress.backends import BACKENDS
from autocompress.levels import parse_level
from autocompress.packed import Packed
from autocompress.packing import pack_modules
from autocompress.runtime import PackedLinear, configure, prepare

KERNELS = BACKENDS["native"].supports(parse_level("w4g64"), (64, 64), "a8")
pytestmark = pytest.mark.skipif(KERNELS is not None, reason=str(KERNELS))
ROWS = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
TOKENS = torch.arange(2 * 20).view(2, 20) * 7 % 512


def randomize(model: nn.Module) -> None:
    """Random packed weights: those of `pack_modules` are zeros."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.codes is not None:
            module.codes.random_(256, generator=generator)
            module.scales.copy_(torch.rand(module.scales.shape, generator=generator) * 0.1)


def packed_llama(level: str = "w4g32sym", **settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **settings)).eval()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    pack_modules(model, {name: parse_level(level) for name in names}, torch.float32)
    randomize(model)
    return model


@pytest.fixture
def model() -> Any:
    made = packed_llama()
    prepare(made)
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many weights each call of the kernels multiplied."""
    from autocompress.backends import native

    seen: list[int] = []
    together, alone = native.NativeTogether.__call__, native.NativeOp.__call__

    def several(self: Any, x: Tensor, biases: Any) -> list[Tensor]:
        seen.append(len(biases))
        return together(self, x, biases)

    def one(self: Any, *arguments: Any) -> Tensor:
        seen.append(1)
        return alone(self, *arguments)

    monkeypatch.setattr(native.NativeTogether, "__call__", several)
    monkeypatch.setattr(native.NativeOp, "__call__", one)
    yield seen


def separate(model: Any) -> Any:
    """The same model, every module on its own."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, PackedLinear) and module.fused is not None:
            module.fused.dissolve()
    return other


def attention(model: Any) -> Any:
    return model.model.layers[0].self_attn


def inputs(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, 64, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
@pytest.mark.parametrize("activations", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_separate_calls(
    activations: str, kind: torch.dtype, calls: Any
) -> None:
    model = packed_llama(attention_bias=True).to(kind)
    prepare(model, activations)
    other = separate(model)
    for tokens in (TOKENS, TOKENS[:1, :1]):
        calls.clear()
        found = model(input_ids=tokens).logits
        assert calls == [3, 1, 2, 1] * 2, "q, k and v; o; gate and up; down"
        calls.clear()
        assert torch.equal(found, other(input_ids=tokens).logits)
        assert calls == [1] * 14


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modules_may_be_called_in_any_way(model: Any, mode: Any) -> None:
    ours, alone = attention(model), attention(separate(model))

    def check(name: str, x: Tensor) -> None:
        assert torch.equal(getattr(ours, name)(x), getattr(alone, name)(x))

    with mode():
        x, y = inputs(1, 2, 3), inputs(2, 2, 3)
        for order in ("qkv", "vkq", "kq", "qq", "qvvk", "q"):
            for letter in order:
                check(f"{letter}_proj", x)
        check("q_proj", x)
        check("k_proj", y)  # another input
        check("v_proj", x)  # that of q, later
        check("q_proj", x)
        x += 1  # the same tensor, changed in place
        check("k_proj", x)
        check("q_proj", x)
        check("k_proj", x[:1])
        check("v_proj", x.transpose(0, 1))
        check("q_proj", x.transpose(0, 1))
        check("q_proj", x)
        x.resize_(3, 2, 64)
        check("k_proj", x)
        check("q_proj", x[..., 0:0, :])
        check("q_proj", x.half())


def test_each_output_is_given_once(model: Any) -> None:
    """Who gets one may write into it."""
    x = inputs(1, 3)
    module = attention(model)
    module.q_proj(x)
    first = module.k_proj(x)
    wanted = first.clone()
    first.zero_()
    assert torch.equal(module.k_proj(x), wanted)


def test_nothing_is_kept_longer_than_needed(model: Any) -> None:
    from autocompress.fusion import _slot

    x, module = inputs(1, 3), attention(model)
    for name in ROWS:
        getattr(module, name)(x)
    assert _slot.held is None, "all of it was taken"
    module.q_proj(x)
    assert _slot.held is not None
    held = [weakref.ref(tensor) for tensor in _slot.held.values()]
    assert len(held) == 3
    del x
    gc.collect()
    assert all(one() is None for one in held), "its input is gone"


def test_threads_do_not_see_each_other(model: Any) -> None:
    module, other = attention(model), attention(separate(model))
    xs = [inputs(seed, 2) for seed in range(4)]
    wanted = [[getattr(other, name)(x) for name in ROWS] for x in xs]
    wrong: list[int] = []
    start = threading.Barrier(len(xs))

    def work(i: int) -> None:
        start.wait()
        for _ in range(200):
            found = [getattr(module, name)(xs[i]) for name in ROWS]
            if not all(map(torch.equal, found, wanted[i])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_levels_may_differ_and_backends_may_not(calls: Any) -> None:
    model = packed_llama()
    name = "model.layers.0.self_attn.k_proj"
    pack_modules_again(model, name, "w8g64")
    pack_modules_again(model, name.replace(".0.", ".1."), "w4g8")  # the kernels have no such groups
    randomize(model)
    with pytest.warns(UserWarning, match="1 of 14 packed layers run on"):
        prepare(model)
    calls.clear()
    model(input_ids=TOKENS)
    assert calls == [3, 1, 2, 1, 2, 1, 2, 1]


def pack_modules_again(model: Any, name: str, level: str) -> None:
    """Another level for one module."""
    old = model.get_submodule(name)
    parent, _, child = name.rpartition(".")
    new = PackedLinear(parse_level(level), old.shape, torch.float32, None)
    setattr(model.get_submodule(parent), child, new)


def test_the_model_says_what_reads_one_input(calls: Any) -> None:
    """GPT-NeoX' attention and its feed-forward read different norms, Phi's the same one."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 512}
    model = PhiForCausalLM(PhiConfig(**sizes, num_attention_heads=4)).eval()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    pack_modules(model, {name: parse_level("w4g32") for name in names}, torch.float32)
    randomize(model)
    with torch.inference_mode():
        prepare(model)
        calls.clear()
        found = model(input_ids=TOKENS).logits
        assert calls == [4, 1, 1], "q, k, v and fc1 in one; dense; fc2"
        assert torch.equal(found, separate(model)(input_ids=TOKENS).logits)


def test_other_choices_take_fused_modules_apart(model: Any, calls: Any) -> None:
    attention(model).k_proj.release()
    x = inputs(1, 3)
    attention(model).q_proj(x)
    assert calls == [1]
    configure(model, "float32")
    prepare(model)
    calls.clear()
    model(input_ids=TOKENS)
    assert calls == [3, 1, 2, 1] * 2
    prepare(model, backend="dequantize")
    calls.clear()
    model(input_ids=TOKENS)
    assert calls == []


def test_files_do_not_know(model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in packed_llama().state_dict().items()}
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_copy_computes_with_its_own_weights(model: Any) -> None:
    other = copy.deepcopy(model)
    wanted = model(input_ids=TOKENS).logits
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.op.packed.tensors["values"].zero_()
    assert torch.equal(other(input_ids=TOKENS).logits, wanted)


def test_a_compiled_model_computes_alone(model: Any) -> None:
    """Fusing cannot be compiled; what comes out is the same."""
    block = model.model.layers[0].mlp
    x = inputs(1, 1, 3)
    with torch.inference_mode():
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True)
        torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_backends_compute_together_what_they_compute_alone(backend: Any) -> None:
    level, shapes = parse_level("w4g64"), [(32, 128), (48, 128)]
    if backend.supports(level, shapes[0], "a8") is not None:
        pytest.skip(backend.supports(level, shapes[0], "a8"))
    ops = [backend.prepare(random_weight(level, shape), torch.float32, "a8") for shape in shapes]
    together = backend.together(ops)
    if together is None:
        return
    x, biases = torch.randn(3, 128), [None, torch.randn(48)]
    assert together.fits(x)
    for y, op, bias in zip(together(x, biases), ops, biases, strict=True):
        assert torch.equal(y, op(x, bias))
    assert together.same(x, x.clone())
    assert not together.same(x, x + 1)
    assert not together.same(x, x[:2])


def random_weight(level: Any, shape: tuple[int, int]) -> Packed:
    from autocompress.latency_cases import random_packed

    return random_packed(level, shape)
