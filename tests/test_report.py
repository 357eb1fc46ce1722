"""The report says what the facts say, survives missing facts, and trusts no string."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from facts import BLOCKS, SHAPES, make_facts

from autocompress.report import write_report
from autocompress.report.facts import layer_grid, results_table
from autocompress.report.plots import Axes, alike, front_plots, groups, progress_plot, ticks
from autocompress.report.verdict import verdict

VOID = {"meta", "wbr", "br"}
HOSTILE = "<script>alert(1)</script>\"'&|`*[x](http://evil.example)\n# pwned"


class Page(HTMLParser):
    """Well-formedness, the tags that occur, and the text a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"tags must be closed. Got {self.open} open."

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> must close {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += f" {data}"


def pages(facts: dict[str, Any], out: Path) -> tuple[Page, str, str]:
    before = copy.deepcopy(facts)
    write_report(facts, out)
    assert facts == before, "writing a report must not change the facts"
    html = (out / "report.html").read_text(encoding="utf-8")
    return Page(html), html, (out / "report.md").read_text(encoding="utf-8")


def spaced(text: str) -> str:
    return " ".join(text.replace("\N{NO-BREAK SPACE}", " ").split())


def test_both_forms_hold_the_figures(tmp_path: Path) -> None:
    page, _, markdown = pages(make_facts(), tmp_path)
    for figure in (
        *("SmolLM2-135M-Instruct at 3.50 bits per weight", "3.4997", "103.1 MB", "268.8 MB"),
        *("0.2364 ± 0.0059", "0.3010 ± 0.0075", "0.2460 ± 0.0062", "19.40", "15.40"),
        *("0.2320", "0.2380", "+1.9 %", "Uniform w3g64", "21 % below uniform w3g64"),
        *("w5g64", "534,528", "14 min 23 s", "autocompress search --budget 3.5bits"),
        *("371,557,344 of at most 371,589,120 bits", "pydoc_data.topics", "AMD EPYC 9R14"),
    ):
        assert figure in spaced(page.words), figure
        assert figure in spaced(markdown), figure


def test_html_stands_alone(tmp_path: Path) -> None:
    page, html, _ = pages(make_facts(), tmp_path)
    assert html.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", html)
    assert not {"src", "href", "onload"} & {name for name, _ in page.attributes}
    assert len(html) < 200_000
    assert "prefers-color-scheme: dark" in html and "@media print" in html


def test_every_layer_has_a_cell(tmp_path: Path) -> None:
    facts = make_facts()
    page, _, _ = pages(facts, tmp_path)
    titles = [value or "" for name, value in page.attributes if name == "title"]
    assert len(titles) == BLOCKS * len(SHAPES)
    entry = facts["allocation"][10]
    assert any(text.startswith(f"{entry['layer']}: {entry['level']}, ") for text in titles)


def test_a_tied_layer_has_the_same_column_in_every_block() -> None:
    names = [
        f"model.layers.{i}.self_attn.q_proj+model.layers.{i}.self_attn.k_proj" for i in range(3)
    ]
    entries = [
        {"layer": name, "level": "w3g64", "weights": 64, "bits": 200}
        for name in (*names, "lm_head", "h.2.attn.c_attn", "0.fc")
    ]
    grid = layer_grid(entries)
    assert grid.kinds == ("self_attn.q_proj+self_attn.k_proj", "fc", "attn.c_attn")
    assert [*grid.blocks] == [0, 1, 2]
    assert [entry["layer"] for entry in grid.others] == ["lm_head"]


def drop(facts: dict[str, Any], path: str) -> dict[str, Any]:
    *parents, last = path.split(".")
    inner = facts
    for parent in parents:
        inner = inner[parent]
    del inner[last]
    return facts


@pytest.mark.parametrize(
    "path",
    [
        *make_facts(),
        *("results.ilp", "results.winner", "results.dense", "results.uniform", "model.name"),
        *("results.winner.test", "results.uniform.search", "results.winner.test.kl_stderr"),
        *("results.winner.effective_bits", "machine.cpu", "tokens.total", "seconds.teacher"),
        *("results.uniform.test.tokens", "results.winner.test.perplexity", "space.weights"),
    ],
)
def test_any_fact_may_be_missing(path: str, tmp_path: Path) -> None:
    page, _, markdown = pages(drop(make_facts(), path), tmp_path)
    assert "None" not in page.words and "nan" not in page.words
    assert "None" not in markdown


def test_no_facts_at_all(tmp_path: Path) -> None:
    page, _, _ = pages({}, tmp_path)
    assert "not scored on test windows" in page.words


def test_nulls_are_missing_facts(tmp_path: Path) -> None:
    facts: dict[str, Any] = dict.fromkeys(make_facts())
    page, _, markdown = pages(facts, tmp_path)
    assert "None" not in page.words + markdown


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    facts = make_facts()
    facts["model"]["name"] = facts["command"] = facts["notes"][0] = HOSTILE
    facts["machine"]["cpu"] = facts["budgets"][0]["text"] = HOSTILE
    facts["space"]["name"] = facts["results"]["uniform"]["level"] = HOSTILE
    facts["allocation"][0]["layer"] = f"model.layers.0.{HOSTILE}"
    facts["allocation"][1]["level"] = facts["results"]["uniform"]["origin"] = HOSTILE
    facts["trials"][0]["origin"] = HOSTILE
    page, html, markdown = pages(facts, tmp_path)
    assert "script" not in page.tags and "<script" not in html
    assert "alert(1)" in page.words
    prose = "\n".join(line for line in markdown.splitlines() if not line.startswith("    "))
    assert "<script" not in prose
    assert not re.search(r"(?<!\\)\[x", prose), "links must be escaped"
    assert "\n# pwned" not in markdown
    widths = {
        len(re.findall(r"(?<!\\)\|", line)) for line in prose.splitlines() if line.startswith("| ")
    }
    assert widths <= {3, 4, 5, 6}, "a bar in a name must not add a column"


def test_verdict_names_the_gain_and_its_size() -> None:
    text = spaced(verdict(make_facts()))
    assert text.startswith("The searched allocation won")
    assert "21 % below uniform w3g64 (0.3010 at 3.30 bits)" in text
    assert "4 % below the ILP (0.2460 at 3.50 bits)" in text
    assert "part of the difference is size" in text


def test_verdict_admits_that_uniform_won() -> None:
    facts = make_facts()
    facts["results"]["winner"] = facts["results"]["uniform"]
    assert verdict(facts).startswith("No searched allocation beat uniform w3g64")


def test_verdict_admits_that_the_ilp_won() -> None:
    facts = make_facts()
    facts["results"]["winner"] = facts["results"]["ilp"]
    text = verdict(facts)
    assert text.startswith("The integer programme won, the search found nothing better")
    assert "below the ILP" not in text


def test_verdict_admits_a_loss_on_test_windows() -> None:
    facts = make_facts()
    facts["results"]["winner"]["test"]["kl"] = 0.35
    text = verdict(facts)
    assert text.startswith("The search lost to uniform")
    assert "16 % above uniform w3g64" in spaced(text)


def test_verdict_doubts_a_difference_within_the_noise() -> None:
    facts = make_facts()
    facts["results"]["winner"]["test"]["kl"] = 0.244
    assert "at 3.50 bits, within the standard error)" in verdict(facts)


def test_results_table_keeps_only_what_was_scored() -> None:
    facts = drop(make_facts(), "results.ilp")
    table = results_table(facts)
    assert [row[0] for row in table.rows] == ["Dense", "Uniform w3g64", "Winner"]
    assert table.strong == 2


def test_fidelities_are_never_joined() -> None:
    facts = make_facts()
    assert [key[:2] for key in groups(facts)] == [
        *(("search", 512), ("search", 4096), ("search", 16_384), ("validate", 16_384)),
    ]
    assert progress_plot(facts, 900, 300).count('class="line') == 3
    for trial in facts["trials"]:
        trial["seed"] = trial["number"]  # now no two losses compare
    assert 'class="line' not in progress_plot(facts, 900, 300)
    assert [*front_plots(make_facts(), 300, 250)] == [
        *(("search", 512), ("search", 4096), ("search", 16_384)),
        *(("validate", 16_384), ("test", 16_384)),
    ]


def test_many_trials_stay_small(tmp_path: Path) -> None:
    facts = make_facts()
    facts["trials"] = [
        {**trial, "number": i, "spent": 512 * (i + 1)}
        for i, trial in enumerate(facts["trials"] * 80)
    ]
    _, html, _ = pages(facts, tmp_path)
    assert len(html) < 1_000_000


def test_unfinished_losses_are_left_out() -> None:
    facts = make_facts()
    facts["trials"][3]["loss"], facts["trials"][4]["loss"] = float("inf"), None
    assert sum(map(len, groups(facts).values())) == len(facts["trials"]) - 2


@pytest.mark.parametrize("log", [False, True])
def test_axes_map_the_range_onto_the_frame(log: bool) -> None:
    axes = Axes(300, 200, (1.0, 3.0), (0.1, 10.0), log)
    left, bottom = axes.at(1.0, 0.1)
    right, top = axes.at(3.0, 10.0)
    assert 0 < left < right < 300 and 0 < top < bottom < 200
    assert axes.at(2.0, 1.0 if log else 5.05) == pytest.approx(
        ((left + right) / 2, (top + bottom) / 2)
    )


def test_ticks_are_round_and_alike() -> None:
    assert ticks(0.19, 0.31) == [0.2, 0.225, 0.25, 0.275, 0.3]
    assert alike([0.2, 0.225, 0.25]) == ["0.200", "0.225", "0.250"]
    assert alike([0, 100_000, 200_000]) == ["0", "100k", "200k"]
    assert alike([0, 2_500_000]) == ["0.0", "2.5M"]
