"""A pass that runs: what it has done so far, and whether it should stop. Who shows it is somebody else's business."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from streamlr.dataset.dataset import Tally
from streamlr.errors import Cancelled


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
    """

    task: str
    rows: int
    rows_total: int
    bytes: int
    bytes_total: int
    seconds: float


Callback = Callable[[Event], None]


class RunningPass:
    """State of one pass, shared by the threads of this process."""

    def __init__(self, task: str, rows_total: int, row_bytes: int, callback: Callback | None) -> None:
        self.cancelled = False
        self._task, self._rows_total, self._row_bytes, self._callback = task, rows_total, row_bytes, callback
        self._rows = 0
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def note(self, tally: Tally) -> None:
        """Count rows that were read, tell the callback, and raise `Cancelled` when the pass is to stop."""
        if self.cancelled:
            raise Cancelled("the pass was cancelled; nothing was written")
        if self._callback is None:
            return
        with self._lock:
            self._rows += tally.rows
            total = self._rows_total
            seconds = time.monotonic() - self._began
            self._callback(Event(self._task, self._rows, total, self._rows * self._row_bytes, total * self._row_bytes, seconds))


_running: dict[str, RunningPass] = {}


@contextmanager
def running_pass(task: str, rows_total: int, row_bytes: int, callback: Callback | None) -> Iterator[str]:
    """Register a pass for as long as the block runs, and yield the key by which its tasks find it; an error cancels it."""
    key = secrets.token_hex(8)
    state = _running[key] = RunningPass(task, rows_total, row_bytes, callback)
    try:
        yield key
    except BaseException:  # Ctrl-C too: tasks in other threads look at the flag at every tile
        state.cancelled = True
        raise
    finally:
        del _running[key]


def find_pass(key: str) -> RunningPass | None:
    """Return the running pass of this process under `key`; None in another process."""
    return _running.get(key)


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

        yield show


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
