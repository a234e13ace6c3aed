"""The plan of a pass: its spans, its tasks and its memory, in integers, before any row is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamlr.aggregates.tree import Statistic, open_nodes
from streamlr.dataset.blocks import Plan, Span, format_bytes, spans, tile_rows
from streamlr.dataset.dask_rows import DaskRows
from streamlr.dataset.dataset import Dataset
from streamlr.dataset.zarr_rows import ZarrRows
from streamlr.errors import MemoryLimitExceeded
from streamlr.passes.memory import memory_in_use, memory_limit
from streamlr.passes.schedulers import active_client, is_threaded, worker_count
from streamlr.passes.workers import workers_of

FAN_IN, MOST_FAN_IN = 4, 32  # partials that one merging task joins: few hold little memory; many are fewer tasks, of 1 ms each
WAITING_BYTES = 128 * 2**20  # of them, where they are many
OPEN_BYTES = 32 * 2**20  # what a span may leave; more, and it is cut at powers of two of tiles, to leave one node
RUN = 8  # spans that a thread reads on end: each doubling halves the edges, and holds some more nodes


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
    workers = tasks_together()
    plan, cut = _drafted(dataset, statistic, task, memory, solution_bytes, workers)
    if 0 < plan.tasks_at_once < workers:  # as many spans for each of those that there is memory for
        again = _drafted(dataset, statistic, task, memory, solution_bytes, plan.tasks_at_once)
        if again[0].tasks_at_once == plan.tasks_at_once:
            return again
    return plan, cut


def _drafted(
    dataset: Dataset, statistic: Statistic[Any], task: str, memory: int | str | None, solution_bytes: int, workers: int
) -> tuple[Plan, list[Span]]:
    """Return the plan for so many tasks at once, or fewer."""
    width = dataset.n_features + dataset.n_targets
    tile = tile_rows(width, statistic.nbytes)
    tile_bytes = min(tile, dataset.stored_rows) * width * 8
    whole_tiles = 12 * statistic.nbytes + 2 * tile_bytes > OPEN_BYTES
    lazy = dataset.lazy
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
            waiting=is_waited_for(dataset),
        )
    run = RUN if is_threaded() and not lazy else 1
    tiles = -(-run * max(span.stop - span.start for span in cut) // tile) + 1
    nodes = 1 if whole_tiles and not lazy else open_nodes(tiles)
    ragged = any(span.start % tile for span in cut)  # ends of spans, kept as rows
    left = nodes * statistic.nbytes + (2 * tile_bytes if ragged else 0)
    fan_in = FAN_IN if active_client() is None else min(max(FAN_IN, WAITING_BYTES // left), MOST_FAN_IN)
    merges, level, waiting = 0, len(cut), 0
    while level > 1:
        level = -(-level // fan_in)
        merges += level
        waiting += fan_in - 1
    held = min(run, len(cut)).bit_length() - 1  # nodes of a run that wait for its last span
    made = dataset.tile_bytes(tile) + statistic.row_bytes * min(tile, dataset.stored_rows)
    task_bytes = dataset.reader_bytes(tile) + made + left + (held + 2) * statistic.nbytes
    waiting_bytes = min(waiting, len(cut)) * left
    plan = draft_plan(
        dataset,
        cut,
        task=task,
        merges=merges,
        fan_in=fan_in,
        spans_per_task=run,
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
        together = plan.tasks_per_process
        needed = plan.base_bytes + max(plan.result_bytes + together * plan.task_bytes, plan.solution_bytes)
        tasks = "one task at a time needs" if together == 1 else f"the {together} tasks that a worker runs at once need"
        fewer = "" if together == 1 else ", or start workers with fewer threads"
        raise MemoryLimitExceeded(
            f"{tasks} {format_bytes(needed)} ({format_bytes(plan.base_bytes)} for Python; then {format_bytes(plan.task_bytes)} a "
            f"task for decoded chunks and tiles and {format_bytes(plan.result_bytes)} for results and buffers, and later "
            f"{format_bytes(plan.solution_bytes)} to solve for {plan.n_features:,} columns), and the limit is "
            f"{format_bytes(plan.limit_bytes)} ({plan.limit_source}); raise memory_limit (--memory-limit), rewrite the store with "
            f"smaller chunks, or use fewer columns{fewer}"
        )


def make_plan(dataset: Dataset, cut: Sequence[Any], **needs: Any) -> Plan:
    """Return what `draft_plan` does, or raise `MemoryLimitExceeded`."""
    plan = draft_plan(dataset, cut, **needs)
    check_plan(plan)
    return plan


def draft_plan(
    dataset: Dataset,
    cut: Sequence[Any],
    *,
    task: str,
    merges: int,
    fan_in: int = 0,
    spans_per_task: int = 1,
    task_bytes: int,
    result_bytes: int,
    solution_bytes: int = 0,
    passes: int = 1,
    tile: int | None = None,
    memory: int | str | None,
    here: bool = False,
) -> Plan:
    """Return the plan of these spans, one a task, with as many tasks at once as the limit allows; none where not even one fits.

    The solution is made when no task runs any more, so the peak is the larger of the two. On a cluster the memory is a worker's,
    which runs as many tasks at once as it has threads, whatever they need, and the solution is made by the client, which must have
    room for it; but tasks that are threads of this process stay `here`.
    """
    client = None if here else active_client()
    if client is None:
        limit, source = memory_limit(memory)
        base = memory_in_use(source)
        at_once = min(worker_count(), len(cut), max(limit - base - result_bytes, 0) // task_bytes)
        together = max(at_once, 1)
    else:
        workers = workers_of(client)
        limit, source = workers.memory_limit(memory)
        base, together = workers.used_bytes, min(workers.together, len(cut))
        at_once = min(workers.threads, len(cut)) if base + result_bytes + together * task_bytes <= limit else 0
        own_limit, own_source = memory_limit(None)  # the solution is made here
        own_base = memory_in_use(own_source)
        if own_base + solution_bytes > own_limit:
            limit, source, base, at_once, together = own_limit, f"{own_source}, of the client", own_base, 0, 1
        else:
            solution_bytes = 0
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
        tasks_per_process=together,
        fan_in=fan_in,
        spans_per_task=spans_per_task,
        bytes_read=dataset.stored_rows * dataset.row_bytes,
        base_bytes=base,
        task_bytes=task_bytes,
        result_bytes=result_bytes,
        solution_bytes=solution_bytes,
        peak_bytes=base + max(result_bytes + together * task_bytes * (at_once > 0), solution_bytes),
        limit_bytes=limit,
        limit_source=source,
    )


def is_waited_for(dataset: Dataset) -> bool:
    """Whether some of the rows come from a store with latency."""
    return any(isinstance(rows, ZarrRows) and rows.are_asked_ahead for rows in dataset.arrays)


def tasks_together() -> int:
    """Return how many tasks run at once: on the workers of an active client, else on this machine."""
    client = active_client()
    return worker_count() if client is None else workers_of(client).threads


def block_spans(rows: DaskRows) -> list[Span]:
    """Return one span for each row of blocks of a Dask array."""
    cut, start = [], 0
    for size in rows.array.chunks[0]:
        if size:
            cut.append(Span(start, start + int(size)))
            start += int(size)
    return cut
