"""The worked examples on the tiny model, the public names, and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from runs import BUDGET, SETTINGS, TOKENS, copied_run, finished

import autocompress
from autocompress.calibration import SplitTokens
from autocompress.operators import OPERATORS, Solver
from autocompress.strategies import STRATEGIES
from autocompress.targets import TARGETS

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What examples register is gone after a test."""
    from autocompress.operators import quantize  # noqa: F401  (the shipped one is there before)

    before = [dict(it) for it in (OPERATORS, STRATEGIES, TARGETS)]
    yield
    for registry, old in zip((OPERATORS, STRATEGIES, TARGETS), before, strict=True):
        registry.clear()
        registry.update(old)  # type: ignore[arg-type]


def example(name: str) -> ModuleType:
    """The script as a module; what stands below its main guard does not run."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def search(model: Path, folder: Path, budget: Any, **settings: Any) -> autocompress.Result:
    return autocompress.search(
        budget,
        model=model,
        tokens=SplitTokens(**TOKENS),
        out=folder / "result",
        **{**SETTINGS, **settings},
    )


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40


def test_own_target(tiny_folder: Path, tmp_path: Path) -> None:
    """Its prices limit the search; a level that the CSV lacks is not used."""
    module = example("own_target")
    module.FIXED = 0.0
    module.register(EXAMPLES / "board.csv")
    run = copied_run(tiny_folder, tmp_path / "run")
    target = autocompress.Target("board")
    result = search(tiny_folder, tmp_path, ["0.0018ms", BUDGET], target=target, run=run)
    levels = {row["level"] for row in result.facts["allocation"]}
    assert levels <= {"w2g64", "w3g64", "w4g64", "w6g64", "w8g64"}
    prices = {"w2g64": 9.5, "w3g64": 19.0, "w4g64": 14.5, "w6g64": 24.0, "w8g64": 27.5}
    spent = sum(row["weights"] * prices[row["level"]] / 1e9 for row in result.facts["allocation"])
    (time,) = (row for row in result.facts["budgets"] if row["cost"] == "latency")
    assert time["reached"] == pytest.approx(spent) and time["reached"] <= 0.0018


def test_own_operator(tiny_folder: Path, tmp_path: Path) -> None:
    """Weights of the result are those that it rounds, and its database names it."""
    module = example("own_operator")
    result = search(tiny_folder, tmp_path, "4.5bits", strategy="uniform")
    identity = result.facts["database"]["solver"]
    assert identity["operators"] == {"Quantize": "own_operator.nearest"}
    model, _ = result.load()
    dense = autocompress.models.load_model(str(tiny_folder), torch.float32).model  # type: ignore[attr-defined]
    name, level = next(
        (row["modules"][0], row["level"])
        for row in result.facts["allocation"]
        if row["level"] != "dense"
    )
    expected = module.rounded(
        dense.get_submodule(name).weight.detach().float(), autocompress.parse_level(level)
    )
    packed = model.get_submodule(name)
    torch.testing.assert_close(packed.weight.float(), expected.dense())


def test_another_operators_database_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    run = copied_run(tiny_folder, tmp_path / "run")
    example("own_operator")
    with pytest.raises(autocompress.AutocompressError, match="built with another solver"):
        search(tiny_folder, tmp_path, BUDGET, run=run)


def test_a_shipped_operator_never_replaces_ones_own() -> None:
    def mine(*given: Any) -> Any: ...

    from autocompress.levels import Quantize

    shipped = OPERATORS[Quantize]
    autocompress.operator(Quantize)(mine)
    autocompress.operator(Quantize)(shipped)
    assert OPERATORS[Quantize] is mine and "operators" in Solver().identity()


def test_own_strategy(tiny_folder: Path, tmp_path: Path) -> None:
    """It is found by name, keeps the budget and is raced against the baselines."""
    example("own_strategy")
    run = copied_run(tiny_folder, tmp_path / "run")
    result = search(tiny_folder, tmp_path, BUDGET, strategy="hill-climbing", run=run)
    assert result.effective_bits <= 3.5
    rows = json.loads((result.path / "autocompress.json").read_text())["trials"]
    mine = [row for row in rows if row["origin"] == "hill-climbing"]
    assert len(mine) > 3
    assert all(row["effective_bits"] <= 3.5 for row in mine)
    kl = {name: row["validate"]["kl"] for name, row in result.results.items()}
    assert kl["winner"] <= min(kl["uniform"], kl["ilp"])


# The public names


def test_a_space_from_toml(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nlevels = ["w2g64", "w4g64"]\nscope = ["blocks"]\n')
    space = autocompress.SearchSpace.from_toml(path, model=str(tiny_folder))
    assert (space.name, len(space.layers)) == ("mine", 21)
    assert [str(level) for level in space.all_levels()] == ["w2g64", "w4g64"]
    limit = autocompress.parse_budget("3bits", space)
    assert limit == autocompress.Budget("bits", 3 * space.weights, "3bits")


def test_profile_prices_a_registered_target(tiny_folder: Path) -> None:
    example("own_target").register(EXAMPLES / "board.csv")
    found = autocompress.profile(model=tiny_folder, target=autocompress.Target("board", threads=1))
    assert found.table.base == 0.8 and len(found.table.entries) == 21
    assert {str(it.level) for it in found.dropped} >= {"w4g128"}


def test_build_database_takes_settings(tiny_folder: Path, tmp_path: Path) -> None:
    run = copied_run(tiny_folder, tmp_path / "run")
    database = autocompress.build_database(
        model=tiny_folder, tokens=SplitTokens(**TOKENS), run=run, window=64, dtype="float32"
    )
    assert len(database.entries) == 21


def test_a_runs_front(tiny_folder: Path) -> None:
    front = autocompress.open_run(finished(tiny_folder)).front()
    assert front.cost == "bits" and front.point(1) == front.trials[0]
    losses = [trial.loss for trial in front.trials]
    assert losses == sorted(losses, reverse=True) and list(front.costs) == sorted(front.costs)


def test_a_result_is_exported(tiny_folder: Path, tmp_path: Path) -> None:
    path = finished(tiny_folder)
    result = autocompress.Result(path, {}, autocompress.Allocation(()))
    facts = result.export(tmp_path / "dense", "dense", check=False)
    assert facts["model"]["name"] and (tmp_path / "dense" / "config.json").exists()


def test_the_tour(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of the documentation, line by line."""
    copied_run(tiny_folder, tmp_path / "demo.run")
    monkeypatch.chdir(tmp_path)
    plain = {key: SETTINGS[key] for key in ("dtype", "window")}
    given = {"MODEL": str(tiny_folder), "SETTINGS": {"tokens": SplitTokens(**TOKENS), **plain}}
    page = EXAMPLES.parent / "docs" / "api" / "tour.md"
    found = doctest.testfile(str(page), module_relative=False, globs=given)
    assert found.attempted > 20 and found.failed == 0


@pytest.mark.parametrize("name", ["autocompress.core", "autocompress.levels", "autocompress.cost"])
def test_examples_in_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0 and found.failed == 0


def test_importing_is_fast() -> None:
    """The facade loads nothing but the standard library, and little of that."""
    import subprocess

    code = "import sys, autocompress; print(len(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 150
