import math
import re
import runpy
from pathlib import Path

import pytest
from toys import toy_space

from autocompress.core import CostTable
from autocompress.errors import LatencyError
from autocompress.targets import TARGETS, Target, checked_table, find_target, register_target

SPACE = toy_space()


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr("autocompress.targets.TARGETS", {})


def priced(price, space=SPACE, name="latency", unit="ms"):
    return CostTable(name, unit, 1.0, tuple(dict.fromkeys(row, price) for row in space.levels))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threads": 0}, "threads must be between 1 and 1024. Got 0."),
        ({"threads": 2000}, "threads must be between 1 and 1024. Got 2000."),
        ({"batch": 0}, "batch must be between 1 and 32. Got 0."),
        ({"batch": 33}, "batch must be between 1 and 32. Got 33."),
        ({"prompt": 0}, "prompt must be between 1 and"),
        ({"decode": 1.5}, "decode must be between 0 and 1. Got 1.5."),
        ({"decode": math.nan}, "decode must be between 0 and 1. Got nan."),
        ({"mode": "a7"}, "mode must be one of a8, a16, a32. Got 'a7'."),
        ({"device": "cuda"}, "must be a CPU. Got device 'cuda'"),
    ],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(LatencyError, match=re.escape(words)):
        Target(**settings)


def test_a_mix_weighs_decoded_tokens_and_prompts():
    assert Target().phases == ("decode",)
    assert Target(decode=0).phases == ("prefill",)
    mix = Target(decode=0.75, prompt=100)
    assert mix.phases == ("decode", "prefill")
    assert mix.weigh("decode", 8.0) == 6.0
    assert mix.weigh("prefill", 800.0) == 2.0, "a prefill reads 100 tokens at once"
    assert "75% decode" in mix.describe() and "25% prefill of 100" in mix.describe()


def test_names_find_who_prices_them():
    assert find_target("cpu") is None and Target().is_local
    assert find_target("there/store.json") == Path("there/store.json")
    function = register_target("board")(lambda space, target: priced(1.0))
    assert find_target("board") is function
    assert find_target("math:inf") == math.inf
    assert not Target("board").is_local


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cpuu", r"must be cpu, the path .* Got 'cpuu'\. Did you mean 'cpu'"),
        ("no_such_module:f", "must be importable. Got 'no_such_module:f'"),
        ("math:nothing", "must be importable"),
        (":", "must be importable"),
    ],
)
def test_no_such_target(name, words):
    with pytest.raises(LatencyError, match=words):
        find_target(name)


def test_a_registered_table_is_checked():
    assert checked_table(priced(math.inf), SPACE, "board").base == 1.0
    wrong = [
        (priced(1.0, name="time"), "must return a table 'latency' in ms"),
        (priced(1.0, unit="s"), "must return a table 'latency' in ms"),
        (priced(1.0, toy_space(blocks=1)), "with 12 entries. Got .* with 4"),
        (priced(math.nan), "must price every level at 0 ms or more"),
        (priced(-1.0), "must price every level at 0 ms or more"),
        (CostTable("latency", "ms", 0.0, tuple({} for _ in SPACE.layers)), "Got None for"),
    ]
    for table, words in wrong:
        with pytest.raises(LatencyError, match=words):
            checked_table(table, SPACE, "board")


def test_the_example_of_the_documentation(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "latency.md").read_text()
    (code,) = re.findall(r"```python\n(# my_board\.py.*?)```", page, re.DOTALL)
    (tmp_path / "my_board.py").write_text(code)
    function = runpy.run_path(str(tmp_path / "my_board.py"))["my_board"]
    table = checked_table(function(SPACE, Target("my-board")), SPACE, "my-board")
    slow, fast = (table.total(SPACE.uniform(level)) for level in SPACE.levels[0][-1::-4])
    assert slow > fast > table.base > 0
    assert TARGETS is not None
