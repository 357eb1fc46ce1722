"""llama.cpp's mixes as allocations: which types, which of them fits, and where there is none."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from toys import SMOLLM2, toy_problem, toy_space

from autocompress.core import Budget, Layer
from autocompress.gguf_mixes import BASE, largest_mix, mix_allocation

TYPES = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"),
    *("IQ4_NL", "Q4_0", "Q5_0", "Q5_1"),
)
BLOCKS = 16
CONFIG = SimpleNamespace(num_hidden_layers=BLOCKS, num_attention_heads=8, num_key_value_heads=2)
SPACE = toy_space(BLOCKS, TYPES, shapes=dict.fromkeys(SMOLLM2, (512, 512)))


def types_of(space, mix):
    allocation = mix_allocation(space, mix, CONFIG)
    named = zip(space.layers, allocation.levels, strict=True)
    return {layer.name.removeprefix("model.layers."): str(level) for layer, level in named}


def test_a_mix_favours_values_outputs_and_the_first_blocks():
    found = types_of(SPACE, "Q3_K_M")
    assert [found[f"{block}.self_attn.v_proj"] for block in (0, 1, 2)] == ["Q5_K", "Q5_K", "Q4_K"]
    assert [found[f"{block}.mlp.down_proj"] for block in (0, 1)] == ["Q5_K", "Q4_K"]
    assert found["3.self_attn.o_proj"] == "Q4_K" and found["3.mlp.up_proj"] == "Q3_K"


def test_widths_that_256_does_not_divide_take_other_types():
    narrow = toy_space(BLOCKS, TYPES, shapes=SMOLLM2)  # 576 inputs, 1,536 of down_proj
    found = types_of(narrow, "Q4_K_M")
    assert found["3.mlp.up_proj"] == "Q5_0" and found["3.mlp.down_proj"] in ("Q4_K", "Q6_K")
    assert types_of(narrow, "Q2_K")["3.self_attn.q_proj"] == "Q4_0"


def test_a_type_that_one_of_its_size_has_replaced_is_replaced_in_the_mix():
    types = [name for name in TYPES if name not in ("Q4_0", "Q4_K")]  # all of 4.5 bits
    found = types_of(toy_space(BLOCKS, types, shapes=SMOLLM2), "Q2_K")
    assert found["3.self_attn.q_proj"] == "IQ4_NL"


@pytest.mark.parametrize("bits", [2.0, 3.4, 4.6, 9.0])
def test_the_largest_that_fits(bits):
    problem = toy_problem(SPACE, [Budget("bits", int(bits * SPACE.weights), "x")])
    table = problem.table("bits")
    sizes = {mix: table.total(mix_allocation(SPACE, mix, CONFIG)) for mix in BASE}
    fitting = {mix: size for mix, size in sizes.items() if size <= bits * SPACE.weights}
    found = largest_mix(problem, CONFIG)
    if not fitting:
        assert bits == 2.0 and found is None
        return
    allocation, name = found
    assert sizes[name] == max(fitting.values()) == table.total(allocation)


def test_no_mix_where_a_layer_may_not_take_its_type_or_no_rule_knows_it():
    assert mix_allocation(toy_space(BLOCKS, TYPES[:2]), "Q4_K_M", CONFIG) is None
    assert mix_allocation(toy_space(BLOCKS), "Q2_K", CONFIG) is None
    other = Layer("model.layers.0.mlp.gate", ("model.layers.0.mlp.gate",), ((512, 512),))
    unknown = replace(SPACE, layers=(*SPACE.layers, other), levels=(*SPACE.levels, SPACE.levels[0]))
    assert mix_allocation(unknown, "Q2_K", CONFIG) is None
    elsewhere = Layer("h.0.attn.q_proj", ("h.0.attn.q_proj",), ((512, 512),))
    other_names = replace(SPACE, layers=(elsewhere,), levels=SPACE.levels[:1])
    assert mix_allocation(other_names, "Q2_K", CONFIG) is None
    assert mix_allocation(SPACE, "Q2_K", SimpleNamespace(n_layer=BLOCKS)) is None
    assert largest_mix(toy_problem(toy_space(2), []), CONFIG) is None
