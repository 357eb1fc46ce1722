"""Levels that a search is not offered, because another level of the layer is as good for less."""

import json
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from runs import TOKENS, command, write_config
from toys import toy_space

from autocompress.core import CostTable
from autocompress.cost import size_tables
from autocompress.domination import find_dominated
from autocompress.latency import restrict
from autocompress.levels import Joint

KEYS = ("w2g64", "s50+w3g64", "w3g64", "2:4+w4g64", "w4g64", "dense")
SPACE = toy_space(2, KEYS)
COSTS = size_tables(SPACE, 0)
GOOD = dict(zip(KEYS, (0.3, 0.1, 0.05, 0.06, 0.01, 0.0), strict=True))  # nothing is dominated


def errors(changes=()):
    """GOOD, but for (layer, key) -> error."""
    table = dict(changes)
    return lambda module, level: table.get((module, str(level)), GOOD[str(level)])


def left_out(found):
    return {str(entry.level): set(entry.layers) for entry in found}


def test_a_front_keeps_all_its_levels():
    assert find_dominated(SPACE, COSTS, errors()) == ()


def test_a_joint_level_leaves_the_layers_where_a_smaller_one_is_as_good():
    name = SPACE.layers[3].name
    [entry] = find_dominated(SPACE, COSTS, errors({(name, "s50+w3g64"): 0.31}))
    assert left_out([entry]) == {"s50+w3g64": {name}}
    assert entry.reason == "no smaller and no better than w2g64 (1 layer)"
    kept = restrict(SPACE, [entry])
    assert [len(levels) for levels in kept.levels] == [6, 6, 6, 5, 6, 6, 6, 6]


def test_a_plain_level_stays_while_one_layer_needs_it():
    """Uniform allocations are made of them."""
    every = [layer.name for layer in SPACE.layers]
    worse = {(name, "w3g64"): 0.07 for name in every}  # than 2:4+w4g64, which is smaller
    assert left_out(find_dominated(SPACE, COSTS, errors(worse))) == {"w3g64": set(every)}
    del worse[every[0], "w3g64"]
    assert find_dominated(SPACE, COSTS, errors(worse)) == ()


def test_speed_and_parameters_save_a_level():
    name = SPACE.layers[0].name
    worse = errors({(name, "s50+w3g64"): 0.31})
    for cost, faster in (("latency", 1.0), ("parameters", 2048)):
        entries = tuple(
            {lv: faster if isinstance(lv, Joint) else 2 * faster for lv in row}
            for row in SPACE.levels
        )
        assert find_dominated(SPACE, (*COSTS, CostTable(cost, cost, 0, entries)), worse) == ()
        slower = tuple(dict.fromkeys(row, faster) for row in entries)
        [entry] = find_dominated(SPACE, (*COSTS, CostTable(cost, cost, 0, slower)), worse)
        word = {"latency": "no faster", "parameters": "no fewer parameters"}[cost]
        assert entry.reason == f"no smaller, {word} and no better than w2g64 (1 layer)"


def test_of_equals_the_first_stays_and_what_is_unknown_dominates_nothing():
    space = toy_space(1, ("2:4+w4g64", "2:4+w4g64sym"))
    flat = CostTable("bits", "bits", 0, tuple(dict.fromkeys(row, 8) for row in space.levels))
    found = find_dominated(space, [flat], lambda module, level: 0.1)
    assert left_out(found) == {"2:4+w4g64sym": {layer.name for layer in space.layers}}
    assert find_dominated(space, [flat], lambda module, level: math.nan) == ()


@given(st.integers(0, 2**32), st.integers(1, 4))
def test_whatever_is_left_out_has_a_better_level_that_stays(seed, values):
    rng = np.random.default_rng(seed)
    table = {
        (layer.name, level): int(rng.integers(values))
        for layer, row in zip(SPACE.layers, SPACE.levels, strict=True)
        for level in row
    }
    entries = tuple({lv: int(rng.integers(values)) for lv in row} for row in SPACE.levels)
    costs = [CostTable("bits", "bits", 0, entries)]
    found = find_dominated(SPACE, costs, lambda module, level: table[module, level])
    kept = restrict(SPACE, found)
    for i, layer in enumerate(SPACE.layers):
        figures = {lv: (entries[i][lv], table[layer.name, lv]) for lv in SPACE.levels[i]}
        for level in set(SPACE.levels[i]) - set(kept.levels[i]):
            assert any(
                all(a <= b for a, b in zip(figures[it], figures[level], strict=True))
                for it in kept.levels[i]
            )


def test_a_search_says_what_it_left_out(tiny_folder, tmp_path):
    toml = tmp_path / "space.toml"
    toml.write_text('name = "joint"\nlevels = ["w2g64", "w4g64", "o0.5%+w4g64", "s10+w6g64"]\n')
    config = write_config(tmp_path / "config.toml", tiny_folder, TOKENS, prefix="w4g64")
    out = tmp_path / "result"
    asked = ("--config", config, "--space", toml, "--strategy", "ilp", "--budget", "4.2bits")
    ran = command("search", *asked, "--out", out)
    assert ran.code == 0, ran.err
    facts = json.loads((out / "autocompress.json").read_text())
    entries = facts["dominated"]
    assert {entry["level"] for entry in entries} <= {"o0.5%+w4g64", "s10+w6g64"}
    for entry in entries:
        line = f"left out: {entry['level']} of {len(entry['layers'])} layers, {entry['reason']}"
        assert line in ran.err
        assert entry["reason"] in (out / "report.md").read_text()
        chosen = {row["layer"]: row["level"] for row in facts["allocation"]}
        assert all(chosen[name] != entry["level"] for name in entry["layers"])
    built = [line for line in ran.err.splitlines() if "level database: " in line]
    assert any("w2g64 (" in it and "w4g64 (" in it and it.endswith("together") for it in built)
    assert any("o0.5%+w4g64 (" in it and " took " in it for it in built), "its own family"
