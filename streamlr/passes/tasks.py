"""Spans as tasks on Dask, and what is checked before and after any pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from dask.base import compute as dask_compute
from dask.delayed import Delayed, delayed
from dask.local import get_sync

from streamlr.dataset.blocks import Block, Span, ended_by_tiles
from streamlr.dataset.checked import DatasetReader
from streamlr.dataset.dask_rows import DaskRows
from streamlr.dataset.dataset import Dataset
from streamlr.dataset.integrity import LOOKING
from streamlr.dataset.rows import MemoryRows, Rows, plain_array
from streamlr.dataset.tally import Tally
from streamlr.dataset.zarr_rows import ZarrRows
from streamlr.errors import DataError, RowCountMismatch, StoreChanged, StreamlrError
from streamlr.passes.cluster import run_on, translated
from streamlr.passes.memory import one_blas_thread
from streamlr.passes.planning import is_waited_for
from streamlr.passes.progress import Share, find_pass
from streamlr.passes.runs import Runs
from streamlr.passes.schedulers import active_client, callers_pool, has_pool, is_task, is_threaded, options_for
from streamlr.passes.workers import Vetted, stores_of


def tasks_of(
    parts: Iterable[tuple[Any, ...]], name: str, key: str, function: Callable[..., Any], common: tuple[Any, ...]
) -> list[Delayed]:
    """Return one task for each part of a pass: a function of what is common to all, which is sent once, and of the part.

    All that is common is one argument: a graph with fewer edges takes less time to build.
    """
    shared, task = delayed((function, common), traverse=False, name=f"context-{name}-{key}"), delayed(call)
    return [task(shared, *part, dask_key_name=f"{name}-{key}-{i}") for i, part in enumerate(parts)]


def call(shared: tuple[Callable[..., Any], tuple[Any, ...]], *part: Any) -> Any:
    """Task: call a function."""
    function, common = shared
    return function(*common, *part)


class Source:
    """A dataset as the tasks of a pass read it: in memory that each leaves to the next one in the same process.

    Fresh pages cost as much as a copy, and for a small span a new reader costs more than the reading. What is left is gone when
    the pass is, which is the only one to have this.

    Parameters
    ----------
    dataset : Dataset
        The rows.
    runs : Runs, optional
        Of the spans of all tasks, which are threads of this process: each reads what it is handed of them, maybe nothing.
    """

    def __init__(self, dataset: Dataset, runs: Runs | None = None) -> None:
        self.dataset = dataset
        self._runs = runs
        self._idle: list[DatasetReader] = []

    def __reduce__(self) -> tuple[type[Source], tuple[Dataset]]:
        return Source, (self.dataset,)  # readers stay where they are; elsewhere, each task reads its own span

    def blocks(
        self, span: Span, share: Share, tile: int, lazy: Sequence[Any], *, confirmed: bool = True, as_stored: bool = False
    ) -> Iterator[Block]:
        """Read the rows of a task's span, or of its run; see `DatasetReader.blocks`. Those of Dask arrays were computed for it."""
        how = {"confirmed": confirmed, "as_stored": as_stored}
        if lazy:
            yield from with_blocks(self.dataset, span, lazy).reader().blocks(span, share.note, tile, **how)
            return
        try:
            reader = self._idle.pop()
        except IndexError:
            reader = self.dataset.reader()
        if self._runs is None:
            yield from reader.blocks(span, share.note, tile, **how)
        else:  # neighbours share the chunk and the tile at their edge
            run = self._runs.take()
            # a store with latency is asked for one span after the other: of what others take over, many chunks would come twice
            with nullcontext() if is_waited_for(self.dataset) else reader.expecting([run.extent]):
                for part in ended_by_tiles(run, tile):
                    yield from reader.blocks(part, share.note, tile, **how)
        reader.forget()  # what a task meets must not depend on which was done before it
        self._idle.append(reader)


def span_tasks(
    dataset: Dataset,
    cut: Sequence[Span],
    name: str,
    key: str,
    function: Callable[..., Any],
    *common: Any,
    runs: Runs | None = None,
) -> list[Delayed]:
    """Return one task for each span: a function of the source, the key, what is common, the span, and blocks of Dask arrays.

    NumPy rows, which lie where they are needed on threads, go to a cluster as blocks too. Where threads are handed `runs` of the
    spans, a task reads one of those instead, and others may find that theirs is read.
    """
    sent = active_client() is not None
    sizes = tuple(span.stop - span.start for span in cut)
    blocks: list[Sequence[Any]] = []
    for rows in dataset.arrays:
        if isinstance(rows, DaskRows):
            blocks.append(rows.in_rows(sizes).to_delayed().ravel())
        elif sent and isinstance(rows, MemoryRows):
            blocks.append([rows.array[span.start : span.stop] for span in cut])
    source = Source(_described(dataset, sent=sent), runs)
    return tasks_of(zip(cut, *blocks, strict=True), name, key, function, (source, key, *common))


def with_blocks(dataset: Dataset, span: Span, lazy: Sequence[Any]) -> Dataset:
    """Put computed blocks of Dask arrays where the dataset has places for them, if they are what their graph promised."""
    computed = iter(lazy)
    arrays: list[Any] = []
    for rows in dataset.arrays:
        if isinstance(rows, _Computed):
            block = plain_array(next(computed))
            if block.shape != (span.stop - span.start, rows.n_columns):
                raise RowCountMismatch(
                    f"a block of the Dask array {rows.label!r} has the shape {block.shape} where rows {span.start:,} to "
                    f"{span.stop - 1:,} of {rows.n_columns:,} columns belong; state its true chunks where the array is made"
                )
            arrays.append(MemoryRows(block, rows.label, span.start))
        else:
            arrays.append(rows)
    return dataset.with_rows(arrays)


def with_computed(dataset: Dataset, span: Span) -> Dataset:
    """Compute the rows of a span of every Dask array, now, and put them in the arrays' places."""
    lazy = [rows.array[span.start : span.stop] for rows in dataset.lazy]
    with errors_of_graphs(dataset):
        return with_blocks(_described(dataset, sent=False), span, _computed(lazy))


def _computed(lazy: Sequence[Any]) -> Sequence[Any]:
    """Compute Dask arrays for who waits for them: one of several threads, or one of a cluster's tasks."""
    if client := active_client():
        return list(run_on(client, delayed(list)(lazy)))
    if is_task():
        from distributed import worker_client

        with worker_client() as client, translated(client):  # this task makes room for theirs, which go where their blocks lie
            return list(dask_compute(*lazy))
    here = is_threaded() or (callers_pool() and not has_pool())  # an Executor's threads may all be waiting for blocks
    return list(dask_compute(*lazy, **({"scheduler": get_sync} if here else {})))


@contextmanager
def one_at_a_time(dataset: Dataset) -> Iterator[None]:
    """Let only one task of a worker hold memory while it waits for blocks of Dask arrays, for which such a task makes room."""
    if not (is_task() and dataset.lazy):
        yield
        return
    from distributed import worker_client

    with worker_client(), _turn:
        yield


_turn = threading.Lock()


def compute(root: Delayed, arrays: Sequence[Rows], key: str, tasks_at_once: int) -> Any:
    """Run the graph of a pass over some arrays on Dask's ambient scheduler: the cluster of an active client, or this machine.

    Here it runs on as many threads or processes as planned.
    """
    if client := active_client():
        result = run_pass(client, root, key, Vetted(client, stores_of(arrays)))
        if state := find_pass(key):
            state.finish()
        return result
    with one_blas_thread():
        return dask_compute(root, **options_for(tasks_at_once))[0]


def run_pass(client: Any, root: Delayed, key: str, vetted: Vetted) -> Any:
    """Run the graph of a pass on a cluster, by workers that are vetted, and let the pass hear of their progress."""
    state = find_pass(key)
    assert state is not None, "a pass runs where it was begun"
    return run_on(client, root, key, lambda rows: state.note(Tally(rows=rows)), vetted.check)


@contextmanager
def errors_of_graphs(dataset: Dataset) -> Iterator[None]:
    """Name what fails in a Dask graph that the caller built: it may raise whatever the libraries behind it raise."""
    try:
        yield
    except Exception as error:
        lazy = [rows.label for rows in dataset.lazy]
        if not lazy or isinstance(error, StreamlrError | MemoryError):
            raise
        raise DataError(
            f"a block of the Dask array(s) {', '.join(lazy)} could not be computed ({type(error).__name__}: {error}); "
            "check what the graph reads, or open the store by open_dataset, which names the chunk"
        ) from error


def begin(dataset: Dataset) -> str | None:
    """Check, before a pass, that what it reads from zarr is there, and return its fingerprint; None where there is no zarr."""
    if not _check_current(dataset):
        return None
    found = dataset.current_fingerprint(complete=True)
    if vars(dataset).setdefault("fingerprint", found) != found:  # known from an earlier pass, or because somebody asked for it
        raise _changed(dataset)
    return found


def end(dataset: Dataset, before: str | None, tally: Tally) -> None:
    """Check, after a pass, that all rows were seen and that they are still what they were."""
    if tally.rows != dataset.stored_rows:
        raise RowCountMismatch(f"{tally.rows:,} rows were read where {dataset.stored_rows:,} were promised; run it again")
    if before is not None:
        _check_current(dataset)
        if dataset.current_fingerprint() != before:
            raise _changed(dataset)


def _described(dataset: Dataset, *, sent: bool) -> Dataset:
    """Return the dataset with places in it for blocks that arrive with the tasks: of Dask arrays, and of NumPy's if `sent`."""

    def place(rows: Any) -> Any:
        comes = isinstance(rows, DaskRows) or (sent and isinstance(rows, MemoryRows))
        return _Computed(rows.label, rows.n_columns) if comes else rows

    return dataset.with_rows([place(rows) for rows in dataset.arrays])


def _check_current(dataset: Dataset) -> bool:
    """Check the metadata of every zarr array that is read, by us or by a Dask graph; return whether there are any."""
    looked_at = [rows for rows in dataset.arrays if isinstance(rows, ZarrRows | DaskRows)]
    if any(isinstance(rows, ZarrRows) and rows.are_asked_ahead for rows in looked_at):
        with ThreadPoolExecutor(min(len(looked_at), LOOKING)) as pool:  # the store's latency is waited for once
            list(pool.map(lambda rows: rows.check_current(), looked_at))
    else:
        for rows in looked_at:
            rows.check_current()
    return any(isinstance(rows, ZarrRows) or (isinstance(rows, DaskRows) and rows.zarr_sources()) for rows in dataset.arrays)


def _changed(dataset: Dataset) -> StoreChanged:
    return StoreChanged(
        f"the store of {dataset.arrays[0].label!r} changed since it was opened: its chunks have other sizes or times; "
        "wait until its writer has finished, open it again and repeat"
    )


@dataclass(frozen=True, slots=True)
class _Computed:
    """Stands, in the description sent to tasks, for an array whose blocks arrive as arguments."""

    label: str
    n_columns: int
