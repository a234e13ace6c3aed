"""The plan of a pass: its spans, its tasks and its memory, in integers, before any row is read."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import dask
import dask.base
from dask.system import CPU_COUNT

from streamlr.aggregates.tree import Statistic, open_nodes
from streamlr.dataset.blocks import Plan, Span, format_bytes, spans, tile_rows
from streamlr.dataset.dask_rows import DaskRows
from streamlr.dataset.dataset import Dataset
from streamlr.errors import MemoryLimitExceeded
from streamlr.passes.memory import memory_in_use, memory_limit

FAN_IN = 4  # partials that one merging task joins
OPEN_BYTES = 32 * 2**20  # what a span may leave; more, and it is cut at powers of two of tiles, to leave one node


def plan_pass(
    dataset: Dataset, statistic: Statistic[Any], *, task: str, memory: int | str | None, solution_bytes: int = 0
) -> tuple[Plan, list[Span]]:
    """Plan a reduction: as many tasks at once as there are workers and as memory allows.

    Takes and returns what `draft_pass` does.

    Raises
    ------
    MemoryLimitExceeded
        Not even one task at a time fits; the message has the numbers and a remedy.
    """
    plan, cut = draft_pass(dataset, statistic, task=task, memory=memory, solution_bytes=solution_bytes)
    check_plan(plan)
    return plan, cut


def draft_pass(
    dataset: Dataset, statistic: Statistic[Any], *, task: str, memory: int | str | None, solution_bytes: int = 0
) -> tuple[Plan, list[Span]]:
    """Return the plan of a reduction, whether it fits or not, and its spans.

    Parameters
    ----------
    dataset : Dataset
        What will be read.
    statistic : Statistic
        What will be made of it.
    task : str
        What the pass is for.
    memory : int, str or None
        The limit; see `memory_limit`.
    solution_bytes : int
        What the solver needs afterwards.
    """
    workers = worker_count()
    width = dataset.n_features + dataset.n_targets
    tile = tile_rows(width, statistic.nbytes)
    tile_bytes = min(tile, dataset.stored_rows) * width * 8
    whole_tiles = 12 * statistic.nbytes + 2 * tile_bytes > OPEN_BYTES
    lazy = [rows for rows in dataset.arrays if isinstance(rows, DaskRows)]
    if lazy:
        cut = block_spans(max(lazy, key=lambda rows: rows.row_bytes))
    else:
        heaviest_first = sorted(dataset.arrays, key=lambda rows: -rows.row_bytes)
        chunks = [rows.chunk_rows for rows in heaviest_first]
        cut = spans(
            dataset.stored_rows,
            dataset.row_bytes,
            tile=tile,
            chunks=chunks,
            workers=workers,
            whole_tiles=whole_tiles,
        )
    tiles = -(-max(span.stop - span.start for span in cut) // tile) + 1
    nodes = 1 if whole_tiles and not lazy else open_nodes(tiles)
    ragged = any(span.start % tile for span in cut)  # ends of spans, kept as rows
    left = nodes * statistic.nbytes + (2 * tile_bytes if ragged else 0)
    merges, level, waiting = 0, len(cut), 0
    while level > 1:
        level = -(-level // FAN_IN)
        merges += level
        waiting += FAN_IN - 1
    task_bytes = dataset.reader_bytes + left + 2 * statistic.nbytes
    waiting_bytes = min(waiting, len(cut)) * left
    plan = draft_plan(
        dataset,
        cut,
        task=task,
        merges=merges,
        task_bytes=task_bytes,
        result_bytes=waiting_bytes,
        solution_bytes=solution_bytes,
        tile=tile,
        memory=memory,
    )
    return plan, cut


def check_plan(plan: Plan) -> None:
    """Raise `MemoryLimitExceeded` unless a plan fits into its limit with one task at a time."""
    if not plan.fits:
        needed = plan.base_bytes + max(plan.result_bytes + plan.task_bytes, plan.solution_bytes)
        raise MemoryLimitExceeded(
            f"one task at a time needs {format_bytes(needed)} ({format_bytes(plan.base_bytes)} for Python; then "
            f"{format_bytes(plan.task_bytes)} for decoded chunks and tiles and {format_bytes(plan.result_bytes)} for results and "
            f"buffers, and later {format_bytes(plan.solution_bytes)} to solve for {plan.n_features:,} columns), and the limit is "
            f"{format_bytes(plan.limit_bytes)} ({plan.limit_source}); raise memory_limit (--memory-limit), rewrite the store with "
            "smaller chunks, or use fewer columns"
        )


def make_plan(dataset: Dataset, cut: Sequence[Span], **needs: Any) -> Plan:
    """Return what `draft_plan` does, or raise `MemoryLimitExceeded`."""
    plan = draft_plan(dataset, cut, **needs)
    check_plan(plan)
    return plan


def draft_plan(
    dataset: Dataset,
    cut: Sequence[Span],
    *,
    task: str,
    merges: int,
    task_bytes: int,
    result_bytes: int,
    solution_bytes: int = 0,
    passes: int = 1,
    tile: int | None = None,
    memory: int | str | None,
) -> Plan:
    """Return the plan of these spans with as many tasks at once as the limit allows; none where not even one fits.

    The solution is made when no task runs any more, so the peak is the larger of the two.
    """
    limit, source = memory_limit(memory)
    base = memory_in_use(source)
    at_once = min(worker_count(), len(cut), max(limit - base - result_bytes, 0) // task_bytes)
    return Plan(
        solver=task,
        n_rows=dataset.stored_rows,
        n_features=dataset.n_features,
        n_targets=dataset.n_targets,
        passes=passes,
        tile_rows=tile or dataset.tile_rows,
        n_spans=len(cut),
        n_tasks=len(cut) + merges,
        tasks_at_once=at_once,
        bytes_read=dataset.stored_rows * dataset.row_bytes,
        base_bytes=base,
        task_bytes=task_bytes,
        result_bytes=result_bytes,
        solution_bytes=solution_bytes,
        peak_bytes=base + max(result_bytes + at_once * task_bytes, solution_bytes),
        limit_bytes=limit,
        limit_source=source,
    )


def block_spans(rows: DaskRows) -> list[Span]:
    """Return one span for each row of blocks of a Dask array."""
    cut, start = [], 0
    for size in rows.array.chunks[0]:
        if size:
            cut.append(Span(start, start + int(size)))
            start += int(size)
    return cut


def worker_count() -> int:
    """Return how many tasks Dask would run at once: its `num_workers`, else one for each processor this process may use."""
    if has_pool():
        return int(dask.config.get("num_workers", None) or CPU_COUNT or 1)
    scheduler = ambient_scheduler()
    return 1 if getattr(scheduler, "__name__", "") == "get_sync" else int(CPU_COUNT or os.cpu_count() or 1)


def ambient_scheduler() -> Any:
    """Return the scheduler that Dask's settings or an active client ask for, or None when nobody asked.

    Dask looks for a client by importing `distributed`, a second and 60 MB; but there is none before somebody else imported it.
    """
    if dask.config.get("scheduler", None) is None and "distributed" not in sys.modules:
        return None
    return dask.base.get_scheduler()


def is_threaded() -> bool:
    """Whether Dask's ambient scheduler is the threaded one, which is what it is when nobody chose another."""
    scheduler = ambient_scheduler()
    return scheduler is None or getattr(scheduler, "__module__", "") == "dask.threaded"


def has_pool() -> bool:
    """Whether it runs tasks on so many threads or processes of this machine as it is told."""
    return is_threaded() or getattr(ambient_scheduler(), "__module__", "") == "dask.multiprocessing"
