"""Options of commands that can compute on several processes, given to them as one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

Workers = Annotated[
    int | None, typer.Option(help="Processes that score and solve; default this one alone.")
]
WorkerThreads = Annotated[int, typer.Option(help="Of each of them.")]
Backend = Annotated[str, typer.Option(help="What runs workers: loky (here), dask or ray.")]
Scheduler = Annotated[
    str | None, typer.Option(help="Address of a running cluster; default one of this machine.")
]


def _options(
    workers: Workers = None,
    worker_threads: WorkerThreads = 1,
    backend: Backend = "loky",
    scheduler: Scheduler = None,
) -> None:
    """The options; commands read them from typer's context, as they read all settings."""


def with_workers(command: Callable[..., None]) -> Callable[..., None]:
    """The command with these options behind its own."""
    own = inspect.signature(_options, eval_str=True).parameters
    before = inspect.signature(command, eval_str=True)

    @wraps(command)
    def with_options(**given: Any) -> None:
        command(**{name: value for name, value in given.items() if name not in own})

    parameters = [*before.parameters.values(), *own.values()]
    with_options.__signature__ = before.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {it.name: it.annotation for it in parameters}
    return with_options
