"""reduce(): every row once, in the fixed tree, to the value of a statistic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dask.base import compute as dask_compute
from dask.delayed import Delayed, delayed
from dask.threaded import get as threaded_get

from streamlr.aggregates.tree import Partial, Statistic, Summary, Tree
from streamlr.dataset.blocks import Plan, Span
from streamlr.dataset.dask_rows import DaskRows
from streamlr.dataset.dataset import Dataset, Tally
from streamlr.dataset.rows import MemoryRows
from streamlr.dataset.zarr_rows import ZarrRows
from streamlr.errors import RowCountMismatch, StoreChanged
from streamlr.passes.memory import one_blas_thread
from streamlr.passes.planning import FAN_IN, is_threaded, plan_pass
from streamlr.passes.progress import Callback, find_pass, running_pass

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
        partial, tally = compute(parts[0], plan.tasks_at_once)
    end(dataset, before, tally)
    return Reduced(partial.result(), tally, plan)


def read_span(dataset: Dataset, span: Span, tree: Tree, statistic: Statistic[S], key: str, *lazy: Any) -> tuple[Partial[S], Tally]:
    """Task: reduce the rows of one span."""
    state = find_pass(key)
    total = Tally()

    def report(tally: Tally) -> None:
        nonlocal total
        total += tally
        if state is not None:
            state.note(tally)

    partial = Partial(tree, statistic)
    with one_blas_thread():
        for block in with_blocks(dataset, span, lazy).blocks(span, report):
            partial.take(block)
    return partial, total


def merge(*parts: tuple[Partial[S], Tally]) -> tuple[Partial[S], Tally]:
    """Task: join partials, in whatever order; nothing that was passed in is changed."""
    first = parts[0][0]
    joined = Partial(first.tree, first.statistic).join(partial for partial, _ in parts)
    return joined, sum((tally for _, tally in parts), Tally())


def span_tasks(dataset: Dataset, cut: Sequence[Span], name: str, function: Any, arguments: tuple[Any, ...]) -> list[Delayed]:
    """Return one task for each span, given integers, one shared description of the dataset, and blocks of Dask arrays."""
    sizes = tuple(span.stop - span.start for span in cut)
    lazy = [rows.in_rows(sizes).to_delayed().ravel() for rows in dataset.arrays if isinstance(rows, DaskRows)]
    described: list[Any] = [_Computed(rows.label) if isinstance(rows, DaskRows) else rows for rows in dataset.arrays]
    key = arguments[-1]
    shared = delayed(dataset.with_rows(described), traverse=False, name=f"dataset-{key}")
    context = [delayed(value, traverse=False, name=f"context-{key}-{i}") for i, value in enumerate(arguments)]
    return [
        delayed(function)(shared, span, *context, *(blocks[i] for blocks in lazy), dask_key_name=f"{name}-{key}-{i}")
        for i, span in enumerate(cut)
    ]


def with_blocks(dataset: Dataset, span: Span, lazy: Sequence[Any]) -> Dataset:
    """Put computed blocks of Dask arrays where the dataset has places for them."""
    computed = iter(lazy)
    return dataset.with_rows(
        [MemoryRows(next(computed), rows.label, span.start) if isinstance(rows, _Computed) else rows for rows in dataset.arrays]
    )


def compute(root: Delayed, tasks_at_once: int) -> Any:
    """Run a graph on Dask's ambient scheduler, on as many threads as planned where that is the threaded one."""
    options: dict[str, Any] = {"scheduler": threaded_get, "num_workers": tasks_at_once} if is_threaded() else {}
    with one_blas_thread():
        return dask_compute(root, **options)[0]


def begin(dataset: Dataset) -> str | None:
    """Check, before a pass, what Dask graphs read from zarr; return the fingerprint of what the pass itself will read."""
    for rows in dataset.arrays:
        if isinstance(rows, DaskRows):
            for source in rows.zarr_sources():
                source.check_complete()
    return dataset.fingerprint if any(isinstance(rows, ZarrRows) for rows in dataset.arrays) else None


def end(dataset: Dataset, before: str | None, tally: Tally) -> None:
    """Check, after a pass, that all rows were seen and that they are still what they were."""
    if tally.rows != dataset.stored_rows:
        raise RowCountMismatch(f"{tally.rows:,} rows were read where {dataset.stored_rows:,} were promised; run it again")
    if before is not None and dataset.current_fingerprint() != before:
        raise StoreChanged(
            f"the store of {dataset.arrays[0].label!r} changed since it was opened: its chunks have other sizes or times; "
            "wait until its writer has finished, open it again and repeat"
        )


@dataclass(frozen=True, slots=True)
class _Computed:
    """Stands, in the description sent to tasks, for a Dask array whose blocks arrive as arguments."""

    label: str
