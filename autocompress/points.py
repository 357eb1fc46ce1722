"""A point of a run's front becomes a result folder."""

from __future__ import annotations

from pathlib import Path

from autocompress.config import StudyConfig
from autocompress.core import Trial
from autocompress.opening import Opened, open_search
from autocompress.output import check_output
from autocompress.progress import Progress
from autocompress.result import Result, candidate_facts
from autocompress.run_record import find_run, recalled
from autocompress.runs import front_of, open_run
from autocompress.writing import dense_row, verify, write_result


def write_point(run: Path, number: int, out: Path, progress: Progress) -> Result:
    """Write the packed model of a point that `autocompress front` lists.

    Args:
        run: the run folder, or the result beside it.
        number: of the point, from 1.
        out: folder of the result.

    Raises:
        StudyError: no run folder, no such point, or a search is going on in it.
        OutputError: `out` is something else, or the disk refused.
    """
    check_output(out)
    path = find_run(run)
    trial = front_of(open_run(path)).point(number)
    config = StudyConfig(**recalled({"run": path}))  # its own `out` stays what it was
    with open_search(config, progress) as opened:
        winner = candidate_facts(opened.problem, _known(opened, trial))
        results = {"dense": dense_row(opened), "winner": winner}
        result = write_result(opened, out, trial.allocation, results, {})
        verify(opened, out, trial)
    return result


def _known(opened: Opened, trial: Trial) -> dict[str, Trial]:
    """Split -> the longest score of the point's allocation there; nothing is scored anew."""
    found = {"validate": trial}
    for other in opened.study.trials:
        split = other.fidelity.split
        before = found.get(split)
        longer = before is None or before.fidelity.tokens < other.fidelity.tokens
        if other.allocation == trial.allocation and other.fidelity.every == 1 and longer:
            found[split] = other
    return found
