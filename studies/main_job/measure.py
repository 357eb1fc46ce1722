"""Time the level database and the scoring of candidates on this machine.

python studies/main_job/measure.py database WORK_FOLDER    # 5 levels, 32,768 tokens
python studies/main_job/measure.py throughput WORK_FOLDER  # after `database`
python studies/main_job/measure.py exactness WORK_FOLDER   # top-k loss against full logits
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

from autocompress.config import StudyConfig
from autocompress.core import Fidelity
from autocompress.opening import make_evaluator
from autocompress.progress import Silent
from autocompress.quality import BATCH, TOP, window_logits
from autocompress.session import Session, complete_database, open_session

SPACE = """
name = "five-levels"
levels = ["w2g64", "w3g64", "w4g64", "w5g64", "w6g64"]
"""
ROUNDS = 7


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("database", "throughput", "exactness"))
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as space:
        space.write(SPACE)
        space.flush()
        config = StudyConfig(space=space.name, run=arguments.work / "five-levels")
        session = open_session(config, Silent())
    {"database": database, "throughput": throughput, "exactness": exactness}[arguments.what](
        session
    )


def database(session: Session) -> None:
    """Build the database from nothing: seconds, size, memory."""
    start, cpu = time.perf_counter(), time.process_time()
    complete_database(session)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{session.windows.calibrate.size:,} tokens, {len(session.space.layers)} layers, "
        f"5 levels: {wall:.0f} s wall, {cpu:.0f} s CPU, {session.database.bytes() / 1e6:.0f} MB, "
        f"peak memory {peak:.2f} GB, load {Path('/proc/loadavg').read_text().split()[0]}"
    )


@torch.inference_mode()
def throughput(session: Session) -> None:
    """Score candidates, and run plain forward passes of the same windows, in turns."""
    complete_database(session)
    evaluator = make_evaluator(session)
    levels = session.space.uniform_levels()
    parent = session.space.uniform(levels[1])
    fidelity = Fidelity(8 * session.config.window)
    windows = torch.from_numpy(session.windows.subset(fidelity))
    evaluator(parent, fidelity)
    plain, scored = [], []
    for round_ in range(ROUNDS):
        child = parent.swap(round_, levels[2]).swap(100 + round_, levels[0])
        start = time.perf_counter()
        evaluator(child, fidelity)
        scored.append(fidelity.tokens / (time.perf_counter() - start))
        start = time.perf_counter()
        for batch in windows.split(BATCH):
            session.loaded.model(input_ids=batch, use_cache=False)
        plain.append(fidelity.tokens / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(scored, plain, strict=True)]
    print(
        f"{fidelity.tokens:,} tokens, {ROUNDS} rounds, tokens/s: scoring "
        f"{statistics.median(scored):.0f}, plain forward {statistics.median(plain):.0f}; ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


@torch.inference_mode()
def exactness(session: Session) -> None:
    """The loss from the dense model's top tokens and tail mass, against all logits."""
    complete_database(session)
    evaluator = make_evaluator(session)
    fidelity = Fidelity(8 * session.config.window)
    windows = torch.from_numpy(session.windows.subset(fidelity))
    dense = [logits.clone() for logits in window_logits(evaluator.stitched.restore(), windows)]
    for level in session.space.uniform_levels():
        candidate = evaluator.stitched.stitch(session.space.uniform(level))
        full = []
        for one, two in zip(dense, window_logits(candidate, windows), strict=True):
            p, q = (logits.float().log_softmax(1) for logits in (one, two))
            full.append((p.exp() * (p - q)).sum(1).mean())
        exact = float(torch.stack(full).mean())
        compact = evaluator(session.space.uniform(level), fidelity).loss
        print(
            f"{level}: full logits {exact:.5f}, top {TOP} and tail {compact:.5f} nats/token, "
            f"short by {1 - compact / exact:.2%}"
        )


if __name__ == "__main__":
    main()
