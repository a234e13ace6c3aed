"""Who runs the tasks: Dask's ambient scheduler, and how many tasks it runs at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import dask
import dask.base
from dask.system import CPU_COUNT
from dask.threaded import get as threaded_get


def ambient_scheduler() -> Any:
    """Return the scheduler that Dask's settings or an active client ask for, or None when nobody asked.

    Dask looks for a client by importing `distributed`, a second and 60 MB; but there is none before somebody else imported it.
    """
    if dask.config.get("scheduler", None) is None and "distributed" not in sys.modules:
        return None
    return dask.base.get_scheduler()


def active_client() -> Any:
    """Return the `distributed.Client` whose cluster Dask would use, or None; none within a task, which would wait for itself."""
    distributed = sys.modules.get("distributed")
    client = getattr(ambient_scheduler(), "__self__", None)
    return client if distributed is not None and isinstance(client, distributed.Client) and not is_task() else None


def is_task() -> bool:
    """Whether this is a task on a worker of a cluster."""
    if "distributed" not in sys.modules:
        return False
    try:
        sys.modules["distributed"].get_worker()
    except ValueError:
        return False
    return True


def is_threaded() -> bool:
    """Whether Dask's ambient scheduler is the threaded one, which is what it is when nobody chose another."""
    scheduler = ambient_scheduler()
    return scheduler is None or getattr(scheduler, "__module__", "") == "dask.threaded"


def has_pool() -> bool:
    """Whether it runs tasks on so many threads or processes of this machine as it is told."""
    return is_threaded() or getattr(ambient_scheduler(), "__module__", "") == "dask.multiprocessing"


def worker_count() -> int:
    """Return how many tasks this machine would run at once: Dask's `num_workers`, else one for each processor it may use.

    An Executor in the place of a scheduler has a number of its own.
    """
    if has_pool() or active_client() is not None:
        return int(dask.config.get("num_workers", None) or CPU_COUNT or 1)
    scheduler = ambient_scheduler()
    if isinstance(scheduler, partial):
        return int(scheduler.args[1])
    return 1 if getattr(scheduler, "__name__", "") == "get_sync" else int(CPU_COUNT or os.cpu_count() or 1)


@contextmanager
def limited(tasks_at_once: int) -> Iterator[dict[str, Any]]:
    """Give the options with which Dask runs no more tasks at once on this machine, as far as it is told how many."""
    scheduler = ambient_scheduler()
    if isinstance(scheduler, partial):  # what Dask makes of an Executor: where tasks go, and how many at once
        yield {"scheduler": partial(scheduler.func, scheduler.args[0], tasks_at_once)}
    elif not is_threaded():
        yield {"num_workers": tasks_at_once} if has_pool() else {}
    elif dask.config.get("pool", None) is None:
        yield {"scheduler": threaded_get, "num_workers": tasks_at_once}
    else:  # Dask would use all threads of the pool that is set
        with ThreadPoolExecutor(tasks_at_once) as pool:
            yield {"scheduler": threaded_get, "pool": pool}
