import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from toys import ToyLoss, toy_space

from autocompress import jsonl
from autocompress.core import Fidelity, Score
from autocompress.cost import size_tables
from autocompress.errors import OutputError, SpaceError, StudyError
from autocompress.levels import parse_level
from autocompress.study import Study

SPACE = toy_space(1)
COSTS = size_tables(SPACE, 1000)
UNIFORM = [SPACE.uniform(level) for level in SPACE.levels[0]]
AT = Fidelity(64, seed=3)
FACTS = {"model": "m1", "calibration": {"windows": (1, 2)}}


def open_study(path, score=None, facts=FACTS):
    return Study(path, SPACE, COSTS, facts, score or ToyLoss(SPACE))


def table(path):
    return path / "evaluations.jsonl"


def test_what_is_known_is_answered_from_the_table(tmp_path):
    score = ToyLoss(SPACE)
    with open_study(tmp_path, score) as study:
        first = study.evaluate([UNIFORM[0], UNIFORM[1], UNIFORM[0]], AT, "uniform")
        again = study.evaluate([UNIFORM[1]], AT, "other")
        study.evaluate([UNIFORM[1]], Fidelity(64, seed=4), "uniform")
        assert (score.calls, study.fresh, study.tokens) == (3, 3, 192)
        assert first[0] is first[2]
        assert again == [first[1]]
        assert study.at(AT) == first[:2]
        trials = study.trials
    with open_study(tmp_path, score) as study:
        assert study.evaluate([UNIFORM[0], UNIFORM[1]], AT, "uniform") == first[:2]
        assert (study.trials, study.fresh, study.tokens, score.calls) == (trials, 0, 192, 3)


def test_windows_are_scored_once_for_all_fidelities_of_a_seed(tmp_path):
    asked = []

    def score(allocation, fidelity, known):
        asked.append((fidelity.tokens, known))
        return ToyLoss(SPACE)(allocation, fidelity, known)

    with open_study(tmp_path, score) as study:
        for tokens in (32, 64, 16, 64):
            study.evaluate(UNIFORM[:1], Fidelity(tokens, seed=3), "x")
        assert asked == [(32, 0), (64, 2)]
        assert study.tokens == 64
        whole = ToyLoss(SPACE)(UNIFORM[0], Fidelity(64, seed=3))
        assert [trial.score for trial in study.trials] == [
            whole.first(windows) for windows in (2, 4, 1)
        ]
        trials = study.trials
    with open_study(tmp_path, score) as study:
        assert (study.trials, study.tokens) == (trials, 64)
        study.evaluate(UNIFORM[:1], Fidelity(80, seed=3), "x")
        study.evaluate(UNIFORM[:1], Fidelity(32, seed=4), "x")
        study.evaluate(UNIFORM[:1], Fidelity(32, seed=3, split="test"), "x")
        assert asked[2:] == [(80, 4), (32, 0), (32, 0)]


def test_rows_are_what_the_documentation_says(tmp_path):
    with open_study(tmp_path) as study:
        (trial,) = study.evaluate([UNIFORM[0]], AT, "uniform w2g64")
        study.evaluate([UNIFORM[0]], Fidelity(16), "uniform w2g64")
        study.spend(99, "sensitivities")
    rows = [json.loads(line) for line in table(tmp_path).read_text().splitlines()]
    key = UNIFORM[0].key
    assert rows[0] == {"allocation": key, "levels": ["w2g64"] * 4}
    seconds = rows[1].pop("seconds")
    assert seconds >= 0
    assert rows[1] == {
        "number": 0,
        "allocation": key,
        "fidelity": {"tokens": 64, "seed": 3, "split": "search", "every": 1},
        "loss": trial.loss,
        "losses": list(trial.score.losses),
        "nlls": list(trial.score.nlls),
        "scored": 64,
        "costs": {"bits": trial.costs[0], "bytes": trial.costs[1]},
        "origin": "uniform w2g64",
    }
    assert [set(row) & {"levels", "number", "spent"} for row in rows[2:]] == [{"number"}, {"spent"}]
    with open_study(tmp_path) as study:
        assert study.tokens == 64 + 16 + 99
        assert study.spent == {"search": 80, "sensitivities": 99}
        assert study.spent_until == [64, 80]


def test_scores_of_some_positions_stand_apart_from_those_of_all(tmp_path):
    score, some = ToyLoss(SPACE), Fidelity(64, seed=3, every=4)
    with open_study(tmp_path, score) as study:
        (whole,) = study.evaluate(UNIFORM[:1], AT, "x")
        (part,) = study.evaluate(UNIFORM[:1], some, "x")
        assert (score.calls, study.at(AT), study.at(some)) == (2, [whole], [part])
        assert study.tokens == 128  # all of a window is read, whatever is scored of it
        study.evaluate(UNIFORM[:1], Fidelity(32, seed=3, every=4), "x")
        assert score.calls == 2
        trials = study.trials
    with open_study(tmp_path) as study:
        assert study.trials == trials


def test_rows_from_before_positions_are_rows_of_all_positions(tmp_path):
    with open_study(tmp_path) as study:
        (trial,) = study.evaluate(UNIFORM[:1], AT, "x")
    rows = table(tmp_path).read_text()
    assert ',"every":1}' in rows.replace(" ", "")
    table(tmp_path).write_text(rows.replace(" ", "").replace(',"every":1}', "}"))
    with open_study(tmp_path) as study:
        assert study.evaluate(UNIFORM[:1], AT, "x") == [trial]
        assert study.fresh == 0


class Groups:
    """Scores several at once, and remembers how many and behind which windows."""

    def __init__(self, fail_at=None):
        self.asked, self._fail_at, self.loss = [], fail_at, ToyLoss(SPACE)

    def __call__(self, allocation, fidelity, known):
        raise AssertionError("asked for one alone")

    def together(self, allocations, fidelity, known):
        if len(self.asked) == self._fail_at:
            raise KeyboardInterrupt
        self.asked.append((list(allocations), known))
        return [self.loss(allocation, fidelity, known) for allocation in allocations]


MANY = [
    UNIFORM[0].swap(i, level).swap(3, other)
    for i in range(3)
    for level in SPACE.levels[0][1:3]
    for other in SPACE.levels[0][1:4]
]


def test_several_are_scored_together_and_are_what_they_are_alone(tmp_path):
    groups = Groups()
    with open_study(tmp_path / "together", groups) as study:
        trials = study.evaluate([*MANY, MANY[0]], AT, "x")
        assert [len(them) for them, _ in groups.asked] == [8, 8, 2]
        asked = [it for them, _ in groups.asked for it in them]
        assert asked == sorted(MANY, key=lambda it: [str(level) for level in it.levels])
    with open_study(tmp_path / "alone") as study:
        alone = study.evaluate([*MANY, MANY[0]], AT, "x")
    assert [(it.allocation, it.score) for it in trials] == [
        (it.allocation, it.score) for it in alone
    ]
    assert trials[0] is trials[-1]
    with open_study(tmp_path / "together") as study:
        assert study.evaluate(MANY, AT, "x") == trials[:-1] and study.fresh == 0


def test_a_group_has_the_same_windows_behind_it(tmp_path):
    groups = Groups()
    with open_study(tmp_path, groups) as study:
        study.evaluate(MANY[:2], Fidelity(32, seed=3), "x")
        trials = study.evaluate(MANY[:5], AT, "x")
        assert sorted((len(them), known) for them, known in groups.asked[1:]) == [(2, 2), (3, 0)]
        assert study.tokens == 2 * 64 + 3 * 64
    assert [it.score for it in trials] == [ToyLoss(SPACE)(it, AT) for it in MANY[:5]]


def test_an_interruption_loses_one_group_of_limited_tokens(tmp_path):
    long = Fidelity(1 << 14)
    with (
        open_study(tmp_path, groups := Groups(fail_at=1)) as study,
        pytest.raises(KeyboardInterrupt),
    ):
        study.evaluate(MANY, long, "x")
    assert [len(them) for them, _ in groups.asked] == [4]  # 65,536 tokens
    with open_study(tmp_path) as study:
        assert [it.allocation for it in study.trials] == groups.asked[0][0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_infinite(tmp_path, bad):
    with open_study(tmp_path, lambda *_: Score((bad, 1.0), (bad, 1.0))) as study:
        (trial,) = study.evaluate([UNIFORM[0]], AT, "x")
        assert trial.loss == trial.perplexity == math.inf
    assert "null" in table(tmp_path).read_text()
    assert not {"NaN", "Infinity"} & set(table(tmp_path).read_text().split())
    with open_study(tmp_path) as study:
        assert study.trials == [trial]


def test_a_torn_last_line_is_dropped_wherever_it_was_torn(tmp_path):
    with open_study(tmp_path) as study:
        study.evaluate(UNIFORM[:2], AT, "x")
    whole = table(tmp_path).read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for cut in range(start, len(whole), 7):
        table(tmp_path).write_bytes(whole[:cut])
        with open_study(tmp_path) as study:
            assert len(study.trials) == 1
            study.evaluate(UNIFORM[:2], AT, "x")
            assert study.fresh == 1
        with open_study(tmp_path) as study:
            assert len(study.trials) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [lines[0], lines[1][:-9], *lines[2:]],
        lambda lines: [lines[0].replace("w2g64", "w3g64"), *lines[1:]],
        lambda lines: lines[1:],
        lambda lines: [*lines[:2], *lines],
        lambda lines: [*lines, '{"number": 2, "allocation": "feed", "fidelity": {}}'],
        lambda lines: [*lines, "[]"],
        lambda lines: [*lines, "7"],
    ],
)
def test_damage_before_the_end_is_an_error(tmp_path, damage):
    with open_study(tmp_path) as study:
        study.evaluate(UNIFORM[:2], AT, "x")
    lines = table(tmp_path).read_text().splitlines()
    table(tmp_path).write_text("\n".join(damage(lines)) + "\n")
    with pytest.raises(StudyError, match="damage at line"), open_study(tmp_path):
        pass


def test_other_facts_are_named_and_refused(tmp_path):
    with open_study(tmp_path):
        pass
    with open_study(tmp_path):
        pass
    others = {"model": "m2", "calibration": {"windows": [1, 2]}, "space": "s"}
    with (
        pytest.raises(StudyError, match="other model, space in"),
        open_study(tmp_path, None, others),
    ):
        pass


def test_a_damaged_or_missing_study_file(tmp_path):
    with open_study(tmp_path) as study:
        study.evaluate(UNIFORM[:1], AT, "x")
    facts = tmp_path / "study.json"
    facts.write_text("{")
    with pytest.raises(StudyError, match="must be JSON"), open_study(tmp_path):
        pass
    facts.unlink()
    with pytest.raises(StudyError, match="must have study"), open_study(tmp_path):
        pass


def test_two_runs_on_one_study(tmp_path):
    with (
        open_study(tmp_path) as study,
        pytest.raises(StudyError, match="two runs on one study"),
        open_study(tmp_path),
    ):
        pass
    with open_study(tmp_path) as study:
        assert study.trials == []


def test_an_allocation_outside_the_space(tmp_path):
    with open_study(tmp_path) as study, pytest.raises(SpaceError, match="dense"):
        study.evaluate([UNIFORM[0].swap(0, parse_level("dense"))], AT, "x")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"), open_study(tmp_path / "file" / "run"):
        pass


class FullDisk:
    """A raw file on a disk with room for `room` more bytes."""

    def __init__(self, file, room):
        self._file, self.room = file, room

    def write(self, content):
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = self._file.write(content[: self.room])
        self.room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_a_full_disk_leaves_a_table_that_loads(tmp_path):
    with open_study(tmp_path) as study:
        study.evaluate(UNIFORM[:1], AT, "x")
        lines = study._table
        whole = table(tmp_path).read_bytes()
        lines._file = disk = FullDisk(lines._file, 40)
        with pytest.raises(OutputError, match="No space left"):
            study.evaluate(UNIFORM[1:2], AT, "x")
        assert table(tmp_path).read_bytes() == whole
        disk.room = 10**6
        study.evaluate(UNIFORM[1:2], AT, "x")
        trials = study.trials
    with open_study(tmp_path) as study:
        assert study.trials == trials
        assert len(trials) == 2


def test_a_full_disk_leaves_no_half_written_study_file(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(jsonl.os, "fsync", refuse)
        with pytest.raises(OutputError, match="No space left"), open_study(tmp_path):
            pass
    assert not list(tmp_path.glob("*.json*")) + list(tmp_path.glob("*.tmp"))
    with open_study(tmp_path):
        pass


CHILD = """
    import sys, time
    sys.path[:0] = {path!r}
    from test_study import AT, UNIFORM, open_study, ToyLoss, SPACE
    from pathlib import Path
    loss = ToyLoss(SPACE)
    def score(allocation, fidelity, known):
        if loss.calls == 2:
            print("two are done", flush=True)
            time.sleep(60)
        return loss(allocation, fidelity, known)
    with open_study(Path({run!r}), score) as study:
        study.evaluate(UNIFORM, AT, "x")
"""


def test_kill_9_loses_only_the_evaluation_it_interrupts(tmp_path):
    code = textwrap.dedent(CHILD.format(path=[p for p in sys.path if p], run=str(tmp_path)))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env) as child:
        assert child.stdout.readline() == b"two are done\n"
        with pytest.raises(StudyError, match="two runs"), open_study(tmp_path):
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
    with table(tmp_path).open("ab") as file:
        file.write(b'{"number": 2, "origin": "' + b"x" * 2000)  # a kill inside the write
    with open_study(tmp_path) as study:
        assert len(study.trials) == 2
        trials = study.evaluate(UNIFORM, AT, "x")
        assert study.fresh == len(UNIFORM) - 2
    for line in table(tmp_path).read_bytes().splitlines():
        json.loads(line)
    with open_study(tmp_path / "undisturbed") as study:
        assert study.evaluate(UNIFORM, AT, "x") == trials
