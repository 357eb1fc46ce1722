"""Tasks of lm-eval on loaded models; the package is optional: pip install 'autocompress[eval]'."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.errors import ConfigError
from autocompress.progress import Progress
from autocompress.tables import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

BOOTSTRAPS = 100  # for standard errors of what is no mean, such as perplexities
Figures = dict[str, dict[str, dict[str, float]]]  # task -> metric -> model, model_stderr


def check_tasks(tasks: Sequence[str], folder: str | Path | None, limit: int | None) -> None:
    """Check what can be checked before any model is loaded.

    Raises:
        ConfigError: lm-eval is not installed, no folder is there, the limit is below 1, or no
            task has one of the names.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1 question. Got {limit}.")
    if not tasks:
        if folder is not None or limit is not None:
            raise ConfigError("--task-folder and --limit must go with --task NAME. Got no task.")
        return
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "tasks must have the package 'lm_eval', which is not installed. "
            "Run: pip install 'autocompress[eval]'"
        )
    if folder is not None and not any(Path(folder).expanduser().rglob("*.yaml")):
        raise ConfigError(f"--task-folder must hold tasks as YAML files. Got '{folder}'.")
    known = _manager(folder).all_tasks
    for name in tasks:
        if name not in known:
            where = f"'{folder}', which has {', '.join(sorted(known))}" if folder else "lm-eval"
            raise ConfigError(
                f"a task must be one of {where}. Got '{name}'.{did_you_mean(name, known)}"
            )


def score_tasks(
    models: Mapping[str, Any],
    tokenizer: Any,
    tasks: Sequence[str],
    folder: str | Path | None,
    limit: int | None,
    progress: Progress,
) -> Figures:
    """Every metric of every task for every model.

    Args:
        models: name -> loaded causal LM.
        tasks: names; see `check_tasks`.
        folder: of tasks of your own; None is lm-eval's own, most of which load data from the Hub.
        limit: questions of each task, at most.

    Returns:
        task -> metric -> `<model>` and, where lm-eval states one, `<model>_stderr`.

    Raises:
        ConfigError: a task cannot be loaded, most often because its data cannot.
    """
    found: Figures = {}
    for name, model in models.items() if tasks else ():
        progress.say(f"scoring the {name} model on {', '.join(tasks)}")
        for task, row in _run(model, tokenizer, tasks, folder, limit).items():
            for key, value in row.items():
                metric = key.partition(",")[0].removesuffix("_stderr")
                filtered = "," in key  # others, such as the alias, are no metrics
                if filtered and isinstance(value, int | float):
                    column = f"{name}_stderr" if "_stderr" in key else name
                    found.setdefault(task, {}).setdefault(metric, {})[column] = float(value)
    return found


def _manager(folder: str | Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if folder is None:
        return TaskManager()
    return TaskManager(include_path=str(Path(folder).expanduser()), include_defaults=False)


def _run(
    model: Any, tokenizer: Any, tasks: Sequence[str], folder: str | Path | None, limit: int | None
) -> dict[str, dict[str, Any]]:
    """lm-eval's own table of results for one model."""
    with _quiet(), redirect_stdout(sys.stderr):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            results = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1),
                tasks=list(tasks),
                task_manager=_manager(folder),
                limit=limit,
                log_samples=False,
                bootstrap_iters=BOOTSTRAPS,
            )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"the tasks {', '.join(tasks)} must be loadable. Got {type(error).__name__}: "
                f"{error}. Tasks of lm-eval load their data from the Hub; tasks of your own go "
                "with --task-folder."
            ) from error
    return dict(results["results"]) if results else {}


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its messages, here and nowhere else."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
