"""Who runs the tasks: Dask's ambient scheduler, and how many tasks it runs at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.pool import Pool
from types import SimpleNamespace
from typing import Any

import dask
import dask.base
from dask.local import MultiprocessingPoolExecutor, get_async
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
    client = getattr(ambient_scheduler(), "__self__", None)
    known = getattr(sys.modules.get("distributed"), "Client", ())  # not there while another thread imports it
    return client if isinstance(client, known) and not is_task() else None


def is_task() -> bool:
    """Whether this is a task on a worker of a cluster."""
    get_worker = getattr(sys.modules.get("distributed"), "get_worker", None)
    if get_worker is None:
        return False
    try:
        get_worker()
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

    A pool or Executor of the caller's has a number of its own.
    """
    if pool := callers_pool():
        return pool[1]
    if has_pool() or active_client() is not None:
        return int(dask.config.get("num_workers", None) or CPU_COUNT or 1)
    scheduler = ambient_scheduler()
    return 1 if getattr(scheduler, "__name__", "") == "get_sync" else int(CPU_COUNT or os.cpu_count() or 1)


def callers_pool() -> tuple[Callable[..., Any], int] | None:
    """Return where tasks go and how many at once, where Dask's settings name an Executor, or a pool of threads or processes."""
    scheduler = ambient_scheduler()
    if isinstance(scheduler, partial) and scheduler.func is get_async and len(scheduler.args) == 2:  # made of an Executor
        return scheduler.args
    pool = dask.config.get("pool", None) if has_pool() else None
    if isinstance(pool, Pool):
        pool = MultiprocessingPoolExecutor(pool)
    return None if pool is None else (pool.submit, pool._max_workers)


def options_for(tasks_at_once: int) -> dict[str, Any]:
    """Return the options with which Dask runs no more tasks at once on this machine, as far as it is told how many."""
    pool = callers_pool()
    if not has_pool():
        return {"scheduler": partial(get_async, pool[0], tasks_at_once)} if pool else {}
    told = {"pool": SimpleNamespace(submit=pool[0], _max_workers=tasks_at_once)} if pool else {"num_workers": tasks_at_once}
    return told | ({"scheduler": threaded_get} if is_threaded() else {})
