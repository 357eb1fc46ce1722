"""Search-space files, and what they make of a model's layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.core import Layer
from autocompress.errors import SpaceError
from autocompress.levels import Dense, Quantize, parse_level
from autocompress.spaces import (
    SpaceConfig,
    build_space,
    list_spaces,
    load_space,
    parse_pin,
    space_folder,
)

FULL = """
# When to use:   never,
#
# it is a test.
name = "full"
levels = ["w2g64", "w4g64", "dense"]
scope = ["blocks", "head"]
tie = [["q", "k", "v"], ["gate", "up"]]
[pins]
"*.0.*" = "w8"
"m.1.down" = "dense"
[minimum]
"*.q" = "w3g64"
[[override]]
layers = "*.down"
levels = ["w4g64", "w8g64"]
[[override]]
layers = "*"
levels = ["w3g64"]
"""
W2, W4 = Quantize(2, 64), Quantize(4, 64)
TIE = (("q", "k", "v"), ("gate", "up"))


def model_layers(blocks: int = 2) -> list[Layer]:
    shapes = {"q": (8, 4), "k": (2, 4), "v": (2, 4), "o": (4, 8), "gate": (6, 4), "up": (6, 4)}
    shapes["down"] = (4, 6)
    return [
        Layer(f"m.{block}.{name}", (f"m.{block}.{name}",), (shape,))
        for block in range(blocks)
        for name, shape in shapes.items()
    ]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "space.toml"
    path.write_text(text.lstrip("\n"))
    return path


# --- files -----------------------------------------------------------------------------------


def test_file_becomes_config(tmp_path: Path) -> None:
    config = SpaceConfig.from_toml(write(tmp_path, FULL))
    assert config == SpaceConfig(
        name="full",
        levels=(W2, W4, Dense()),
        scope=("blocks", "head"),
        tie=TIE,
        pins=(("*.0.*", Quantize(8)), ("m.1.down", Dense())),
        overrides=(("*.down", (W4, Quantize(8, 64))), ("*", (Quantize(3, 64),))),
        minimums=(("*.q", Quantize(3, 64)),),
        description="When to use: never, it is a test.",
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("scope =", "scoop =", r"space\.toml.*Got 'scoop'\. Did you mean 'scope'"),
        ("layers =", "layer =", r"override 1: a key .*Got 'layer'\. Did you mean 'layers'"),
        ('"w2g64", "w4g64"', '"w2g64", "w7g64"', "bits must be one of .*Got 7"),
        ('"w2g64", "w4g64"', '"q2g64", "w4g64"', "Got 'q2g64'"),
        ('"w2g64", "w4g64"', '"w4g64", "w4g64"', "'levels' must not repeat .*'w4g64' twice"),
        ('"w2g64", "w4g64"', '" w4g64", "w4g64"', "'levels' must not repeat a level"),
        ('"w2g64", "w4g64"', '"w2g64", 4', "'levels' must be a list of strings"),
        ('["w2g64", "w4g64", "dense"]', "[]", r"'levels' must hold at least one .*Got \[\]"),
        ('["w2g64", "w4g64", "dense"]', '"w2g64"', "'levels' must be a list of strings"),
        ('levels = ["w2g64", "w4g64", "dense"]', "", "'levels' must be a list .*Got None"),
        ('levels = ["w3g64"]', "", "'override 2: levels' must be a list .*Got None"),
        ('layers = "*"', 'layers = ["*"]', "override 2: 'layers' must be a pattern"),
        ('name = "full"', "", "'name' must be a non-empty string. Got None"),
        ('"head"]', '"heads"]', r"Got 'heads'\. Did you mean 'head'"),
        ('["q", "k", "v"]', "[]", "'tie' must hold at least one"),
        ('["q", "k", "v"]', '"q"', "'tie' must be a list of strings"),
        ('[["q", "k", "v"], ["gate", "up"]]', "3", "'tie' must be a list of lists"),
        ('["gate", "up"]', '["gate", "q"]', "one group of 'tie' only. Got 'q' in two"),
        ('["gate", "up"]', '["m.gate", "up"]', "last name components.* Got 'm.gate'"),
        ('"*.0.*" = "w8"', 'model.layers = "w8"', "Quote the pattern"),
        ('"*.0.*" = "w8"', '"*.0.*" = 8', "Quote the pattern"),
        ('"*.0.*" = "w8"', '"*.0.*" = "w9"', "bits must be one of .*Got 9"),
        ('"*.0.*" = "w8"', '"*.0.*" = "w8', r"space\.toml' must be TOML.*line 9"),
        ("[pins]", "[[pins]]", "'pins' must be a table"),
        ('"*.q" = "w3g64"', '"*.q" = 3', "'minimum' must hold levels in quotes.*Quote the pattern"),
        ('"*.q" = "w3g64"', '"*.q" = "w7"', "bits must be one of .*Got 7"),
        ("[minimum]", "[minimums]", r"Got 'minimums'\. Did you mean 'minimum'"),
        ("[[override]]", "[override]", "must be TOML"),
    ],
)
def test_every_mistake_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in FULL
    with pytest.raises(SpaceError, match=message):
        SpaceConfig.from_toml(write(tmp_path, FULL.replace(old, new, 1)))


def test_single_override_table_is_an_error(tmp_path: Path) -> None:
    text = 'name = "x"\nlevels = ["w8"]\n[override]\nlayers = "*"\n'
    with pytest.raises(SpaceError, match=r"must be written as \[\[override\]\]"):
        SpaceConfig.from_toml(write(tmp_path, text))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"gone\.toml': No such file"):
        load_space(str(tmp_path / "gone.toml"))
    path = tmp_path / "latin.toml"
    path.write_bytes(b'name = "caf\xe9"')
    with pytest.raises(SpaceError, match=r"must be UTF-8.*byte 11"):
        load_space(str(path))


def test_built_in_spaces() -> None:
    spaces = {space.name: space for space in list_spaces()}
    assert {
        *("quant-2-8", "quant-2-8-tied", "head-and-embedding", "gguf-k-quants", "ct-vllm"),
        *("sparse-unstructured", "sparse-2-4", "lowrank", "joint-cpu", "joint-everything"),
    } <= set(spaces)
    assert [path.stem for path in sorted(space_folder().glob("*.toml"))] == list(spaces)
    assert all(space.description.startswith("When to use: ") for space in spaces.values())
    quantized = [level for level in spaces["quant-2-8"].levels if isinstance(level, Quantize)]
    assert {level.bits for level in quantized} == {2, 3, 4, 5, 6, 8}
    assert spaces["quant-2-8-tied"].tie == (
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
    )
    assert spaces["head-and-embedding"].scope == ("blocks", "embedding", "head")


def test_load_space_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_space("quant-2-8").name == "quant-2-8"
    write(tmp_path, FULL)
    assert load_space(str(tmp_path / "space.toml")).name == "full"
    monkeypatch.chdir(tmp_path)
    assert load_space("space.toml").name == "full"
    with pytest.raises(SpaceError, match=r"Got 'quant-28'\. Did you mean 'quant-2-8'"):
        load_space("quant-28")


def test_parse_pin() -> None:
    assert parse_pin(" *.down = w4g64 ") == ("*.down", W4)
    assert parse_pin("a=b=w4g64") == ("a=b", W4)
    for text in ("*.down", "=w4g64", "", "*.down=", "*.down=w7"):
        with pytest.raises(SpaceError, match=r"pin"):
            parse_pin(text)


# --- layers ----------------------------------------------------------------------------------


def config(**changes: object) -> SpaceConfig:
    return SpaceConfig(**{"name": "s", "levels": (W2, W4), **changes})  # type: ignore[arg-type]


def test_without_rules_every_layer_takes_every_level() -> None:
    space = build_space(config(), model_layers())
    assert space.layers == tuple(model_layers())
    assert set(space.levels) == {(W2, W4)}


def test_ties_fuse_modules_of_one_parent_at_the_first_place() -> None:
    space = build_space(config(tie=TIE), model_layers())
    assert [layer.name for layer in space.layers] == [
        f"m.{block}.{name}" for block in range(2) for name in ("q+k+v", "o", "gate+up", "down")
    ]
    assert space.layers[0] == Layer(
        "m.0.q+k+v", ("m.0.q", "m.0.k", "m.0.v"), ((8, 4), (2, 4), (2, 4))
    )


def test_ties_follow_model_order_and_take_what_is_there() -> None:
    layers = [Layer(name, (name,), ((2, 2),)) for name in ("a.v", "a.x", "a.q", "b.q", "q", "c.x")]
    space = build_space(config(tie=TIE), layers)
    assert [layer.name for layer in space.layers] == ["a.v+q", "a.x", "b.q", "q", "c.x"]


@given(present=st.sets(st.integers(0, 13), min_size=1), tied=st.booleans())
@settings(max_examples=50, deadline=None)
def test_ties_keep_every_module_once(present: set[int], tied: bool) -> None:
    layers = [layer for i, layer in enumerate(model_layers()) if i in present]
    space = build_space(config(tie=TIE if tied else ()), layers)
    modules = [module for layer in space.layers for module in layer.modules]
    assert sorted(modules) == sorted(layer.name for layer in layers)
    assert space.weights == sum(layer.weights for layer in layers)
    assert all(len(layer.modules) == len(layer.shapes) for layer in space.layers)


def allowed(space_config: SpaceConfig, *pins: str) -> dict[str, str]:
    space = build_space(space_config, model_layers(), [parse_pin(pin) for pin in pins])
    return {
        layer.name: " ".join(map(str, levels))
        for layer, levels in zip(space.layers, space.levels, strict=True)
    }


def test_first_override_wins_and_pins_win_over_overrides() -> None:
    overrides = (("*.down", (W4,)), ("m.0.*", (Quantize(8), Dense())), ("*.o", (W2,)))
    pins = (("*.0.down", Dense()), ("*.0.*", Quantize(6)))
    got = allowed(config(overrides=overrides))
    assert (got["m.0.down"], got["m.0.o"], got["m.1.o"]) == ("w4g64", "w8 dense", "w2g64")
    assert got["m.1.q"] == "w2g64 w4g64"
    got = allowed(config(overrides=overrides, pins=pins))
    assert (got["m.0.down"], got["m.0.o"], got["m.1.down"]) == ("dense", "w6", "w4g64")


def test_pins_from_the_command_line_win_over_the_file() -> None:
    got = allowed(config(pins=(("*.down", Dense()),)), "m.1.down=w3")
    assert (got["m.0.down"], got["m.1.down"]) == ("dense", "w3")


def test_rules_match_tied_layers_by_module_or_layer_name() -> None:
    got = allowed(config(tie=TIE), "m.0.[qkv]=w3", "m.1.q+k+v=w5")
    assert (got["m.0.q+k+v"], got["m.1.q+k+v"]) == ("w3", "w5")


def test_tied_modules_with_different_rules_are_an_error() -> None:
    with pytest.raises(
        SpaceError, match=r"'m\.0\.q\+k\+v' must share .*m\.0\.q: w3; m\.0\.k: w2g64"
    ):
        allowed(config(tie=TIE), "m.0.q=w3")
    with pytest.raises(SpaceError, match="must share their levels"):
        allowed(config(tie=TIE, overrides=(("*.up", (W4,)),)))


@pytest.mark.parametrize("case", ["pin", "override", "flag"])
def test_a_pattern_that_matches_nothing_names_near_layers(case: str) -> None:
    pattern = "m.0.dwon"
    changes = {"pin": {"pins": ((pattern, W2),)}, "override": {"overrides": ((pattern, (W2,)),)}}
    flags = [f"{pattern}=w3"] if case == "flag" else []
    with pytest.raises(SpaceError, match=r"'m\.0\.dwon' matches none\. Near names: m\.0\.down"):
        allowed(config(**changes.get(case, {})), *flags)


def test_case_counts() -> None:
    with pytest.raises(SpaceError, match="matches none"):
        allowed(config(), "*.DOWN=w3")


def test_no_layers_is_an_error() -> None:
    with pytest.raises(SpaceError, match=r"at least one layer\. 's' with scope blocks holds none"):
        build_space(config(), [])


def test_pinned_space_still_has_uniform_allocations() -> None:
    space = build_space(config(pins=(("*.0.*", parse_level("dense")),)), model_layers())
    assert space.uniform(W2) in space
    assert space.uniform_levels() == (W2, W4)


def test_a_minimum_leaves_what_stores_no_less() -> None:
    keys = ("w2g64", "s50+w3g64", "w3g64", "2:4", "dense")
    levels = tuple(map(parse_level, keys))
    wide = [Layer(f"m.{i}.{n}", (f"m.{i}.{n}",), ((64, 64),)) for i in (0, 1) for n in ("q", "k")]
    space = SpaceConfig("x", levels, minimums=(("*.q", parse_level("w3g64")),))
    found = build_space(space, wide)
    got = {
        layer.name: [str(level) for level in row]
        for layer, row in zip(found.layers, found.levels, strict=True)
    }
    assert got["m.0.q"] == got["m.1.q"] == ["w3g64", "2:4", "dense"]
    assert got["m.0.k"] == list(keys)
    tied = build_space(replace(space, tie=(("q", "k"),)), wide)  # one module is enough
    assert [len(row) for row in tied.levels] == [3, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pins": (("*.0.q", W2),)}, r"minimum must leave .* 'm\.0\.q' has w2g64, all below w4g64"),
        ({"minimums": (("*.x", W4),)}, r"'\*\.x' matches none"),
        ({"minimums": (("*.q", parse_level("r50")),)}, r"'m\.0\.q' must be able to .* Got r50"),
    ],
)
def test_minimums_that_cannot_be(changes: dict[str, object], message: str) -> None:
    usual: dict[str, object] = {"minimums": (("*.q", W4),)}
    with pytest.raises(SpaceError, match=message):
        build_space(config(**{**usual, **changes}), model_layers())
