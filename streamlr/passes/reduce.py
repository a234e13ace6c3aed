"""reduce(): every row once, in the fixed tree, to the value of a statistic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dask.delayed import delayed

from streamlr.aggregates.tree import Partial, Statistic, Summary, Tree
from streamlr.dataset.blocks import Plan, Span
from streamlr.dataset.dataset import Dataset
from streamlr.dataset.tally import Tally
from streamlr.passes.memory import one_blas_thread
from streamlr.passes.planning import is_waited_for, plan_pass
from streamlr.passes.progress import Callback, running_pass, share_of_pass
from streamlr.passes.runs import Runs
from streamlr.passes.tasks import Source, begin, compute, end, errors_of_graphs, span_tasks

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
    tree = Tree(dataset.stored_rows, plan.tile_rows)
    with running_pass(task, dataset.stored_rows, dataset.row_bytes, progress) as key:
        runs = _runs(dataset, plan, cut) if plan.spans_per_task > 1 else None
        as_stored = statistic.as_stored and not dataset.lazy  # blocks of a Dask array may be of another dtype than it says
        parts = span_tasks(dataset, cut, task, key, read_span, tree, statistic, as_stored, runs=runs)
        number = 0
        while len(parts) > 1:
            groups = [parts[at : at + plan.fan_in] for at in range(0, len(parts), plan.fan_in)]
            parts = []
            for group in groups:
                parts.append(delayed(merge)(*group, dask_key_name=f"merge-{key}-{number}"))
                number += 1
        with errors_of_graphs(dataset):
            partial, tally = compute(parts[0], dataset.arrays, key, plan.tasks_at_once)
    end(dataset, before, tally)
    return Reduced(partial.result(), tally, plan)


def _runs(dataset: Dataset, plan: Plan, cut: Sequence[Span]) -> Runs:
    if is_waited_for(dataset):  # what is asked for ahead is asked for anew with each piece
        return Runs(cut, plan.spans_per_task)
    tile, chunk = plan.tile_rows, max(dataset.arrays, key=lambda rows: rows.row_bytes).chunk_rows
    shared = math.lcm(*(rows.chunk_rows for rows in dataset.arrays))
    units = math.lcm(tile, shared), shared, math.lcm(tile, chunk), chunk, tile  # pieces end as spans do: with chunks, tiles or both
    return Runs.of_spans(cut, plan.spans_per_task, next(unit for unit in units if not any(span.start % unit for span in cut)))


def read_span(
    source: Source, key: str, tree: Tree, statistic: Statistic[S], as_stored: bool, span: Span, *lazy: Any
) -> tuple[Partial[S], Tally]:
    """Task: reduce the rows of one span, or of those that are its turn."""
    partial = Partial(tree, statistic)
    with share_of_pass(key) as share, one_blas_thread():  # given back before the pass hears that the task is done
        for block in source.blocks(span, share, tree.tile_rows, lazy, confirmed=False, as_stored=as_stored):
            partial.take(block)
    return partial, share.tally


def merge(*parts: tuple[Partial[S], Tally]) -> tuple[Partial[S], Tally]:
    """Task: join partials, in whatever order; nothing that was passed in is changed."""
    first = parts[0][0]
    with one_blas_thread():  # ends of spans that meet become tiles here
        joined = Partial(first.tree, first.statistic).join(partial for partial, _ in parts)
    return joined, sum((tally for _, tally in parts), Tally())
