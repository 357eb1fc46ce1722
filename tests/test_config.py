"""Study files and flags -> `StudyConfig`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.config import StudyConfig
from autocompress.documents import SplitTokens
from autocompress.errors import AutocompressError, CalibrationError, ConfigError
from autocompress.levels import Dense, Quantize

FULL = """
model = "some/model"
space = "quant-2-8-tied"
runtime = "ct-vllm-cuda"
budgets = ["3.5bits", "80MB"]
pins = ["*.0.*=dense"]
calibration = "text.jsonl"
window = 256
seed = 7
strategy = "evolution"
effort = "thorough"
spend = 50000
warm = 100000
pareto = "ms=5..9"
points = 3
sensitivity_tokens = 1024
generations = 0
offspring = 4
method = "rtn"
prefix = "w4g64"
dtype = "float32"
target = "board.json"
threads = 3
batch = 4
prompt = 64
decode = 0.5
activations = "bfloat16"
out = "results/a"
run = "runs/a"
storage = "sqlite:///x.db"
workers = 3
worker_threads = 2
backend = "dask"
scheduler = "tcp://head:8786"
[tokens]
search = 4096
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(text)
    return path


def test_file_sets_every_field(tmp_path: Path) -> None:
    config = StudyConfig.from_toml(write(tmp_path, FULL))
    assert config == StudyConfig(
        model="some/model",
        space="quant-2-8-tied",
        runtime="ct-vllm-cuda",
        budgets=("3.5bits", "80MB"),
        pins=("*.0.*=dense",),
        calibration="text.jsonl",
        window=256,
        tokens=SplitTokens(search=4096),
        seed=7,
        strategy="evolution",
        effort="thorough",
        spend=50_000,
        warm=100_000,
        pareto="ms=5..9",
        points=3,
        sensitivity_tokens=1024,
        generations=0,
        offspring=4,
        method="rtn",
        prefix="w4g64",
        dtype="float32",
        target="board.json",
        threads=3,
        batch=4,
        prompt=64,
        decode=0.5,
        activations="bfloat16",
        out=Path("results/a"),
        run=Path("runs/a"),
        storage="sqlite:///x.db",
        workers=3,
        worker_threads=2,
        backend="dask",
        scheduler="tcp://head:8786",
    )
    default = StudyConfig()
    unset = [f.name for f in dataclasses.fields(config)
             if getattr(config, f.name) == getattr(default, f.name)]  # fmt: skip
    assert unset == ["minimize"]  # which goes with no range; a new field must join FULL
    smallest = StudyConfig.from_toml(write(tmp_path, 'budgets = ["1KL"]\nminimize = "latency"'))
    assert smallest.minimize == "latency"
    assert config.parsed_pins() == (("*.0.*", Dense()),)
    assert config.prefix_level() == Quantize(4, 64)


def test_empty_file_is_the_default_and_flags_win(tmp_path: Path) -> None:
    assert StudyConfig.from_toml(write(tmp_path, "")) == StudyConfig()
    config = StudyConfig.from_toml(write(tmp_path, FULL), seed=9, budgets=("4bits",))
    assert (config.seed, config.budgets, config.window) == (9, ("4bits",), 256)


def test_run_folder_stands_beside_the_result_unless_named() -> None:
    assert StudyConfig(out=Path("a/b")).run_folder == Path("a/b.run")
    assert StudyConfig(out=Path("a/b"), run=Path("c")).run_folder == Path("c")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("budgets", "budget", r"study\.toml: a key .*Got 'budget'\. Did you mean 'budgets'"),
        ("search = 4096", "serch = 4096", r"tokens\..*Got 'serch'\. Did you mean 'search'"),
        ('["3.5bits", "80MB"]', '"3.5bits"', "budgets must be a list of strings"),
        ('["3.5bits", "80MB"]', "[3.5]", "budgets must be a list of strings"),
        ('"3.5bits", ', '" ", ', "a budget must not be blank"),
        ("decode = 0.5", 'decode = "half"', "decode must be a number. Got 'half'"),
        ("decode = 0.5", "decode = true", "decode must be a number. Got True"),
        ("decode = 0.5", "decode = 2", "decode must be between 0 and 1. Got 2"),
        ("threads = 3", "threads = 0", "threads must be between 1 and 1024. Got 0"),
        ('"bfloat16"', '"int4"', "activations must be one of int8, bfloat16, float32. Got 'int4'"),
        ('"board.json"', '" "', "target must not be blank"),
        ("seed = 7", 'seed = "7"', "seed must be an integer. Got '7'"),
        ("seed = 7", "seed = true", "seed must be an integer. Got True"),
        ("seed = 7", "seed = -1", "seed must be between 0 and 4294967295. Got -1"),
        ("generations = 0", "generations = -1", "generations must be between 0 .*Got -1"),
        ("offspring = 4", "offspring = 0", "offspring must be between 1 .*Got 0"),
        ("= 50000", "= 100", "at least 2304 tokens to spend.*Got 100"),
        ("= 50000", "= -1", "at least 2304 tokens to spend.*Got -1"),
        ('"thorough"', '"thorugh"', "an effort must be one of quick.*Did you mean 'thorough'"),
        ("= 1024", "= 1000", "sensitivity_tokens must be a multiple of the window, 256. Got 1000"),
        ("= 1024", "= 8192", "sensitivity_tokens must be between 1 and 4096. Got 8192"),
        ("window = 256", "window = 300", "'calibrate' must be a multiple of the window"),
        ("search = 4096", "search = 0", "tokens of split 'search' must be an integer"),
        ("search = 4096", "search = 1.5", r"tokens\.search must be an integer"),
        ('"rtn"', '"gtpq"', r"method must be one of gptq, rtn\. Got 'gtpq'\. Did you mean 'gptq'"),
        ('"float32"', '"float16"', "dtype must be one of auto, bfloat16, float32"),
        ('"w4g64"', '"w7"', "bits must be one of .*Got 7"),
        ('"*.0.*=dense"', '"*.0.*"', "a pin must be written"),
        ('"some/model"', '" "', "model must not be blank"),
        ('"some/model"', "3", "model must be a string. Got 3"),
        ('"results/a"', '""', "out must be a string that is not blank"),
        ("[tokens]\nsearch = 4096", "tokens = 3", "tokens must be a table with calibrate"),
        ("seed = 7", "seed =", r"study\.toml' must be TOML.*line 9"),
    ],
)
def test_every_mistake_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in FULL
    with pytest.raises(AutocompressError, match=message):
        StudyConfig.from_toml(write(tmp_path, FULL.replace(old, new, 1)))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml': No such file"):
        StudyConfig.from_toml(tmp_path / "gone.toml")


@pytest.mark.parametrize("field", ["budgets", "pins"])
def test_a_lone_string_is_not_a_tuple(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be a tuple"):
        StudyConfig(**{field: "3.5bits"})  # type: ignore[arg-type]


@given(
    window=st.integers(2, 64),
    counts=st.tuples(*[st.integers(1, 20)] * 4),
    seed=st.integers(0, 2**32 - 1),
    off=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_whole_windows_are_the_rule(
    window: int, counts: tuple[int, ...], seed: int, off: int
) -> None:
    sizes = [window * count for count in counts]
    sizes[3] += off
    values: dict[str, Any] = {"window": window, "seed": seed, "sensitivity_tokens": window}
    if off % window:
        with pytest.raises(CalibrationError, match="'test' must be a multiple"):
            StudyConfig(tokens=SplitTokens(*sizes), **values)
    else:
        assert StudyConfig(tokens=SplitTokens(*sizes), **values).tokens.test == sizes[3]


def test_config_is_a_value() -> None:
    assert hash(StudyConfig(seed=3)) == hash(StudyConfig(seed=3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        StudyConfig().seed = 3  # type: ignore[misc]
