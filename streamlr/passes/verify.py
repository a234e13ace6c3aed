"""verify: every chunk once, to the list of those that are missing or damaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dask.delayed import Delayed, delayed

from streamlr.dataset.blocks import MAX_SPANS, MIN_SPAN_BYTES, WAITING_SPAN_BYTES, Span, format_bytes
from streamlr.dataset.tally import Tally
from streamlr.dataset.zarr_rows import ZarrRows
from streamlr.errors import DataError, MemoryLimitExceeded
from streamlr.passes.memory import memory_in_use, memory_limit
from streamlr.passes.progress import Callback, running_pass, share_of_pass
from streamlr.passes.schedulers import active_client, worker_count
from streamlr.passes.tasks import compute, tasks_of
from streamlr.passes.workers import workers_of


@dataclass(frozen=True, slots=True)
class Problem:
    """A chunk that cannot be what was written.

    Attributes
    ----------
    array : str
        Name of the array.
    chunk : str
        Position of the chunk, such as "3.0".
    kind : str
        Name of the error that reading it would raise.
    message : str
        What is wrong, and what to do.
    """

    array: str
    chunk: str
    kind: str
    message: str


def verify_chunks(
    arrays: Sequence[ZarrRows], progress: Callback | None, memory: int | str | None = None
) -> tuple[int, list[Problem]]:
    """Read and check every chunk; return how many there are, and the problems in order of array and position.

    Parameters
    ----------
    arrays : sequence of ZarrRows
        Whole arrays.
    progress : callable, optional
        Called with an `Event` at every row of chunks.
    memory : int, str or None
        The limit; see `memory_limit`.

    Raises
    ------
    MemoryLimitExceeded
        Not even one task at a time fits.
    """
    total = sum(rows.n_rows for rows in arrays)
    total_bytes = sum(rows.n_rows * rows.row_bytes for rows in arrays)
    span_bytes = max(MIN_SPAN_BYTES, -(-total_bytes // MAX_SPANS))
    at_once = _tasks_at_once(arrays, memory)
    if any(rows.are_asked_ahead for rows in arrays):
        span_bytes = max(span_bytes, min(total_bytes // (2 * at_once), WAITING_SPAN_BYTES))
    with running_pass("verify", total, total_bytes // max(total, 1), progress) as key:
        tasks: list[Delayed] = []
        for rows in arrays:
            height = rows.array.chunks[0]
            n_row_chunks = -(-rows.n_rows // height)
            each = max(span_bytes // max(height * rows.row_bytes, 1), 1)
            cut = [Span(first, min(first + each, n_row_chunks)) for first in range(0, n_row_chunks, each)]
            tasks += tasks_of(zip(cut, strict=True), f"verify {rows.label}", key, check_rows_of_chunks, (rows, key))
        found = compute(delayed(list)(tasks), arrays, key, at_once) if tasks else []
    return sum(count for count, _ in found), [problem for _, problems in found for problem in problems]


def _tasks_at_once(arrays: Sequence[ZarrRows], memory: int | str | None) -> int:
    """Return how many tasks fit into memory, each with the reader of the array that needs most."""
    largest = max(arrays, key=lambda rows: rows.reader_bytes)
    if client := active_client():
        workers = workers_of(client)
        (limit, source), base, at_once, together = (
            workers.memory_limit(memory),
            workers.used_bytes,
            workers.threads,
            workers.together,
        )
    else:
        limit, source = memory_limit(memory)
        base, at_once, together = memory_in_use(source), worker_count(), 1
    fitting = (limit - base) // max(largest.reader_bytes, 1)
    if fitting < together:
        tasks = "one task at a time needs" if together == 1 else f"the {together} tasks that a worker runs at once need"
        raise MemoryLimitExceeded(
            f"{tasks} {format_bytes(base + together * largest.reader_bytes)} ({format_bytes(base)} for Python, "
            f"{format_bytes(largest.reader_bytes)} for a row of chunks of array {largest.label!r}), and the limit is "
            f"{format_bytes(limit)} ({source}); raise memory_limit (--memory-limit), or rewrite the store with smaller chunks"
        )
    return min(at_once, fitting)


def check_rows_of_chunks(rows: ZarrRows, key: str, row_chunks: Span) -> tuple[int, list[Problem]]:
    """Task: check the chunks in some rows of chunks of one array."""
    reader, height = rows.reader(), rows.array.chunks[0]
    count = 0
    problems: list[Problem] = []
    with share_of_pass(key) as share:
        reader.expect([Span(row_chunks.start * height, min(row_chunks.stop * height, rows.n_rows))])
        try:
            for position in rows.positions(row_chunks.start, row_chunks.stop):
                count += 1
                try:
                    reader.chunk(position)
                except DataError as error:
                    problems.append(Problem(rows.label, ".".join(map(str, position)), type(error).__name__, str(error)))
                if position[1:] in ((), (0,)):
                    share.note(Tally(rows=min(height, rows.n_rows - position[0] * height)))
        finally:
            reader.expect(())  # an error leaves no request behind
    return count, problems
