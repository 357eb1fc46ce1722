"""Workers: processes that compute beside this one, on an engine that joblib knows.

Jobs are functions of a module, so that any process finds them by name; whatever they need comes
with their arguments. A job whose worker dies is given to another one.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

from autocompress.errors import WorkerError
from autocompress.tables import did_you_mean

T = TypeVar("T")
Lost = tuple[type[BaseException], ...]

PACKAGES = {"loky": "joblib", "dask": "distributed", "ray": "ray"}  # backend -> what it needs
TRIES = 3  # times in a row that workers may die before a single job is done
REACH = "10s"  # in which a scheduler must answer
IDLE = 24 * 3600  # seconds that workers of this machine wait for jobs: gradients take their time


@dataclass(frozen=True)
class Workers:
    """Which processes score and solve.

    Args:
        count: at least 1; None is this process alone, or all that a cluster has.
        threads: of each, at least 1. Results do not depend on `count`; the last bits of a solved
            level may depend on this.
        backend: 'loky' (processes of this machine), 'dask' or 'ray'.
        scheduler: address of a cluster that runs; None is the one this process is connected to,
            or else one that is made on this machine. Not for loky.

    Raises:
        WorkerError: a value is out of range, or names nothing.
    """

    count: int | None = None
    threads: int = 1
    backend: str = "loky"
    scheduler: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("workers", self.count), ("worker_threads", self.threads)):
            if value is not None and value < 1:
                raise WorkerError(f"{name} must be at least 1. Got {value}.")
        if self.backend not in PACKAGES:
            hint = did_you_mean(self.backend, PACKAGES)
            known = ", ".join(PACKAGES)
            raise WorkerError(f"backend must be one of {known}. Got '{self.backend}'.{hint}")
        if self.scheduler is not None and self.backend == "loky":
            raise WorkerError(
                f"a scheduler must go with a backend that has one. Got '{self.scheduler}' for "
                "loky. Add --backend dask, or leave --scheduler out."
            )

        if self.threads != 1 and self.count is None and self.backend == "loky":
            raise WorkerError(
                f"worker_threads must go with workers. Got {self.threads} for none. Add --workers."
            )

    @property
    def alone(self) -> bool:
        """Whether this process computes everything itself."""
        return self.count == 1 or (self.count is None and self.backend == "loky")

    @property
    def own_threads(self) -> int | None:
        """Threads that this process scores and solves with; None leaves torch's number alone.

        As many as any worker has, so that one worker finds what several find, bit by bit.
        """
        return None if self.count is None and self.alone else self.threads


class Pool:
    """Several workers that take jobs.

    Args:
        settings: of joblib's `parallel_config`.
        size: workers, at least 1.
        threads: of each.
        lost: exceptions that say a worker died.
        say: told when workers died.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        size: int,
        threads: int,
        lost: Lost,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.size, self.threads = size, threads
        self._settings, self._lost, self._say = settings, lost, say

    def run(self, job: Callable[..., T], tasks: Sequence[Sequence[Any]]) -> list[T]:
        """What `job(*task)` returns for every task, in order.

        Tasks whose worker died are run again by new workers; what was done is kept.

        Raises:
            WorkerError: workers died `TRIES` times in a row without finishing anything.
        """
        found: dict[int, T] = {}
        failures = 0
        while len(found) < len(tasks):
            before = len(found)
            try:
                left = [i for i in range(len(tasks)) if i not in found]
                for number, result in self._results(job, [(i, tasks[i]) for i in left]):
                    found[number] = result
            except self._lost as error:
                failures = failures + 1 if len(found) == before else 1
                if failures == TRIES:
                    raise WorkerError(
                        f"workers must stay alive. Got {TRIES} deaths in a row, the last one: "
                        f"{_first_line(error)}. Check their memory, take fewer workers, and run "
                        "the same command again: what was finished is kept."
                    ) from error
                left = [i for i in range(len(tasks)) if i not in found]
                self._say(f"a worker died: {len(left)} of {len(tasks)} jobs are run again")
        return [found[number] for number in range(len(tasks))]

    def _results(
        self, job: Callable[..., T], tasks: Sequence[tuple[int, Sequence[Any]]]
    ) -> Iterator[tuple[int, T]]:
        """(number, result) as they come, so that a death later on takes nothing away.

        Joblib's backend of Ray returns all at once: a death takes what was asked for together.
        """
        import joblib

        as_they_come = self._settings["backend"] != "ray"
        with joblib.parallel_config(**self._settings):
            parallel = joblib.Parallel(
                return_as="generator_unordered" if as_they_come else "list",
                batch_size=1,
                pre_dispatch="all",
            )
            mine = os.getpid()
            yield from parallel(joblib.delayed(_run)(job, it, task, mine) for it, task in tasks)


def _run(job: Callable[..., T], number: int, task: Sequence[Any], asking: int) -> tuple[int, T]:
    """In a worker: Ctrl-C reaches it as well, but it is the search that ends at a safe point.

    Args:
        asking: process of the search, which runs jobs itself where there is one worker.
    """
    if os.getpid() != asking and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return number, job(*task)


@contextmanager
def open_pool(
    workers: Workers, say: Callable[[str], None] = lambda message: None
) -> Iterator[Pool | None]:
    """Workers that live while inside; None where this process is alone.

    Args:
        say: told what happens to workers.

    Raises:
        WorkerError: the backend is not installed, or its scheduler cannot be reached.
    """
    if workers.alone:
        yield None
        return
    package = PACKAGES[workers.backend]
    if find_spec(package) is None:
        raise WorkerError(
            f"the backend '{workers.backend}' must be installed. Got no package '{package}'. "
            f"Run: pip install 'autocompress[{workers.backend}]'."
        )
    make = {"loky": _open_loky, "dask": _open_dask, "ray": _open_ray}[workers.backend]
    with ExitStack() as stack:
        settings, size, lost = make(workers, stack)
        yield Pool(settings, size, workers.threads, lost, say)


Opened = tuple[dict[str, Any], int, Lost]  # settings of joblib, workers, what a death raises


def _open_loky(workers: Workers, stack: ExitStack) -> Opened:
    from joblib.externals.loky import get_reusable_executor
    from joblib.externals.loky.process_executor import BrokenProcessPool

    assert workers.count is not None
    stack.callback(lambda: get_reusable_executor().shutdown(wait=True, kill_workers=True))
    settings = {
        "backend": "loky",
        "n_jobs": workers.count,
        "inner_max_num_threads": workers.threads,
        "idle_worker_timeout": IDLE,
    }
    return settings, workers.count, (BrokenProcessPool,)


def _open_dask(workers: Workers, stack: ExitStack) -> Opened:
    from distributed import Client, LocalCluster
    from distributed.scheduler import KilledWorker

    if workers.scheduler is not None:
        try:
            client = stack.enter_context(Client(workers.scheduler, timeout=REACH))
        except (OSError, ValueError, TypeError) as error:
            raise _unreachable(workers, error) from error
    else:
        try:
            client = Client.current()
        except ValueError:  # none: a cluster of this machine's own
            cluster = LocalCluster(
                n_workers=workers.count or os.cpu_count(),
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
            )
            client = stack.enter_context(Client(stack.enter_context(cluster)))
    size = workers.count or max(1, sum(client.ncores().values()))
    return {"backend": "dask", "client": client, "n_jobs": -1}, size, (KilledWorker,)


def _open_ray(workers: Workers, stack: ExitStack) -> Opened:
    import ray
    from ray.exceptions import RayError
    from ray.util.joblib import register_ray

    if not ray.is_initialized():
        try:
            ray.init(workers.scheduler, num_cpus=None if workers.scheduler else workers.count)
        except Exception as error:  # it raises plain ones, too
            raise _unreachable(workers, error) from error
        stack.callback(ray.shutdown)
    register_ray()
    size = workers.count or max(1, int(ray.cluster_resources().get("CPU", 1)))
    return {"backend": "ray", "n_jobs": size}, size, (RayError,)


def _unreachable(workers: Workers, error: Exception) -> WorkerError:
    if workers.scheduler is None:
        return WorkerError(
            f"a {workers.backend} cluster of this machine must start. Got: {_first_line(error)}. "
            "Start one yourself and name its --scheduler, or take --backend loky."
        )
    return WorkerError(
        f"the scheduler must be the address of a {workers.backend} cluster that runs. Got "
        f"'{workers.scheduler}': {_first_line(error)}. Start it, or leave --scheduler out."
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
