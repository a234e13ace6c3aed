"""reduce(): every row once, in the fixed tree, to the value of a statistic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dask.base import compute as dask_compute
from dask.delayed import Delayed, delayed
from dask.threaded import get as threaded_get

from streamlr.aggregates.tree import Partial, Statistic, Summary, Tree
from streamlr.dataset.blocks import Plan, Span
from streamlr.dataset.dask_rows import DaskRows
from streamlr.dataset.dataset import Dataset
from streamlr.dataset.rows import MemoryRows, plain_array
from streamlr.dataset.tally import Tally
from streamlr.dataset.zarr_rows import ZarrRows
from streamlr.errors import DataError, RowCountMismatch, StoreChanged, StreamlrError
from streamlr.passes.memory import one_blas_thread
from streamlr.passes.planning import FAN_IN, has_pool, is_threaded, plan_pass
from streamlr.passes.progress import Callback, running_pass, share_of_pass

S = TypeVar("S", bound=Summary)


@dataclass(frozen=True, slots=True)
class Reduced(Generic[S]):
    """What a pass leaves: the value, what was met on the way, and the plan that was kept."""

    value: S
    tally: Tally
    plan: Plan


def reduce(
    dataset: Dataset,
    statistic: Statistic[S],
    *,
    task: str,
    memory_limit: int | str | None = None,
    solution_bytes: int = 0,
    progress: Callback | None = None,
) -> Reduced[S]:
    """Read every row once and return the statistic of all of them.

    The value has the same bits for any chunk layout, number of workers and order in which tasks finish.

    Parameters
    ----------
    dataset : Dataset
        The rows.
    statistic : Statistic
        What to make of them.
    task : str
        What the pass is called in events and task names.
    memory_limit : int, str or None
        Bytes, or a text such as "2GB"; None for most of what this process may use.
    solution_bytes : int
        Memory that the caller needs afterwards, to be planned with.
    progress : callable, optional
        Called with an `Event` at every tile, in the thread that read it.

    Raises
    ------
    MemoryLimitExceeded
        The plan does not fit; nothing was read.
    DataError
        A chunk, a row or a count is not as promised, or the store changed while it was read.
    """
    plan, cut = plan_pass(dataset, statistic, task=task, memory=memory_limit, solution_bytes=solution_bytes)
    before = begin(dataset)
    tree = Tree(dataset.stored_rows, dataset.tile_rows)
    with running_pass(task, dataset.stored_rows, dataset.row_bytes, progress) as key:
        parts = span_tasks(dataset, cut, task, read_span, (tree, statistic, key))
        number = 0
        while len(parts) > 1:
            groups = [parts[at : at + FAN_IN] for at in range(0, len(parts), FAN_IN)]
            parts = []
            for group in groups:
                parts.append(delayed(merge)(*group, dask_key_name=f"merge-{key}-{number}"))
                number += 1
        with errors_of_graphs(dataset):
            partial, tally = compute(parts[0], plan.tasks_at_once)
    end(dataset, before, tally)
    return Reduced(partial.result(), tally, plan)


def read_span(dataset: Dataset, span: Span, tree: Tree, statistic: Statistic[S], key: str, *lazy: Any) -> tuple[Partial[S], Tally]:
    """Task: reduce the rows of one span."""
    partial = Partial(tree, statistic)
    with share_of_pass(key) as share, one_blas_thread():  # given back before the pass hears that the task is done
        for block in with_blocks(dataset, span, lazy).blocks(span, share.note):
            partial.take(block)
    return partial, share.tally


def merge(*parts: tuple[Partial[S], Tally]) -> tuple[Partial[S], Tally]:
    """Task: join partials, in whatever order; nothing that was passed in is changed."""
    first = parts[0][0]
    joined = Partial(first.tree, first.statistic).join(partial for partial, _ in parts)
    return joined, sum((tally for _, tally in parts), Tally())


def span_tasks(dataset: Dataset, cut: Sequence[Span], name: str, function: Any, arguments: tuple[Any, ...]) -> list[Delayed]:
    """Return one task for each span, given integers, one shared description of the dataset, and blocks of Dask arrays."""
    sizes = tuple(span.stop - span.start for span in cut)
    lazy = [rows.in_rows(sizes).to_delayed().ravel() for rows in dataset.arrays if isinstance(rows, DaskRows)]
    described: list[Any] = [
        _Computed(rows.label, rows.n_columns) if isinstance(rows, DaskRows) else rows for rows in dataset.arrays
    ]
    key = arguments[-1]
    shared = delayed(dataset.with_rows(described), traverse=False, name=f"dataset-{key}")
    context = [delayed(value, traverse=False, name=f"context-{key}-{i}") for i, value in enumerate(arguments)]
    return [
        delayed(function)(shared, span, *context, *(blocks[i] for blocks in lazy), dask_key_name=f"{name}-{key}-{i}")
        for i, span in enumerate(cut)
    ]


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


def compute(root: Delayed, tasks_at_once: int) -> Any:
    """Run a graph on Dask's ambient scheduler, on as many threads or processes as planned where they are this machine's."""
    options: dict[str, Any] = {"num_workers": tasks_at_once} if has_pool() else {}
    if is_threaded():
        options["scheduler"] = threaded_get
    with one_blas_thread():
        return dask_compute(root, **options)[0]


@contextmanager
def errors_of_graphs(dataset: Dataset) -> Iterator[None]:
    """Name what fails in a Dask graph that the caller built: it may raise whatever the libraries behind it raise."""
    try:
        yield
    except Exception as error:
        lazy = [rows.label for rows in dataset.arrays if isinstance(rows, DaskRows)]
        if not lazy or isinstance(error, StreamlrError | MemoryError):
            raise
        raise DataError(
            f"a block of the Dask array(s) {', '.join(lazy)} could not be computed ({type(error).__name__}: {error}); "
            "check what the graph reads, or open the store by open_dataset, which names the chunk"
        ) from error


def begin(dataset: Dataset) -> str | None:
    """Check, before a pass, that what it reads from zarr is there, and return its fingerprint; None where there is no zarr."""
    if not _check_stores(dataset, complete=True):
        return None
    known = "fingerprint" in vars(dataset)  # from an earlier pass, or because somebody asked for it
    if known and dataset.fingerprint != dataset.current_fingerprint():
        raise _changed(dataset)
    return dataset.fingerprint


def end(dataset: Dataset, before: str | None, tally: Tally) -> None:
    """Check, after a pass, that all rows were seen and that they are still what they were."""
    if tally.rows != dataset.stored_rows:
        raise RowCountMismatch(f"{tally.rows:,} rows were read where {dataset.stored_rows:,} were promised; run it again")
    if before is not None:
        _check_stores(dataset, complete=False)
        if dataset.current_fingerprint() != before:
            raise _changed(dataset)


def _check_stores(dataset: Dataset, *, complete: bool) -> bool:
    """Check every zarr array that is read, by us or by a Dask graph; return whether there are any."""
    for rows in dataset.arrays:
        if isinstance(rows, ZarrRows | DaskRows):
            rows.check(complete=complete)
    return any(isinstance(rows, ZarrRows) or (isinstance(rows, DaskRows) and rows.zarr_sources()) for rows in dataset.arrays)


def _changed(dataset: Dataset) -> StoreChanged:
    return StoreChanged(
        f"the store of {dataset.arrays[0].label!r} changed since it was opened: its chunks have other sizes or times; "
        "wait until its writer has finished, open it again and repeat"
    )


@dataclass(frozen=True, slots=True)
class _Computed:
    """Stands, in the description sent to tasks, for a Dask array whose blocks arrive as arguments."""

    label: str
    n_columns: int
