"""A graph that runs on a Dask cluster, watched, and what it means when workers or the scheduler fail."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any

from streamlr.errors import ClusterError, StreamlrError
from streamlr.passes.progress import stop_tasks, topic_of

PATIENCE = 20.0  # seconds without a worker, or without the scheduler, after which a pass gives up
LOOK = 0.2  # seconds between looks at a pass that runs
STOPPING = 1.5  # seconds to wait for tasks to notice that they are cancelled


def run_on(
    client: Any,
    root: Any,
    key: str = "",
    heard: Callable[[int], None] | None = None,
    check: Callable[[Iterable[str]], None] | None = None,
) -> Any:
    """Run a graph on a cluster, and watch it.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    root : Delayed
        The graph's end.
    key : str
        Of the pass that its tasks take part in; empty where they take part in none.
    heard : callable, optional
        Called with the rows that a worker tells of, in this thread.
    check : callable, optional
        Called with the addresses of the workers that run tasks, before, now and then, and after.

    Raises
    ------
    ClusterError
        Workers or scheduler failed, and not only for a while. One worker's death is no failure: others do its tasks again.
    """
    import distributed

    with translated(client), client.as_current(), _told(client, key) as told:
        watch = _Watch(client, check)
        watch.look(now=check is not None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sending large graph")  # it was looked at before
            future = client.compute(root)
        try:
            while future.status in ("pending", "lost", "finished"):
                with suppress(TimeoutError):  # of waiting: a task that raised one has another status
                    if future.status == "finished":
                        result = future.result(timeout=PATIENCE)  # the worker that holds it may die before it is fetched
                        watch.look(now=check is not None)
                        return result
                    distributed.wait(future, timeout=LOOK)
                while heard is not None and not told.empty():
                    heard(told.get())
                watch.look()
            return future.result()
        except BaseException:
            if client.status == "running":
                _stop(client, future, key)
            raise


def run(
    client: Any, patience: float, function: Callable[..., Any], *arguments: Any, workers: list[str] | None = None
) -> dict[str, Any]:
    """Call a function on workers, beside their tasks, and return what each returned or raised.

    Raises
    ------
    NoAnswer
        Not all of them answered within `patience` seconds; for one that has just died, Dask itself waits half a minute.
    """
    asked = f"one of the workers {', '.join(workers)}" if workers else "a worker"
    answers: dict[str, Any] = _in_time(patience, asked, client.run, function, *arguments, workers=workers, on_error="return")
    return answers


def running(client: Any) -> dict[str, Any]:
    """Return what the scheduler knows of the workers that run tasks: not of those that it has paused, for want of memory.

    Raises
    ------
    NoAnswer
        The scheduler does not answer.
    """
    return {address: facts for address, facts in _workers(client).items() if _runs(facts)}


def _workers(client: Any) -> dict[str, Any]:
    found: dict[str, Any] = _ask_scheduler(client, client.scheduler_info, n_workers=-1)["workers"]
    return found


def _ask_scheduler(client: Any, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return _in_time(PATIENCE, f"the scheduler at {client.scheduler.address}", method, *arguments, **options)


def _runs(facts: dict[str, Any]) -> bool:
    return bool(facts.get("status", "running") == "running")


def no_workers(client: Any) -> ClusterError:
    """Return the error of a cluster without workers."""
    address = client.scheduler.address
    return ClusterError(
        f"the cluster at {address} has had no worker that runs tasks for {PATIENCE:.0f} seconds; start some: dask worker "
        f"{address}, and if they died or are paused, look at their logs and their memory"
    )


@contextmanager
def translated(client: Any) -> Iterator[None]:
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
    except NoAnswer as error:
        raise _silence(error) from error
    except (distributed.CancelledError, OSError) as error:
        of_a_task = isinstance(error, OSError) and not type(error).__module__.startswith("distributed.")
        if of_a_task and client.status == "running":
            raise
        raise _no_scheduler(client) from error


class NoAnswer(TimeoutError):
    """A scheduler or worker, which the text names, is there and does not answer."""


def _in_time(patience: float, asked: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call what may wait for ever, in a thread that may."""
    answer: Future[Any] = Future()

    def call() -> None:
        try:
            answer.set_result(function(*arguments, **options))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    try:
        return answer.result(timeout=patience)
    except TimeoutError as error:
        if answer.done():
            raise
        raise NoAnswer(asked) from error


def _stop(client: Any, future: Any, key: str) -> None:
    """Cancel what runs, and wait, for a while, until no task is left to read or write behind our back."""
    with suppress(Exception):  # what went wrong before is what matters
        future.cancel()
        deadline = time.monotonic() + STOPPING
        while key and time.monotonic() < deadline:
            left = run(client, STOPPING, stop_tasks, key)
            if not any(count for count in left.values() if isinstance(count, int)):
                return
            time.sleep(LOOK / 4)


@contextmanager
def _told(client: Any, key: str) -> Iterator[SimpleQueue[int]]:
    """Yield a queue of the rows that workers tell of while the block runs."""
    told: SimpleQueue[int] = SimpleQueue()
    if not key:
        yield told
        return
    _listeners[key] = told
    client.subscribe_topic(topic_of(key), _hear)
    try:
        yield told
    finally:
        del _listeners[key]
        if client.status == "running" and not _listeners:
            client.unsubscribe_topic(topic_of(key))


_listeners: dict[str, SimpleQueue[int]] = {}  # passes of this process; it has one topic, since schedulers keep topics for ever


def _hear(event: tuple[float, tuple[str, int]]) -> None:
    key, rows = event[1]
    if listener := _listeners.get(key):
        listener.put(rows)


class _Watch:
    """Counts for how long a cluster has been without workers or scheduler, and each worker without a sign of life."""

    def __init__(self, client: Any, check: Callable[[Iterable[str]], None] | None) -> None:
        self._client, self._check = client, check
        self._well = self._looked = time.monotonic()
        self._signs: dict[str, tuple[float, float]] = {}  # by worker: its last, by the scheduler's clock, and when it was new to us

    def look(self, *, now: bool = False) -> None:
        """Look once a second, or `now`; raise `ClusterError` when there was nobody for too long, or somebody who must not be."""
        if not now and time.monotonic() - self._looked < 1:
            return
        while True:
            there, silent = self._client.status == "running", None
            try:
                if there and self._is_well(_workers(self._client)):
                    self._well = time.monotonic()
                    break
            except NoAnswer as error:
                silent = error
            except OSError:  # the scheduler went away just now
                pass
            if time.monotonic() - self._well > PATIENCE:
                if not there:
                    raise _no_scheduler(self._client)
                raise no_workers(self._client) if silent is None else _silence(silent)
            if not now:
                break
            time.sleep(LOOK)
        self._looked = time.monotonic()

    def _is_well(self, workers: dict[str, Any]) -> bool:
        """Whether some workers run tasks; raise `ClusterError` where the pass waits for one that has not been able to for long."""
        able = {address: facts for address, facts in workers.items() if _runs(facts)}
        if able and self._check is not None:
            self._check(able)
        now, before = time.monotonic(), self._signs
        signs = {address: facts["last_seen"] if address in able else 0.0 for address, facts in workers.items()}
        self._signs = {
            address: before[address] if address in before and before[address][0] == sign else (sign, now)
            for address, sign in signs.items()
        }
        unable = [address for address, (_, since) in self._signs.items() if now - since > PATIENCE]
        if unable and able:
            tasks = _ask_scheduler(self._client, self._client.processing, unable)
            results = _ask_scheduler(self._client, self._client.has_what, unable)  # which a paused worker still hands out
            for address in unable:
                if tasks.get(address) or (address in able and results.get(address)):
                    raise _unable(address, paused=address not in able)
        return bool(able)


def _unable(address: str, *, paused: bool) -> ClusterError:
    what = "been paused, as Dask does where memory is short," if paused else "given no sign of life"
    return ClusterError(
        f"worker {address} has {what} for {PATIENCE:.0f} seconds, and the pass waits for it; look at its log, give it more memory "
        "or fewer threads, or stop it: then others do its work"
    )


def _silence(silent: NoAnswer) -> ClusterError:
    return ClusterError(
        f"{silent} is there and has not answered for {PATIENCE:.0f} seconds; look at its log, and at the load of its machine"
    )


def _no_scheduler(client: Any) -> ClusterError:
    return ClusterError(
        f"the scheduler at {getattr(client.scheduler, 'address', 'an unknown address')} went away, or dropped the pass; start it "
        "again and repeat"
    )
