"""Runtimes: what each can load becomes the legal space, and what it cannot is refused by name."""

from __future__ import annotations

import pytest
from runs import command
from toys import SMOLLM2

from autocompress.core import Allocation, Layer
from autocompress.errors import SpaceError
from autocompress.levels import Dense, Quantize, parse_level
from autocompress.runtimes import PARTS, RUNTIMES, find_runtime
from autocompress.runtimes.rules import (
    check_allocation,
    check_levels,
    legal_space,
    runtime_space,
)
from autocompress.spaces import SpaceConfig

LAYERS = tuple(
    Layer(f"model.layers.{i}.{name}", (f"model.layers.{i}.{name}",), (shape,))
    for i in range(2)
    for name, shape in SMOLLM2.items()
)
EXPERTS = tuple(
    Layer(name, (name,), ((64, 128),))
    for expert in range(3)
    for kind in ("gate_proj", "up_proj", "down_proj")
    for name in [f"model.layers.0.mlp.experts.unfused.{expert}.{kind}"]
)


def space_of(name, *levels, layers=LAYERS, pins=()):
    config = SpaceConfig("mine", tuple(map(parse_level, levels)))
    return legal_space(find_runtime(name), config, layers, {}, pins)


@pytest.fixture(params=RUNTIMES)
def runtime(request):
    return RUNTIMES[request.param]


def test_every_runtime_answers_for_every_level_and_part(runtime):
    assert runtime.summary and runtime.format and runtime.scale_bits in (8, 11)
    assert runtime.refuses(Dense(), (256, 256), "blocks") is None
    for part in PARTS:
        for level in (*runtime.levels, parse_level("s50"), parse_level("r8+w4g64sym")):
            reason = runtime.refuses(level, (256, 256), part)
            assert reason is None or reason.strip()
            assert runtime.extra_bytes("model.layers.0.q_proj", level, (256, 256)) >= 0


def test_the_own_levels_of_a_runtime_are_legal_where_widths_are_friendly(runtime):
    layers = (
        Layer("model.layers.0.mlp.down_proj", ("model.layers.0.mlp.down_proj",), ((256, 512),)),
    )
    space, notes = legal_space(runtime, runtime_space(runtime), layers, {})
    assert space.levels == (runtime.levels,)
    assert notes == []


def test_levels_that_a_shape_cannot_take_are_left_out_and_named():
    space, notes = space_of("ct-vllm-cpu", "w4g64sym", "w4g128sym", "w8sym", "dense")
    by_name = {
        layer.name: set(map(str, row))
        for layer, row in zip(space.layers, space.levels, strict=True)
    }
    assert by_name["model.layers.0.mlp.down_proj"] == {"w4g64sym", "w4g128sym", "w8sym", "dense"}
    assert by_name["model.layers.0.self_attn.o_proj"] == {"w4g64sym", "w8sym", "dense"}
    assert notes == [
        "w4g128sym is left out of 6 of 8 layers for ct-vllm-cpu: 576 inputs must be a multiple of "
        "the group size, 128"
    ]


def test_what_a_runtime_fuses_is_one_layer():
    space, _ = space_of("ct-vllm-cuda", "w4g64sym", "dense")
    assert [layer.name for layer in space.layers[:4]] == [
        "model.layers.0.self_attn.q_proj+k_proj+v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj+up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert len(space_of("ct-transformers", "w4g64sym")[0].layers) == len(LAYERS)


def test_all_experts_are_one_layer():
    space, notes = space_of("ct-vllm-cuda", "w4g64sym", "dense", layers=EXPERTS)
    assert [layer.name for layer in space.layers] == ["experts"]
    assert len(space.layers[0].modules) == 9
    assert space.levels == ((Quantize(4, 64, True),),)
    assert "experts must be quantized" in notes[0]
    space, notes = space_of("ct-transformers", "w4g64sym", "dense", layers=EXPERTS)
    assert len(space.layers) == 1 and len(space.levels[0]) == 2 and not notes


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [
        ("ct-universal", "w3g64sym", "bits must be one of 4, 8"),
        ("ct-universal", "w4g16sym", "groups must be one of 32, 64, 128, one per row"),
        ("ct-transformers", "w4g64", "codes must be symmetric"),
        ("ct-transformers", "w4g56sym", "128 inputs must be a multiple of the group size, 56"),
        ("ct-vllm-cpu", "w8g64sym", r"8 bits must be one group per row \('w8sym'\)"),
        ("ct-vllm-cpu", "2:4", "symmetric codes or dense weights only"),
    ],
)
def test_what_a_rule_forbids_is_refused_with_layer_and_rule(name, level, message):
    layer = Layer("model.layers.0.o_proj", ("model.layers.0.o_proj",), ((128, 128),))
    with pytest.raises(SpaceError, match=rf"'model\.layers\.0\.o_proj' .*{message}"):
        space_of(name, level, layers=(layer,))
    with pytest.raises(SpaceError, match=message):
        check_levels(
            find_runtime(name), {layer.name: parse_level(level)}, {layer.name: (128, 128)}, {}
        )


def test_parts_that_stay_dense():
    w4, shape = Quantize(4, 64, True), (512, 128)
    assert find_runtime("ct-transformers").refuses(w4, shape, "head") is None
    assert "heads stay dense" in str(find_runtime("ct-universal").refuses(w4, shape, "head"))
    for runtime in RUNTIMES.values():
        if runtime.format == "compressed-tensors":
            assert "stay dense" in str(runtime.refuses(w4, shape, "embedding"))
            assert "Conv1D" in str(runtime.refuses(w4, shape, "conv1d"))


def test_fused_modules_at_two_levels_are_refused_by_name():
    space, _ = space_of("ct-transformers", "w4g64sym", "w8g64sym")
    mixed = space.uniform(parse_level("w4g64sym")).swap(2, parse_level("w8g64sym"))
    check_allocation(find_runtime("ct-transformers"), space, mixed, {})
    with pytest.raises(SpaceError, match=r"q_proj' and '.*v_proj' must share one level"):
        check_allocation(find_runtime("ct-vllm-cuda"), space, mixed, {})


def test_a_pin_that_a_runtime_cannot_load_is_refused():
    with pytest.raises(SpaceError, match=r"layers\.0\.mlp\.down_proj' .* Got w3g64sym: bits"):
        space_of("ct-universal", "dense", pins=[("*.0.mlp.down_proj", parse_level("w3g64sym"))])


def test_an_unknown_runtime_is_named_with_the_nearest():
    with pytest.raises(SpaceError, match=r"Got 'ct-univers'\. Did you mean 'ct-universal'"):
        find_runtime("ct-univers")
    ran = command("search", "--budget", "4bits", "--runtime", "vlm", "--out", "nowhere")
    assert ran.code == 2 and "a runtime must be one of" in ran.err


def test_runtimes_are_listed():
    assert [row["name"] for row in command("runtimes", "--json").json()] == list(RUNTIMES)
    assert "ct-vllm-cpu" in command("runtimes").out


def test_an_allocation_of_another_length_is_no_ones():
    space, _ = space_of("ct-transformers", "w4g64sym")
    with pytest.raises(ValueError, match="zip"):
        check_allocation(find_runtime("ct-transformers"), space, Allocation(()), {})
