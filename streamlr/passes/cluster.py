"""A Dask cluster: its workers and their memory, a graph that runs on them, and what it means when they fail."""

from __future__ import annotations

import logging
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from queue import SimpleQueue
from typing import Any

from zarr.storage import MemoryStore

from streamlr.dataset.blocks import format_bytes
from streamlr.dataset.dask_rows import DaskRows
from streamlr.dataset.integrity import local_root
from streamlr.dataset.rows import MemoryRows, Rows
from streamlr.dataset.zarr_rows import ZarrRows
from streamlr.errors import ClusterError, StreamlrError, UsageError
from streamlr.passes.memory import SHARE, parse_bytes

PATIENCE = 20.0  # seconds without a worker, or without the scheduler, after which a pass gives up
LOOK = 0.2  # seconds between looks at a pass that runs
WORKER_BYTES = 220_000_000  # a worker with the imports of a fit, as measured
SENT_BYTES = 100_000_000  # of NumPy rows that are sent to workers, at most
MUST_AGREE = ("streamlr", "numpy", "zarr", "numcodecs", "dask")


@dataclass(frozen=True, slots=True)
class Workers:
    """What the workers of a cluster have.

    Attributes
    ----------
    threads, together : int
        Tasks that all of them run at once, and that one of them does at most.
    memory_bytes, used_bytes : int or None, int
        The least memory limit of a worker, if there is one, and the most that a worker uses already.
    least : str
        The address of the worker with that limit.
    """

    threads: int
    together: int
    memory_bytes: int | None
    used_bytes: int
    least: str

    def memory_limit(self, asked: int | str | None) -> tuple[int, str]:
        """Return the limit, in bytes, that a plan must keep on each worker, and where it comes from."""
        if asked is not None:
            return parse_bytes(asked), "as asked, for each worker"
        if self.memory_bytes is None:
            return sys.maxsize, "workers without a memory limit"
        return int(SHARE * self.memory_bytes), f"{SHARE:.0%} of the {format_bytes(self.memory_bytes)} of worker {self.least}"


def workers_of(client: Any) -> Workers:
    """Return what a cluster's workers have, after waiting a while for the first of them.

    Raises
    ------
    ClusterError
        There is none, or the scheduler does not answer.
    """
    with _translated(client):
        found = client.scheduler_info(n_workers=-1)["workers"]
        if not found:
            with suppress(TimeoutError):
                client.wait_for_workers(1, timeout=PATIENCE)
            found = client.scheduler_info(n_workers=-1)["workers"]
    if not found:
        raise _no_workers(client)
    limits = {address: facts["memory_limit"] for address, facts in found.items() if facts["memory_limit"]}
    least = min(limits, key=lambda address: limits[address]) if limits else next(iter(found))
    return Workers(
        threads=sum(facts["nthreads"] for facts in found.values()),
        together=max(facts["nthreads"] for facts in found.values()),
        memory_bytes=limits.get(least),
        used_bytes=max(WORKER_BYTES, *(int(facts.get("metrics", {}).get("memory", 0)) for facts in found.values())),
        least=least,
    )


def check_workers(client: Any, arrays: Sequence[Rows]) -> None:
    """Check, before a pass, that every worker has our versions of what computes and sees the stores.

    Raises
    ------
    UsageError
        Rows are in this process's memory, where no worker sees them, and are too many to send.
    ClusterError
        A worker has other versions, or does not see a store.
    """
    sent = sum(rows.array.nbytes for rows in arrays if isinstance(rows, MemoryRows))
    if sent > SENT_BYTES:
        raise UsageError(
            f"NumPy arrays of {format_bytes(sent)} would be sent to the workers, and allowed are {format_bytes(SENT_BYTES)}; write "
            "them to a zarr store that the workers see and open it, or make Dask arrays where the data are"
        )
    roots = []
    for label, array in [pair for rows in arrays for pair in _stored_arrays(rows)]:
        store = array.store
        while hasattr(store, "_store"):  # a zarr.storage.WrapperStore, which documents this attribute
            store = store._store
        if isinstance(store, MemoryStore):
            raise UsageError(f"array {label!r} is in this process's memory, where no worker sees it; write it to a disk they share")
        if root := local_root(array):
            roots.append((str(root), os.path.abspath(root)))
    own = _look_around([])
    with _translated(client):
        found = client.run(_look_around, roots, on_error="return")
    for address, seen in found.items():
        if isinstance(seen, ModuleNotFoundError):
            raise ClusterError(f"worker {address} cannot import {seen.name!r}; install streamlr {own['streamlr']} there")
        if isinstance(seen, OSError):
            continue  # it died just now, and others do its work
        if isinstance(seen, Exception):
            raise ClusterError(f"worker {address} does not answer ({type(seen).__name__}: {seen}); look at its log")
        for name in ("Python", *MUST_AGREE):
            if seen[name] != own[name]:
                raise ClusterError(
                    f"worker {address} has {name} {seen[name]}, and here is {own[name]}: results could have other bits; install "
                    "the same on all machines"
                )
        if seen["unseen"]:
            raise ClusterError(
                f"worker {address} on {seen['host']} does not see the store {seen['unseen'][0]}; put it on a disk that all workers "
                "share, under the same path, or in object storage"
            )


def run_on(client: Any, root: Any, key: str = "", heard: Callable[[int], None] | None = None) -> Any:
    """Run a graph on a cluster, and watch it.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    root : Delayed
        The graph's end.
    key : str
        Of the pass; its workers tell of their progress under this topic.
    heard : callable, optional
        Called with the rows that a worker tells of, in this thread.

    Raises
    ------
    ClusterError
        Workers or scheduler failed, and not only for a while. One worker's death is no failure: others do its tasks again.
    """
    import distributed

    with _translated(client), _told(client, key) as told:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sending large graph")  # it was looked at before
            future = client.compute(root)
        watch = _Watch(client)
        try:
            while future.status in ("pending", "lost", "finished"):
                with suppress(TimeoutError):  # of waiting: a task that raised one has another status
                    if future.status == "finished":
                        return future.result(timeout=PATIENCE)  # the worker that holds it may die before it is fetched
                    distributed.wait(future, timeout=LOOK)
                while heard is not None and not told.empty():
                    heard(told.get())
                watch.look()
            return future.result()
        finally:
            if client.status == "running" and not future.done():
                future.cancel()


@contextmanager
def _told(client: Any, topic: str) -> Iterator[SimpleQueue[int]]:
    """Yield a queue of what workers tell under a topic while the block runs."""
    told: SimpleQueue[int] = SimpleQueue()
    if not topic:
        yield told
        return
    client.subscribe_topic(topic, lambda event: told.put(event[1]))
    try:
        yield told
    finally:
        if client.status == "running":
            client.unsubscribe_topic(topic)


def tell(key: str, rows: int) -> None:
    """Tell the pass `key`, in another process, that a task of it has read some more rows; nobody hears it but a Dask client."""
    if "distributed" in sys.modules:
        with suppress(ValueError):  # no worker of a cluster
            sys.modules["distributed"].get_worker().log_event(key, rows)


@contextmanager
def connected(scheduler: str | None = None, workers: int | None = None, certificates: Sequence[str | None] = ()) -> Iterator[str]:
    """Use a cluster while the block runs: that of a scheduler, or one of so many processes of this machine; yield its dashboard.

    Parameters
    ----------
    scheduler : str or None
        Its address, such as "tcp://10.0.0.1:8786".
    workers : int or None
        Processes to start, of one thread each.
    certificates : sequence of str
        Files for TLS: the authority, this side's certificate, and its key; empty, or of None, without TLS.

    Raises
    ------
    ClusterError
        The scheduler does not answer.
    UsageError
        The package `distributed` is not installed.
    """
    try:
        import distributed
    except ImportError as error:
        raise UsageError("a cluster needs the package distributed: pip install 'streamlr[cluster]'") from error
    if scheduler is not None:
        files = dict(zip(("tls_ca_file", "tls_client_cert", "tls_client_key"), certificates, strict=False))
        security = distributed.Security(require_encryption=True, **files) if any(certificates) else None
        try:
            client = distributed.Client(scheduler, timeout=PATIENCE, security=security)
        except (OSError, ValueError, TypeError) as error:
            raise ClusterError(f"no scheduler answers at {scheduler} ({error}); check address, port and certificates") from error
        with client:
            yield client.dashboard_link
    else:
        options = {"threads_per_worker": 1, "dashboard_address": ":0", "preload": [__name__], "silence_logs": logging.ERROR}
        with distributed.LocalCluster(n_workers=workers, **options) as cluster, distributed.Client(cluster) as client:
            yield client.dashboard_link


def dask_setup(worker: Any) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the one that stops them: Dask calls this as a worker starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Watch:
    """Counts for how long a cluster has been without workers or scheduler."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._well = self._looked = time.monotonic()

    def look(self) -> None:
        """Raise `ClusterError` when that was for too long."""
        now = time.monotonic()
        if now - self._looked < 1:
            return
        self._looked = now
        there = self._client.status == "running"
        with suppress(OSError):  # the scheduler went away just now
            if there and self._client.scheduler_info(n_workers=1)["workers"]:
                self._well = now
        if now - self._well > PATIENCE:
            raise _no_workers(self._client) if there else _no_scheduler(self._client)


@contextmanager
def _translated(client: Any) -> Iterator[None]:
    """Say in our words how a cluster failed."""
    import distributed

    try:
        yield
    except StreamlrError:  # some of which are OSErrors too
        raise
    except distributed.KilledWorker as error:
        worker = getattr(error.last_worker, "address", error.last_worker)
        raise ClusterError(
            f"{error.allowed_failures + 1} workers died while they ran the task {error.task!r}, the last of them {worker}. A "
            "worker that goes over its memory limit is killed: give workers more memory or fewer threads, and look at their logs"
        ) from error
    except (distributed.CancelledError, OSError) as error:
        of_a_task = isinstance(error, OSError) and not type(error).__module__.startswith("distributed.")
        if of_a_task and client.status == "running":
            raise
        raise _no_scheduler(client) from error


def _no_workers(client: Any) -> ClusterError:
    address = client.scheduler.address
    return ClusterError(
        f"the cluster at {address} has had no worker for {PATIENCE:.0f} seconds; start some: dask worker {address}, and if they "
        "died, look at their logs"
    )


def _no_scheduler(client: Any) -> ClusterError:
    return ClusterError(
        f"the scheduler at {getattr(client.scheduler, 'address', 'an unknown address')} went away, or dropped the pass; start it "
        "again and repeat"
    )


def _stored_arrays(rows: Rows) -> list[tuple[str, Any]]:
    if isinstance(rows, ZarrRows):
        return [(rows.label, rows.array)]
    return rows.zarr_sources() if isinstance(rows, DaskRows) else []


def _look_around(roots: list[tuple[str, str]]) -> dict[str, Any]:
    """Task: tell what is installed here, and which of some folders, as given and in full, are not there or lie elsewhere."""
    found: dict[str, Any] = {"Python": ".".join(platform.python_version_tuple()[:2]), "host": platform.node()}
    for name in MUST_AGREE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "(not installed)"
    found["unseen"] = [place for root, place in roots if os.path.abspath(root) != place or not os.path.isdir(root)]
    return found
