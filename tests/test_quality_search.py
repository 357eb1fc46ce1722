"""A budget of KL on the tiny model: the smallest that keeps it, beside every baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import BUDGET, command, copied_run, write_config

import autocompress
from autocompress.core import Budget
from autocompress.smallest import Goal, split_goal

TOKENS = {"calibrate": 1024, "search": 512, "validate": 256, "test": 256}
LIMIT = 0.03


def ask(model: Path, folder: Path, *arguments: object) -> Any:
    config = write_config(folder / "config.toml", model, TOKENS)
    run = folder / "run"
    if not run.exists():
        copied_run(model, run)
    out = folder / "result"
    return command("search", "--config", config, "--run", run, "--out", out, *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def facts(tiny_folder: Path, folder: Path) -> dict[str, Any]:
    return ask(tiny_folder, folder, "--budget", f"{LIMIT}KL", "--json").json()


def test_the_smallest_keeps_the_limit_on_validation(facts: dict[str, Any]) -> None:
    goal, rows = facts["goal"], facts["results"]
    assert goal == {
        "text": f"{LIMIT}KL",
        "limit": LIMIT,
        "reached": rows["winner"]["validate"]["kl"],
        "minimized": "bytes",
    }
    assert goal["reached"] <= LIMIT
    assert facts["budgets"] == []


def test_every_baseline_is_as_small_as_it_may_be(facts: dict[str, Any]) -> None:
    rows = facts["results"]
    sizes = [rows[name]["total_bytes"] for name in ("winner", "ilp", "uniform")]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.95 * sizes[2], "a mixed allocation is smaller than any uniform one"
    for name in ("winner", "ilp", "uniform"):
        assert rows[name]["validate"]["kl"] <= LIMIT
    origins = {row["origin"]: row for row in facts["trials"] if row["split"] == "validate"}
    assert "ilp" in origins
    below = [
        row["loss"]
        for row in facts["trials"]
        if row["split"] == "validate"
        and row["tokens"] == TOKENS["validate"]
        and row["effective_bits"] < rows["winner"]["effective_bits"]
    ]
    assert all(loss > LIMIT for loss in below), "what is smaller and was measured loses more"


def test_the_report_compares_sizes(facts: dict[str, Any], folder: Path) -> None:
    text = (folder / "result" / "report.md").read_text()
    assert f"The smallest found that keeps {LIMIT}KL on validation windows" in text
    assert "less than the smallest uniform, w" in text
    assert "nats per token on validation windows, with the least bytes found" in text


def test_a_second_search_repeats_it(facts: dict[str, Any], tiny_folder: Path, folder: Path) -> None:
    again = ask(tiny_folder, folder, "--budget", f"{LIMIT}KL", "--json").json()
    assert again["allocation"] == facts["allocation"]
    assert len(again["trials"]) == len(facts["trials"]), "nothing is evaluated twice"


def test_a_looser_limit_is_smaller_and_others_hold_too(
    facts: dict[str, Any], tiny_folder: Path, folder: Path
) -> None:
    asked = ("--budget", f"{3 * LIMIT}KL", "--budget", "2.5bits", "--json")
    loose = ask(tiny_folder, folder, *asked).json()
    assert loose["total_bytes"] < facts["total_bytes"]
    assert LIMIT < loose["goal"]["reached"] <= 3 * LIMIT
    assert loose["effective_bits"] <= 2.5 < facts["effective_bits"]


def test_a_limit_that_another_budget_excludes(tiny_folder: Path, folder: Path) -> None:
    ran = ask(tiny_folder, folder, "--budget", "0.001KL", "--budget", "2.4bits")
    assert ran.code == 2
    assert "budget must be at least 0." in ran.err and "within 2.4bits" in ran.err
    assert "Got 0.001KL" in ran.err and "loosen a budget" in ran.err


def test_minimize_needs_a_limit_on_the_loss(tiny_folder: Path, folder: Path) -> None:
    ran = ask(tiny_folder, folder, "--budget", BUDGET, "--minimize", "latency")
    assert ran.code == 2 and "must go with a limit on the loss" in ran.err
    ran = ask(tiny_folder, folder, "--budget", "0.1KL", "--minimize", "time")
    assert ran.code == 2 and "minimize must be one of bytes, latency. Got 'time'" in ran.err


def test_the_tightest_loss_counts_and_costs_stay() -> None:
    budgets = [Budget("loss", 0.2, "0.2KL"), Budget("bits", 7, "x"), Budget("loss", 0.1, "0.1KL")]
    goal, others = split_goal(budgets, None)
    assert goal == Goal(budgets[2], "bytes") and others == [budgets[1]]
    assert split_goal(budgets[1:2], None) == (None, others)


def test_the_fastest_that_keeps_a_loss(tiny_folder: Path, tmp_path: Path) -> None:
    """Prices of a registered target, where two bits take longer than four."""
    from autocompress.targets import TARGETS, register_target

    def slow(level: object) -> int:
        return 9 if str(level).startswith("w2") else 1

    @register_target("slow-at-two-bits")
    def price(space, target):
        entries = tuple(
            {lv: layer.storage_bits(lv) * slow(lv) for lv in allowed}
            for layer, allowed in zip(space.layers, space.levels, strict=True)
        )
        return autocompress.CostTable("latency", "ms", 0.0, entries)

    try:
        asked = ("--budget", f"{LIMIT}KL", "--target", "slow-at-two-bits", "--json")
        fast = ask(tiny_folder, tmp_path, *asked, "--minimize", "latency").json()
        small = ask(tiny_folder, tmp_path, *asked).json()
    finally:
        del TARGETS["slow-at-two-bits"]
    assert fast["goal"]["minimized"] == "latency" and fast["goal"]["reached"] <= LIMIT

    def latency(facts: dict[str, Any]) -> int:
        return sum(row["bits"] * slow(row["level"]) for row in facts["allocation"])

    assert latency(fast) < latency(small), "with bytes made small instead, they would be equal"
    assert fast["total_bytes"] > small["total_bytes"]
