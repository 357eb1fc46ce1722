"""Candidates scored per second beside a plain full forward for each, in interleaved rounds.

python studies/search/throughput.py WORK_FOLDER offspring orphans apart --rounds 5
python studies/search/throughput.py WORK_FOLDER ranks --tokens 4096  # what some positions tell
python studies/search/throughput.py WORK_FOLDER raced --tokens 8192  # races, timed

WORK_FOLDER holds the level database of `space.toml`, which is built when it is missing. Loads are
groups of 8 candidates on `--tokens` search tokens:

- offspring: they differ from their parent in 2 to 6 random layers. A search has scored the parent
  before, so its pass is not timed;
- orphans: the same, and nothing of the parent is kept;
- apart: all layers take random levels, so that nothing is shared.

The plain pass of a candidate stitches, calls the model on the same windows, and takes the same
loss from a float32 log-softmax of all logits. It is timed on the first candidates of each group.

Seconds are of CPU time, all threads together, so that other processes disturb less: use one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from autocompress.config import StudyConfig
from autocompress.core import Allocation, Fidelity, Score, Trial
from autocompress.evaluator import Evaluator
from autocompress.levels import parse_level
from autocompress.machine import describe_machine
from autocompress.opening import make_evaluator
from autocompress.progress import Silent
from autocompress.quality import (
    Teacher,
    divergence,
    log_probabilities,
    vocabulary_of,
    window_logits,
)
from autocompress.session import complete_database, open_session
from autocompress.strategies.racing import race
from autocompress.study import Study

SPACE = Path(__file__).with_name("space.toml")
LOADS = ("offspring", "orphans", "apart")
SIDES = ("plain", "shared", "some")  # what is timed in turns
PARENT = "w3g64"
GROUP = 8
PLAIN = 2  # candidates of a group that the plain pass is timed on
EVERY = 8  # of `some`, which scores one in so many positions
SUBSETS = (1, 2, 4, 8, 16, 32)


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("what", nargs="+", choices=(*LOADS, "ranks", "raced"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024, help="of a candidate")
    parser.add_argument("--candidates", type=int, default=16, help="of `ranks`")
    arguments = parser.parse_args()
    evaluator = open_evaluator(arguments.work)
    for what in arguments.what:
        if what == "ranks":
            ranks(evaluator, arguments.candidates, arguments.tokens)
        elif what == "raced":
            raced(evaluator, arguments.rounds, arguments.tokens)
        else:
            speed(evaluator, what, arguments.rounds, arguments.tokens)


def open_evaluator(work: Path) -> Evaluator:
    """The evaluator of the default model on the study's space."""
    session = open_session(StudyConfig(space=str(SPACE), run=work), Silent())
    complete_database(session)
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"{describe_machine(session.loaded.model.dtype)}, load {load}", flush=True)
    evaluator = make_evaluator(session)
    evaluator.teacher("search")
    for level in session.space.uniform_levels():  # weights are decoded once, before any clock
        evaluator.stitched.stitch(session.space.uniform(level))
    return evaluator


def speed(evaluator: Evaluator, load: str, rounds: int, tokens: int) -> None:
    """Print the median candidates per second of every side, and of its ratio to the plain pass."""
    rng, rates, errors = np.random.default_rng(0), dict[str, list[float]](), list[float]()
    plain(evaluator, [parent_of(evaluator)], Fidelity(tokens))  # touches everything once
    for _ in range(rounds):
        group = draw(evaluator, load, rng)
        found: dict[str, list[Score]] = {}
        for side in rng.permutation(SIDES):
            rate, found[side] = timed(evaluator, load, side, group, tokens)
            rates.setdefault(side, []).append(rate)
        errors.append(difference(found["shared"], found["plain"]))
        now = ", ".join(f"{side} {values[-1]:.3f}" for side, values in rates.items())
        print(f"{load}, round {len(errors)}: {now} candidates/s", flush=True)
    for side, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates["plain"], strict=True)]
        print(
            f"{load}, {side}: {statistics.median(values):.3f} candidates/s "
            f"({min(values):.3f} to {max(values):.3f}), {statistics.median(ratios):.2f} times "
            f"plain ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(
        f"{rounds} rounds of {GROUP} candidates on {tokens:,} tokens; a window's loss differs from "
        f"the plain one's by {max(errors):.1e} at most, relatively"
    )


def timed(
    evaluator: Evaluator, load: str, side: str, group: list[Allocation], tokens: int
) -> tuple[float, list[Score]]:
    """Candidates per second of one side, and their scores."""
    fidelity = Fidelity(tokens, every=EVERY if side == "some" else 1)
    evaluator.forward.forget()
    if load == "offspring" and side != "plain":
        evaluator(parent_of(evaluator), fidelity)
    if side == "plain":
        start = time.process_time()
        scores = plain(evaluator, group[:PLAIN], fidelity)
        return len(scores) / (time.process_time() - start), scores
    space = evaluator.stitched.space
    with (
        tempfile.TemporaryDirectory() as folder,
        Study(Path(folder), space, (), {}, evaluator) as study,
    ):
        start = time.process_time()
        trials = study.evaluate(group, fidelity, load)
        return len(trials) / (time.process_time() - start), [trial.score for trial in trials]


def raced(evaluator: Evaluator, rounds: int, tokens: int) -> None:
    """Print how fast a race of parent and offspring finds the best, and whether it is the best.

    Beside it everyone has a plain pass over all windows.
    """
    rng = np.random.default_rng(2)
    plain(evaluator, [parent_of(evaluator)], Fidelity(1024))  # touches everything once
    for number in range(rounds):
        group = [parent_of(evaluator), *draw(evaluator, "offspring", rng)]
        evaluator.forward.forget()
        start = time.process_time()
        first, share = one_race(evaluator, group, tokens)
        middle = time.process_time()
        scores = plain(evaluator, group, Fidelity(tokens))
        times = (time.process_time() - middle) / (middle - start)
        losses = [score.loss for score in scores]
        best = group[losses.index(min(losses))]
        print(
            f"round {number + 1}: {len(group)} candidates on {tokens:,} tokens, raced with "
            f"{share:.1%} of them in {middle - start:.1f} s, {times:.2f} times as fast as plain; "
            f"{'the same' if first.allocation == best else 'another'} winner: loss "
            f"{first.loss:.5f}, the best {min(losses):.5f}, spread {statistics.stdev(losses):.5f}",
            flush=True,
        )


def one_race(evaluator: Evaluator, group: list[Allocation], tokens: int) -> tuple[Trial, float]:
    """A race's winner, and the share of the tokens that it took."""
    space, asked = evaluator.stitched.space, dict[str, int]()
    with (
        tempfile.TemporaryDirectory() as folder,
        Study(Path(folder), space, (), {}, evaluator) as study,
    ):

        def evaluate(them: Sequence[Allocation], at: Fidelity, origin: str) -> list[Trial]:
            asked.update({it.key: at.tokens for it in them})
            return study.evaluate(them, at, origin)

        problem: Any = SimpleNamespace(
            window=evaluator.windows.window, fidelity=Fidelity, evaluate=evaluate
        )
        first, *_ = race(problem, group, tokens, "raced")
    return first, sum(asked.values()) / (len(group) * tokens)


def parent_of(evaluator: Evaluator) -> Allocation:
    """Of all offspring."""
    return evaluator.stitched.space.uniform(parse_level(PARENT))


def draw(evaluator: Evaluator, load: str, rng: np.random.Generator) -> list[Allocation]:
    """A group of candidates."""
    space, parent = evaluator.stitched.space, parent_of(evaluator)
    count = len(space.layers)
    group = []
    for _ in range(GROUP):
        changed = range(count)
        if load != "apart":
            changed = rng.choice(count, rng.integers(2, 7), replace=False)
        child = parent
        for index in changed:
            child = child.swap(int(index), rng.choice(space.neighbours(child, int(index))))
        group.append(child)
    return group


@torch.inference_mode()
def plain(evaluator: Evaluator, group: list[Allocation], fidelity: Fidelity) -> list[Score]:
    """A full forward per candidate, and its loss from all logits at once."""
    rows = torch.from_numpy(evaluator.windows.rows(fidelity))
    reference = evaluator.teacher(fidelity.split).rows(rows)
    scores = []
    for allocation in group:
        model, losses, nlls = evaluator.stitched.stitch(allocation), [], []
        for part in reference.batches(vocabulary_of(model)):
            logits = model(input_ids=part.windows, use_cache=False).logits
            logp = logits.float().log_softmax(2)
            following = part.windows[:, 1:, None]
            nlls += (-logp[:, :-1].gather(2, following)).mean((1, 2)).tolist()
            for i, row in enumerate(logp.gather(2, part.index.long())):
                losses.append(float(divergence(part.logp[i], part.tail[i], row).mean()))
        scores.append(Score(tuple(losses), tuple(nlls)))
    return scores


def difference(found: list[Score], expected: list[Score]) -> float:
    """The largest relative difference of a window's loss."""
    return max(
        abs(a - b) / b
        for one, two in zip(found, expected, strict=False)  # the plain ones are fewer
        for a, b in zip(one.losses, two.losses, strict=True)
    )


@torch.inference_mode()
def ranks(evaluator: Evaluator, candidates: int, tokens: int) -> None:
    """Print how offspring rank by the first half of the windows, at some positions, and by all.

    Losses at some positions are those of the full pass, so one pass serves every subset.
    """
    rng, fidelity = np.random.default_rng(1), Fidelity(tokens)
    rows = torch.from_numpy(evaluator.windows.rows(fidelity))
    reference = evaluator.teacher(fidelity.split).rows(rows)
    losses = []  # of every candidate: (windows, window)
    for start in range(0, candidates, GROUP):
        for allocation in draw(evaluator, "offspring", rng)[: candidates - start]:
            evaluator.stitched.stitch(allocation)
            losses.append(torch.stack(list(_divergences(evaluator, reference))).double())
    every = torch.stack(losses)  # (candidates, windows, window)
    half = every[:, : len(rows) // 2]
    for step in SUBSETS:
        some = half[:, :, Fidelity(tokens, every=step).positions].mean((1, 2))
        whole = [float(spearmanr(some, it.mean((1, 2))).statistic) for it in (half, every)]
        noise = (some - some.mean() - half.mean((1, 2)) + half.mean()).std()
        print(
            f"1 in {step} positions of {half.shape[1]} windows: rank correlation with all of them "
            f"{whole[0]:.3f}, with all of {every.shape[1]} windows {whole[1]:.3f}; differences "
            f"between candidates are off by {float(noise):.5f} (they spread by "
            f"{float(half.mean((1, 2)).std()):.5f}) nats/token"
        )


def _divergences(evaluator: Evaluator, reference: Teacher) -> Iterator[Tensor]:  # (window,) each
    for i, logits in enumerate(window_logits(evaluator.forward, reference.windows)):
        dense = reference.rows(i)
        logq, _ = log_probabilities(logits, dense.index, dense.windows)
        yield divergence(dense.logp, dense.tail, logq)


if __name__ == "__main__":
    main()
