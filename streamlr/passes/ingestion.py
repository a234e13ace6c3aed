"""Ingestion on a cluster: each file a task, and each chunk of the store written by the task in whose file it begins."""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

from dask.delayed import delayed

from streamlr.dataset.blocks import format_bytes
from streamlr.dataset.row_store import RowStoreWriter
from streamlr.dataset.table_rows import Reading, TableRows
from streamlr.dataset.tables.batches import BLOCK_BYTES, Batch, Table
from streamlr.dataset.tables.levels import Progress, check_levels, levels_in, sort_levels
from streamlr.dataset.tables.missing import Missing, RowCounts, check_rows_left, kept_rows
from streamlr.dataset.tally import Tally
from streamlr.errors import MemoryLimitExceeded, StoreChanged, StreamlrError
from streamlr.passes.progress import running_pass, share_of_pass
from streamlr.passes.schedulers import active_client
from streamlr.passes.tasks import run_pass, tasks_of
from streamlr.passes.workers import Vetted, seen_by_workers, workers_of

PARSERS = ("pyarrow", "google-crc32c")  # what a store holds rests on them too
CHUNKS_HELD, BLOCKS_HELD = 3, 4  # by a task that writes: one is filled, one is written, and compressed; some are parsed ahead
Counted = tuple[dict[str, set[str]], RowCounts]


def active_reading() -> Reading | None:
    """Return who reads files where there is an active client; None for this process, one after another."""
    client = active_client()
    return None if client is None else OnWorkers(client)


class OnWorkers:
    """Files are read by the workers of a cluster, twice: where the rows of one are to lie, those before it must say.

    An error is that of the first file that has one in the first reading, and else in the second, which codes cells.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster, whose workers see the files and write to one disk.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._counts: list[RowCounts] = []

    def levels(
        self, tables: Sequence[Table], categories: Sequence[str], others: Sequence[str], missing: Missing, progress: Progress | None
    ) -> tuple[dict[str, list[str]], int]:
        """Return the sorted levels of each category in all files, and the number of rows read."""
        levels: dict[str, set[str]] = {column: set() for column in categories}
        common = (list(categories), list(others), missing)
        surveyed = self._on_each("levels", find_levels, common, [(table,) for table in tables], tables, progress)
        for table, (found, _) in zip(tables, surveyed, strict=True):
            for column in categories:
                levels[column] |= found[column]
                check_levels(column, levels[column], partial(str, table.path))
        self._counts = [counts for _, counts in surveyed]
        total = sum(self._counts, RowCounts())
        check_rows_left(tables, total)
        if progress is not None:
            progress("levels", total.read)
        return {column: sort_levels(column, found) for column, found in levels.items()}, total.read

    def write(self, writer: RowStoreWriter, rows: TableRows, tables: Sequence[Table], progress: Progress | None) -> RowCounts:
        """Write the rows of all files, of each chunk in one task, and return what was read and left out."""
        counts = self._counts or self._on_each("count", count_rows, (rows,), [(table,) for table in tables], tables, progress)
        self._counts = []  # those of other files are others
        total = sum(counts, RowCounts())
        check_rows_left(tables, total)
        writer.share(total.kept)
        self._check_memory(writer.chunk_bytes)
        path, height, kept = writer.path, writer.rows_per_chunk, [one.kept for one in counts]
        edges = [0, *accumulate(kept)]
        parts = []
        for i, (start, end) in enumerate(pairwise(edges)):
            first, stop = (min(-(-row // height) * height, total.kept) for row in (start, end))  # chunks that begin in this file
            if start == end:  # to be sure that it still has no row
                parts.append((tables[i : i + 1], kept[i : i + 1], 1, 0, (0, 0)))
            elif first < stop:
                whole, needed = bisect_right(edges, stop) - 1, bisect_left(edges, stop)
                parts.append((tables[i:needed], kept[i:needed], whole - i, first, (first - start, stop - start)))
        self._on_each("rows", write_part, (rows, path, height), parts, tables, progress, path)
        if progress is not None:
            progress("rows", total.read)  # what workers told of last may not have been heard
        for left in path.glob("*/c/**/.*"):  # by a worker that was killed
            left.unlink(missing_ok=True)
        return total

    def _check_memory(self, chunk_bytes: int) -> None:
        """Raise `MemoryLimitExceeded` where tasks that write chunks of this size would be too much for a worker."""
        workers = workers_of(self._client)
        limit, source = workers.memory_limit(None)
        task = CHUNKS_HELD * chunk_bytes + BLOCKS_HELD * BLOCK_BYTES
        needed = workers.used_bytes + workers.together * task
        if needed > limit:
            raise MemoryLimitExceeded(
                f"the {workers.together} task(s) that a worker runs at once need {format_bytes(needed)}, {format_bytes(task)} each "
                f"for chunks of {format_bytes(chunk_bytes)} and what is read, and the limit is {format_bytes(limit)} ({source}); "
                "give chunks fewer rows (--rows-per-chunk), or workers more memory or fewer threads"
            )

    def _on_each(
        self,
        stage: str,
        function: Callable[..., Any],
        common: tuple[Any, ...],
        parts: Sequence[tuple[Any, ...]],
        tables: Sequence[Table],
        progress: Progress | None,
        output: Path | None = None,
    ) -> list[Any]:
        """Return what a task makes of each part, or raise the error of the first that has one."""
        looks = [seen_by_workers(table.path) for table in tables]
        looks += [seen_by_workers(output, "zarr.json")] if output else []
        told = None if progress is None else lambda event: progress(stage, event.rows)
        with running_pass(stage, sys.maxsize, 1, told) as key:
            tasks = tasks_of(zip(parts), stage, key, attempt, (function, common, key))
            root = delayed(list)(tasks, dask_key_name=f"gather-{key}")
            found = run_pass(self._client, root, key, Vetted(self._client, looks, PARSERS))
        for one in found:
            if isinstance(one, StreamlrError):
                raise one
        return list(found)


def attempt(function: Callable[..., Any], common: tuple[Any, ...], key: str, part: tuple[Any, ...]) -> Any:
    """Task: return what a function makes of a part, or the error that it raises: the caller wants the first in order of files."""
    with share_of_pass(key) as share:
        counts, noted = RowCounts(), 0

        def note() -> None:
            nonlocal noted
            share.note(Tally(rows=counts.read - noted))
            noted = counts.read

        try:
            return function(*common, *part, counts, note)
        except StreamlrError as error:
            return error


def find_levels(
    categories: list[str], others: list[str], missing: Missing, table: Table, counts: RowCounts, note: Callable[[], None]
) -> Counted:
    """Return the levels of each category in one file, and its counts."""
    return levels_in([table], categories, others, missing, counts, note), counts


def count_rows(rows: TableRows, table: Table, counts: RowCounts, note: Callable[[], None]) -> RowCounts:
    """Return the counts of one file."""
    for _ in kept_rows([table], rows.numbers, list(rows.coding.levels), rows.missing, counts):
        note()
    return counts


def write_part(
    rows: TableRows,
    path: Path,
    height: int,
    tables: Sequence[Table],
    kept: Sequence[int],
    whole: int,
    first_row: int,
    window: tuple[int, int],
    counts: RowCounts,
    note: Callable[[], None],
) -> None:
    """Write the rows of a window, in files of which so many are read to their ends, as chunks of a store from a row on."""

    def batches(some: slice) -> Iterator[Batch]:
        for table, expected in zip(tables[some], kept[some], strict=True):
            before = counts.kept
            yield from kept_rows([table], rows.numbers, list(rows.coding.levels), rows.missing, counts)
            if counts.kept - before != expected:
                raise StoreChanged(
                    f"{table.path} had {expected:,} rows to write, and {counts.kept - before:,} when read again; ingest when "
                    "nobody writes to it"
                )

    complete = batches(slice(whole))
    with rows.writer(path, height, first_row) as writer:
        for _ in rows.write(writer, chain(complete, batches(slice(whole, None))), *window):
            note()
        for _ in complete:  # to its end, where its rows are counted
            note()
        writer.flush()
