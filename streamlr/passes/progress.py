"""A pass that runs: what it has done so far, and whether it should stop. Who shows it is somebody else's business."""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from streamlr.dataset.tally import Tally
from streamlr.errors import Cancelled

PATIENCE = 1.5  # seconds to wait for tasks to notice that they are cancelled; Ctrl-C should end the process within two
SOON, TELL = 0.001, 0.5  # seconds between what a process tells a pass of another, first and later: each telling costs 1 ms
REMEMBERED = 1000  # passes of other processes
CANCELLED = "the pass was cancelled; nothing was written"
_AT_IMPORT = secrets.token_hex(8)


@dataclass(frozen=True, slots=True)
class Event:
    """How far a pass has come.

    Attributes
    ----------
    task : str
        What the pass does: "moments", "cost", "prediction", "verify".
    rows, rows_total : int
        Rows read so far, and in all.
    bytes, bytes_total : int
        The same in decoded bytes.
    seconds : float
        Since the pass began.
    note : str
        What else there is to tell, a line; empty for nothing.
    """

    task: str
    rows: int
    rows_total: int
    bytes: int
    bytes_total: int
    seconds: float
    note: str = ""


Callback = Callable[[Event], None]


class RunningPass:
    """State of one pass, shared by the threads of this process."""

    def __init__(self, task: str, rows_total: int, row_bytes: int, callback: Callback | None) -> None:
        self.cancelled = False
        self._task, self._rows_total, self._row_bytes, self._callback = task, rows_total, row_bytes, callback
        self._rows = 0
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._tasks = 0

    @contextmanager
    def task(self) -> Iterator[None]:
        """Count a task of this process for as long as the block runs."""
        with self._lock:
            if self.cancelled:
                raise Cancelled(CANCELLED)
            self._tasks += 1
        try:
            yield
        finally:
            with self._lock:
                self._tasks -= 1
                self._idle.notify_all()

    def cancel(self) -> None:
        """Make every task stop at its next tile, and wait, for a while, until none is left to read or write behind our back."""
        with self._idle:
            self.cancelled = True
            self._idle.wait_for(lambda: self._tasks == 0, timeout=PATIENCE)

    def note(self, tally: Tally) -> None:
        """Count rows that were read, tell the callback, and raise `Cancelled` when the pass is to stop."""
        if self.cancelled:
            raise Cancelled(CANCELLED)
        if self._callback is None:
            return
        with self._lock:
            total = self._rows_total
            self._rows = min(self._rows + tally.rows, total)  # a worker that died may have told of rows that another reads again
            seconds = time.monotonic() - self._began
            self._callback(Event(self._task, self._rows, total, self._rows * self._row_bytes, total * self._row_bytes, seconds))

    def finish(self) -> None:
        """Count the rows that workers told of too late."""
        if self._rows < self._rows_total:
            self.note(Tally(rows=self._rows_total - self._rows))


_running: dict[str, RunningPass] = {}


@contextmanager
def running_pass(task: str, rows_total: int, row_bytes: int, callback: Callback | None) -> Iterator[str]:
    """Register a pass for as long as the block runs, and yield the key by which its tasks find it; an error cancels it."""
    key = f"{_this_process()}-{secrets.token_hex(8)}"
    state = _running[key] = RunningPass(task, rows_total, row_bytes, callback)
    try:
        yield key
    except BaseException:  # Ctrl-C too: tasks in other threads look at the flag at every tile
        state.cancel()
        raise
    finally:
        del _running[key]


def find_pass(key: str) -> RunningPass | None:
    """Return the running pass of this process under `key`; None in another process.

    Raises
    ------
    Cancelled
        It ran in this process and is over: what asks for it is a task that started too late.
    """
    state = _running.get(key)
    if state is None and key.startswith(f"{_this_process()}-"):
        raise Cancelled(CANCELLED)
    return state


class PassElsewhere:
    """What the tasks of this process know of a pass of another, which they tell of rows: at once, and then ever more rarely."""

    def __init__(self, key: str) -> None:
        self.key, self.cancelled, self.tasks = key, False, 0
        self._untold, self._told, self._wait = 0, -TELL, SOON
        self._lock = threading.Lock()

    @contextmanager
    def task(self) -> Iterator[None]:
        """Count a task of this process for as long as the block runs."""
        with self._lock:
            if self.cancelled:
                raise Cancelled(CANCELLED)
            self.tasks += 1
        try:
            yield
        finally:
            with self._lock:
                self.tasks -= 1

    def cancel(self) -> int:
        """Make every task stop at its next tile; return how many have not yet."""
        with self._lock:
            self.cancelled = True
            return self.tasks

    def note(self, tally: Tally) -> None:
        """Count rows that were read, and raise `Cancelled` when the pass is to stop."""
        if self.cancelled:
            raise Cancelled(CANCELLED)
        with self._lock:
            self._untold += tally.rows
            if time.monotonic() - self._told < self._wait:
                return
            rows, self._untold = self._untold, 0
            self._told, self._wait = time.monotonic(), min(2 * self._wait, TELL)
        if "distributed" in sys.modules:  # nobody hears it but a Dask client
            with suppress(ValueError):  # no worker of a cluster
                sys.modules["distributed"].get_worker().log_event(topic_of(self.key), (self.key, rows))


_elsewhere: dict[str, PassElsewhere] = {}  # those of late: the last tasks of one that was stopped may still be on their way here
_entering = threading.Lock()


def _pass_elsewhere(key: str) -> PassElsewhere:
    with _entering:
        if key not in _elsewhere:
            idle = [other for other, state in _elsewhere.items() if not state.tasks]
            for other in idle[: max(len(_elsewhere) - REMEMBERED, 0)]:
                del _elsewhere[other]
            _elsewhere[key] = PassElsewhere(key)
        return _elsewhere[key]


def stop_tasks(key: str) -> int:
    """Make the tasks that this process runs of another's pass stop at their next tile; return how many have not yet."""
    return _pass_elsewhere(key).cancel()


def topic_of(key: str) -> str:
    """Return the topic under which a cluster's workers tell of a pass: one for each process that has passes."""
    return f"streamlr-{key.rpartition('-')[0]}"


class Share:
    """One task's share of a pass: what it has met so far."""

    def __init__(self, state: RunningPass | PassElsewhere) -> None:
        self.tally = Tally()
        self._state = state

    def note(self, tally: Tally) -> None:
        """Count rows here and in the pass; raises `Cancelled` when the pass is to stop."""
        self.tally += tally
        self._state.note(tally)


@contextmanager
def share_of_pass(key: str) -> Iterator[Share]:
    """Take part in the pass under `key`, as one task, while the block runs."""
    state = find_pass(key) or _pass_elsewhere(key)
    with state.task():
        yield Share(state)


def _this_process() -> str:
    return f"{_AT_IMPORT}.{os.getpid():x}"  # a number alone may be another process's on another machine


@contextmanager
def progress_bar() -> Iterator[Callback]:
    """Show passes as bars on standard error, which is where `rich` puts them, while the block runs."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        shown: dict[str, Any] = {}

        def show(event: Event) -> None:
            if event.task not in shown:
                shown[event.task] = bar.add_task(event.task, total=event.bytes_total)
            bar.update(shown[event.task], completed=event.bytes)
            if event.note:
                bar.console.print(event.note, highlight=False, soft_wrap=True)

        yield show


@contextmanager
def row_counter() -> Iterator[Callable[[str, int], None]]:
    """Show on standard error, while the block runs, how many rows of tables whose length nobody knows were read so far."""
    from rich.console import Console

    with Console(stderr=True).status("reading") as status:
        yield lambda stage, rows: status.update(f"{stage}: {rows:,} rows read")


@contextmanager
def shown(progress: bool | Callback) -> Iterator[Callback | None]:
    """Yield the callback that an option `progress` stands for: itself, a bar for True, none for False."""
    if callable(progress):
        yield progress
    elif progress:
        with progress_bar() as callback:
            yield callback
    else:
        yield None
