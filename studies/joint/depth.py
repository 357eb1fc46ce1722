"""Depth: searched sublayers against rankings, at equal parameters, on test windows.

    python studies/joint/depth.py WORK rank taylor       # a ranking; without a name, all
    python studies/joint/depth.py WORK search 14 0       # budget in bits of 16, seed
    python studies/joint/depth.py WORK score 14 test     # everything known at a budget
    python studies/joint/depth.py WORK report test       # what REPORT.md holds

14, 12 and 10 bits of 16 are 12.5, 25 and 37.5 % of the weights of blocks left out. A ranking leaves
out units, the least important first, until the budget holds. Searches of one seed share a study, as
those of one run folder do: what one has measured costs the next no time, and counts all the same.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from depth_rankings import RANKINGS, Unit

from autocompress.config import StudyConfig
from autocompress.core import Allocation, Fidelity
from autocompress.cost import check_budgets, parse_budget
from autocompress.documents import SplitTokens
from autocompress.evaluator import Evaluator
from autocompress.files import write_json
from autocompress.levels import Dense, Drop
from autocompress.opening import make_evaluator, make_problem
from autocompress.progress import Lines
from autocompress.session import Session, complete_database, open_session
from autocompress.strategies import find_strategy
from autocompress.strategies.metering import metered
from autocompress.study import Study
from autocompress.windows import Windows

TOKENS = SplitTokens(calibrate=512, search=24576, validate=4096, test=8192)
RANKED = 2048  # search tokens that every ranking sees
SPEND = 300_000  # tokens of a search: the normal effort
BUDGETS = (14, 12, 10)


def open_work(work: Path) -> tuple[Session, Evaluator]:
    """The default model; calibration only tells how large outputs are."""
    config = StudyConfig(
        space="depth",
        tokens=TOKENS,
        spend=SPEND,
        run=work / "run",
        out=work / "out",
    )
    session = open_session(config, Lines())
    complete_database(session)
    return session, make_evaluator(session)


def rank(work: Path, *names: str) -> None:
    """Write rankings' units, the least important first."""
    session, evaluator = open_work(work)
    windows = session.windows.subset(Fidelity(RANKED, 0))
    for name, ranking in RANKINGS.items():
        file = work / f"ranking-{name}.json"
        if not file.exists() and (not names or name in names):
            write_json(file, {"units": ranking(session, evaluator, windows)})
            print(name, flush=True)


def shortened(session: Session, units: list[Unit], bits: float) -> Allocation:
    """The first units left out until the budget holds."""
    limit = parse_budget(f"{bits}bits", session.space).limit
    levels: list[Any] = [Dense()] * len(session.space.layers)
    for unit in units:
        for layer in unit:
            levels[layer] = Drop()
        if session.costs[0].total(Allocation(tuple(levels))) <= limit:
            break
    return Allocation(tuple(levels))


def search(work: Path, bits: float, seed: int, strategy: str = "auto") -> None:
    """Search at a budget; the best on all tokens it was compared on."""
    session, _ = open_work(work)
    name = f"{strategy}-{bits:g}-{seed}"
    config = replace(session.config, run=work / "runs" / f"seed-{seed}", seed=seed)
    session = replace(session, config=config, windows=shuffled(session.windows, seed))
    evaluator = make_evaluator(session)
    space, costs = session.space, session.costs
    budgets = check_budgets(space, costs, [parse_budget(f"{bits}bits", space)])
    with Study(config.run_folder, space, costs, session.facts(), evaluator) as study:
        problem = metered(make_problem(session, evaluator, study, space, costs, budgets))
        phases = {}
        run: Any = find_strategy(strategy)
        for found in run(spending=session.spending)(problem, np.random.default_rng(seed)):
            phases[found.origin] = found
            print(name, found.origin, f"{found.loss:.4f}", problem.spent(), flush=True)
        every = Fidelity(int(session.windows.validate.size), 0, "validate")
        finals = {it.allocation: origin for origin, it in phases.items()}
        trials = study.evaluate(list(finals), every, "finalist")
        best = min(trials, key=lambda trial: trial.loss)
        facts = {
            "dropped": dropped(best.allocation),
            "origin": finals[best.allocation],
            "ilp": dropped(phases["ilp"].allocation) if "ilp" in phases else None,
            "spent": problem.spent(),
            "validate": {finals[it.allocation]: it.loss for it in trials},
        }
    write_json(work / f"found-{name}.json", facts)


def shuffled(windows: Windows, seed: int) -> Windows:
    """Search windows in another order: a search measures on the first of them."""
    return replace(windows, search=np.random.default_rng(seed).permutation(windows.search))


def dropped(allocation: Allocation) -> list[int]:
    """Layers left out, by index."""
    return [i for i, level in enumerate(allocation.levels) if isinstance(level, Drop)]


def candidates(work: Path, session: Session, bits: float) -> dict[str, Allocation]:
    """Name -> what it leaves out at a budget."""
    found = {}
    for name in RANKINGS:
        file = work / f"ranking-{name}.json"
        if file.exists():
            units = [tuple(unit) for unit in json.loads(file.read_text())["units"]]
            found[name] = shortened(session, units, bits)
    for file in sorted(work.glob(f"found-*-{bits:g}-*.json")):
        facts = json.loads(file.read_text())
        found[file.stem.removeprefix("found-")] = leaving(session, facts["dropped"])
    return found


def leaving(session: Session, layers: list[int]) -> Allocation:
    """These layers left out."""
    gone = set(layers)
    return Allocation(
        tuple(Drop() if i in gone else Dense() for i in range(len(session.space.layers)))
    )


def score(work: Path, bits: float, split: str) -> None:
    """Scores of everything known at a budget on a whole split, kept by allocation."""
    session, evaluator = open_work(work)
    names = [layer.name for layer in session.space.layers]
    for name, allocation in candidates(work, session, bits).items():
        file = work / "scores" / f"{allocation.key}-{split}.json"
        if not file.exists():
            found = evaluator(allocation, Fidelity(getattr(TOKENS, split), 0, split))
            file.parent.mkdir(exist_ok=True)
            write_json(file, found._asdict())
        losses = json.loads(file.read_text())["losses"]
        facts = {
            "bits": session.costs[0].total(allocation) / session.space.weights,
            "losses": losses,
            "perplexity": float(np.exp(np.mean(json.loads(file.read_text())["nlls"]))),
            "dropped": [names[layer] for layer in dropped(allocation)],
        }
        write_json(work / "results" / split / f"{bits:g}-{name}.json", facts)
        print(f"{bits:g} {name:16} {facts['bits']:.3f} {np.mean(losses):.4f}", flush=True)


def report(work: Path, split: str) -> None:
    """Markdown rows: mean KL on a split, and how far below block influence."""
    for bits in BUDGETS:
        files = sorted((work / "results" / split).glob(f"{bits}-*.json"))
        if not files:
            continue
        rows = {it.stem.split("-", 1)[1]: json.loads(it.read_text()) for it in files}
        base = np.array(rows["influence"]["losses"])
        for name, facts in rows.items():
            losses = np.array(facts["losses"])
            gain = 100 * (1 - losses.mean() / base.mean())
            error = (losses - base).std(ddof=1) / len(base) ** 0.5
            attention = sum("self_attn" in it for it in facts["dropped"])
            print(
                f"| {100 * (1 - bits / 16):g} % | {name} | {facts['bits']:.2f} | {attention} + "
                f"{len(facts['dropped']) - attention} | {losses.mean():.4f} | ± {error:.4f} | "
                f"{facts['perplexity']:.1f} | {gain:.1f} % |"
            )


def main() -> None:
    """One of the commands above."""
    work, command, *rest = Path(sys.argv[1]), *sys.argv[2:]
    work.mkdir(parents=True, exist_ok=True)
    for split in ("validate", "test"):
        (work / "results" / split).mkdir(parents=True, exist_ok=True)
    if command == "search":
        search(work, float(rest[0]), int(rest[1]), *rest[2:])
    elif command == "score":
        score(work, float(rest[0]), rest[1])
    elif command == "rank":
        rank(work, *rest)
    else:
        report(work, *rest)


if __name__ == "__main__":
    main()
