"""write(): every row once, to rows of another store."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from dask.delayed import delayed
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from streamlr.dataset.blocks import Block, Plan, Span, spans, tile_rows
from streamlr.dataset.dask_rows import DaskRows
from streamlr.dataset.dataset import Dataset
from streamlr.dataset.integrity import array_fingerprint, local_root
from streamlr.dataset.rows import MemoryRows
from streamlr.dataset.tally import Tally
from streamlr.dataset.zarr_rows import ZarrRows
from streamlr.errors import Cancelled, UsageError
from streamlr.files import check_output, publish
from streamlr.passes.memory import one_blas_thread
from streamlr.passes.planning import is_waited_for, make_plan, tasks_together
from streamlr.passes.progress import Callback, running_pass, share_of_pass
from streamlr.passes.tasks import Source, begin, compute, end, errors_of_graphs, span_tasks

CHUNK_ROWS = 65_536  # of the output, where the input has no chunks
Function = Callable[[Block], NDArray[np.float64]]


def write(
    dataset: Dataset,
    function: Function,
    path: str | os.PathLike[str],
    *,
    name: str,
    n_columns: int,
    overwrite: bool = False,
    memory_limit: int | str | None = None,
    progress: Callback | None = None,
) -> Tally:
    """Apply a function to every row and write what it returns to a new zarr group, which appears when it is complete.

    Parameters
    ----------
    dataset : Dataset
        The rows. One with `missing="drop"` keeps every row's place: a row with a missing value gives NaN, and is counted.
    function : callable
        From a `Block` of m rows to (m, n_columns) float64.
    path : path
        The group to write, with the one array `name` in chunks of as many rows as X has.
    name : str
        Name of the array; also what the pass is called.
    n_columns : int
        Columns of the result; one gives a 1-D array.
    overwrite : bool
        Replace the store at `path`.
    memory_limit, progress
        As for `reduce`.

    Raises
    ------
    OutputExists
        There is something at `path`; with `overwrite`, something that is no zarr store.
    UsageError
        The dataset is a part of a split, whose rows have no places of their own, or `path` overlaps with a store that is read.
    MemoryLimitExceeded, DataError
        As for `reduce`; nothing is left at `path` then.
    """
    if dataset.subsets:
        raise UsageError("a part of a split has no row order of its own to write; use the whole dataset")
    check_apart(dataset, path)
    check_output(path, overwrite=overwrite, folder=True)  # before a plan is made and the store looked through
    rows = dataset.features[0]
    chunk = CHUNK_ROWS if isinstance(rows, MemoryRows) else rows.chunk_rows
    chunk = min(chunk, dataset.stored_rows)
    plan, cut = _plan(dataset, name, chunk, n_columns, memory_limit)
    before = begin(dataset)
    with (
        publish(path, overwrite=overwrite, folder=True) as beside,
        running_pass(name, dataset.stored_rows, dataset.row_bytes, progress) as key,
    ):
        array = zarr.open_group(str(beside), mode="w").create_array(
            name,
            shape=(dataset.stored_rows,) if n_columns == 1 else (dataset.stored_rows, n_columns),
            chunks=(chunk,) if n_columns == 1 else (chunk, n_columns),
            dtype="float64",
            compressors=[ZstdCodec(level=0), Crc32cCodec()],
            fill_value=np.nan,
            config={"write_empty_chunks": True},
        )
        whole = dataset.keeping_places() if dataset.missing == "drop" else dataset
        tasks = span_tasks(whole, cut, name, key, write_span, function, array)
        with errors_of_graphs(dataset):
            tallies = compute(delayed(list)(tasks), dataset.arrays, key, plan.tasks_at_once)
        array_fingerprint(array, name, None, "and let all workers write to one disk that they share")  # none wrote elsewhere
        tally = sum(tallies, Tally())
        end(dataset, before, tally)
    return tally


def check_apart(dataset: Dataset, output: str | os.PathLike[str]) -> None:
    """Raise `UsageError` when `output` is, lies inside, or contains a local store that the dataset reads."""
    place = Path(output).resolve()
    for rows in dataset.arrays:
        sources = [rows.array] if isinstance(rows, ZarrRows) else []
        if isinstance(rows, DaskRows):
            sources = [array for _, array in rows.zarr_sources()]
        for root in filter(None, map(local_root, sources)):
            store = root.resolve()
            if place.is_relative_to(store) or store.is_relative_to(place):
                raise UsageError(f"the output {output} overlaps with {root}, which is read; write beside the data, not over them")


def write_span(source: Source, key: str, function: Function, array: zarr.Array[Any], span: Span, *lazy: Any) -> Tally:
    """Task: write the rows of one span, which starts where a chunk of the output starts, chunk by chunk."""
    chunk = array.chunks[0]
    buffer = np.empty((min(chunk, span.stop - span.start), *array.shape[1:]))
    flat, root = buffer.reshape(len(buffer), -1), local_root(array)
    with share_of_pass(key) as share, one_blas_thread():  # given back before the pass hears that the task is done
        for block in source.blocks(span, share, _tile_rows(source.dataset, flat.shape[1]), lazy):
            values = function(block)
            done = 0
            while done < len(values):
                row = block.start + done
                first = row - row % chunk
                take = min(first + chunk - row, len(values) - done)
                flat[row - first : row - first + take] = values[done : done + take]
                done += take
                if row + take == min(first + chunk, span.stop):
                    if root is not None and not (root / array.path / "zarr.json").exists():  # zarr would make it anew
                        raise Cancelled(f"{root} was removed while it was written; nothing is left of it")
                    array[first : row + take] = buffer[: row + take - first]
    return share.tally


def _plan(dataset: Dataset, name: str, chunk: int, n_columns: int, memory: int | str | None) -> tuple[Plan, list[Span]]:
    """Plan spans that start where chunks of the output start; a Dask array is cut at every one, to hold one block in memory."""
    n, tile = dataset.stored_rows, _tile_rows(dataset, n_columns)
    if dataset.lazy:
        cut = [Span(start, min(start + chunk, n)) for start in range(0, n, chunk)]
    else:
        workers, waiting = tasks_together(), is_waited_for(dataset)
        cut = spans(n, dataset.row_bytes, tile=tile, chunks=[chunk], workers=workers, whole_tiles=False, waiting=waiting)
    written = 3 * chunk + min(tile, n)  # rows: the buffer, zarr's copy of it, its compressed bytes, and what a tile becomes
    task_bytes = dataset.reader_bytes(tile) + written * n_columns * 8
    return make_plan(dataset, cut, task=name, merges=0, task_bytes=task_bytes, result_bytes=0, tile=tile, memory=memory), cut


def _tile_rows(dataset: Dataset, n_columns: int) -> int:
    """Return how many rows are read and computed at a time, of which nothing but their results is left."""
    return tile_rows(max(dataset.n_features, n_columns), 0)
