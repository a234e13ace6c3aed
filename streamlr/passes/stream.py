"""stream(): every row once an epoch, in a seeded order, read and decoded ahead of whoever uses it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import lcm
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import Block, Plan, Span, format_bytes
from streamlr.dataset.checked import DatasetReader
from streamlr.dataset.dask_rows import DaskRows
from streamlr.dataset.dataset import Dataset
from streamlr.dataset.tally import Tally
from streamlr.errors import MemoryLimitExceeded
from streamlr.passes.memory import one_blas_thread
from streamlr.passes.planning import block_spans, make_plan
from streamlr.passes.progress import Callback, running_pass, share_of_pass
from streamlr.passes.shuffle import START, Piece, Position, Stretch, as_stored, shuffled
from streamlr.passes.tasks import begin, end, with_computed

UNIT_BYTES = 4 * 2**20  # smaller chunks are read several at a time
PIECE_BYTES = 2**20  # what a reader hands over at once; about a core's cache
PIECES_AHEAD = 8
STRETCH_BYTES = 2**20
BUFFER_BYTES = 64 * 2**20
DRAWS = 256  # from the shuffle buffer for a batch, at least
BUFFER_UNITS = 4  # a buffer holds at least so many units, so that it mixes rows from as many places

Array = NDArray[np.float64]
Prepare = Callable[[Array, Array, Array | None, Array], None]


@dataclass(frozen=True, slots=True)
class Order:
    """The order of rows: a function of the dataset's shape, dtypes and chunk grid, and of these options.

    Attributes
    ----------
    batch_rows : int
        Rows of a batch; stretches are whole batches.
    seed : int
        Another seed, another order.
    shuffle : bool
        Shuffle units, and rows in a buffer; else rows come as stored.
    buffer_rows : int or None
        Rows of the buffer; None for four units, at least 64 MiB of rows.
    """

    batch_rows: int
    seed: int
    shuffle: bool = True
    buffer_rows: int | None = None

    def stretch_rows(self, width: int) -> int:
        """Rows that are handed out together: whole batches, about a cache full."""
        return self.batch_rows * max(STRETCH_BYTES // (8 * width * self.batch_rows), 1)

    @property
    def run(self) -> int:
        """Rows that stay neighbours in the buffer, which memory likes: one, but for batches of more than 256."""
        return max(self.batch_rows // DRAWS, 1)

    def capacity(self, dataset: Dataset, width: int) -> int:
        """Rows of the shuffle buffer; 0 without one."""
        if not self.shuffle:
            return 0
        wanted = self.buffer_rows or max(BUFFER_UNITS * most_rows(unit_spans(dataset)), BUFFER_BYTES // (8 * width))
        return min(wanted, dataset.stored_rows)

    def units(self, dataset: Dataset, epoch: int) -> Sequence[Span]:
        """Return the units in the order of an epoch."""
        units = unit_spans(dataset)
        if not self.shuffle:
            return units
        return Shuffled(units, np.random.default_rng((self.seed, epoch)).permutation(len(units)))


@dataclass(frozen=True, slots=True)
class Even(Sequence[Span]):
    """The rows [0, `rows`) in units of `step` rows, the last perhaps shorter: two numbers, however many units there are."""

    rows: int
    step: int

    def __len__(self) -> int:
        return -(-self.rows // self.step)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return Span(number * self.step, min((number + 1) * self.step, self.rows))


@dataclass(frozen=True, slots=True)
class Shuffled(Sequence[Span]):
    """Units in another order."""

    units: Sequence[Span]
    order: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: Any) -> Any:
        return self.units[int(self.order[number])]


def unit_spans(dataset: Dataset) -> Sequence[Span]:
    """Cut the rows into units of reading: one chunk, or as many small ones as make 4 MiB; one row of blocks of a Dask array.

    Where arrays have chunks of different heights, units end where chunks of all of them end, as long as that takes no more than
    16 MiB; else where chunks of the array with the longest rows end, and the others are decoded again where units share them.
    """
    lazy = [rows for rows in dataset.arrays if isinstance(rows, DaskRows)]
    if lazy:
        return block_spans(max(lazy, key=lambda rows: rows.row_bytes))
    chunk = max(dataset.arrays, key=lambda rows: rows.row_bytes).decoded_rows
    shared = lcm(*(rows.decoded_rows for rows in dataset.arrays))
    if shared * dataset.row_bytes <= BUFFER_BYTES // BUFFER_UNITS:
        chunk = shared
    return Even(dataset.stored_rows, chunk * max(UNIT_BYTES // (chunk * dataset.row_bytes), 1))


def most_rows(units: Sequence[Span]) -> int:
    """Return the rows of the largest unit."""
    return min(units.step, units.rows) if isinstance(units, Even) else max(span.stop - span.start for span in units)


def plan_stream(
    dataset: Dataset,
    order: Order,
    *,
    task: str,
    width: int,
    sample_bytes: int,
    state_bytes: int = 0,
    passes: int,
    memory: int | str | None,
) -> Plan:
    """Plan epochs: as many readers at once as there are workers and as memory allows; the buffer is never shrunk.

    Parameters
    ----------
    dataset, order
        What is read, and in which order.
    task : str
        What it is for.
    width : int
        Numbers of a prepared row.
    sample_bytes : int
        What a sample takes, before there is a buffer.
    state_bytes : int
        What the descent itself holds.
    passes : int
        Readings of all rows at most.
    memory : int, str or None
        The limit; see `memory_limit`.

    Raises
    ------
    MemoryLimitExceeded
        The buffer and one reader do not fit; the message has the numbers.
    """
    capacity = order.capacity(dataset, width)
    buffer = (capacity * width + 2 * (capacity // order.run + 1)) * 8  # two integers a run for the order of its slots
    try:
        plan = make_plan(
            dataset,
            unit_spans(dataset),
            task=task,
            merges=0,
            task_bytes=dataset.reader_bytes + PIECES_AHEAD * _piece_rows(width) * width * 8,
            result_bytes=max(buffer + order.stretch_rows(width) * width * 8, sample_bytes) + state_bytes,
            passes=passes,
            memory=memory,
            here=True,
        )
        return replace(plan, n_tasks=plan.tasks_at_once)  # threads that read, each its share of the units
    except MemoryLimitExceeded as error:
        if not buffer:
            raise
        raise MemoryLimitExceeded(
            f"{error}; {format_bytes(buffer)} of it are the shuffle buffer of {capacity:,} rows: a smaller buffer_rows mixes less"
        ) from None


class RowStream:
    """Epochs of a dataset's rows.

    Parameters
    ----------
    dataset : Dataset
        The rows.
    order : Order
        In which order they come.
    prepare : callable
        Writes rows x (m, p) and y (m, k), with their weights (m,) or None, into `out` (m, width), in the thread that read them.
    width : int
        Numbers of a prepared row.
    readers : int
        Threads that read ahead; the order does not depend on them.
    task : str
        What the pass is called in events.
    progress : callable, optional
        Called with an `Event` at every tile.

    Raises
    ------
    DataError
        A chunk is missing, or the store is not what it was when it was opened.
    """

    def __init__(
        self, dataset: Dataset, order: Order, prepare: Prepare, *, width: int, readers: int, task: str, progress: Callback | None
    ) -> None:
        self.dataset, self.order, self.prepare, self.width = dataset, order, prepare, width
        self.readers, self.task, self.progress = readers, task, progress
        self.tally = Tally()  # of the last reading that came to its end
        self._before = begin(dataset)

    def epoch(self, number: int, start: Position = START) -> Iterator[Stretch]:
        """Yield the stretches of an epoch from `start` on, and check at its end that every row was seen and none has changed."""
        dataset, order = self.dataset, self.order
        units = order.units(dataset, number)
        height = order.stretch_rows(self.width)
        capacity = order.capacity(dataset, self.width)
        with closing(self._pieces(units, start)) as pieces:  # by itself it would live as long as the traceback of an error
            if capacity:
                seed = (order.seed, number)
                yield from shuffled(pieces, height, self.width, start, capacity=capacity, seed=seed, run=order.run)
            else:
                yield from as_stored(pieces, height, self.width, start)

    def sample(self, rows: int, max_units: int) -> Array:
        """Return so many rows of units from all over the dataset, chosen by the seed; all their rows where there are no more.

        Parameters
        ----------
        rows : int
            Rows wanted.
        max_units : int
            Units that are read: one from each of so many stretches of the dataset, so that rows sorted by anything are met.
        """
        units = unit_spans(self.dataset)
        rng = np.random.default_rng((self.order.seed, 0, 0))
        edges = np.linspace(0, len(units), min(max_units, len(units)) + 1).astype(int)
        chosen = [units[int(rng.integers(a, b))] for a, b in pairwise(edges)]
        most = min(rows, sum(span.stop - span.start for span in chosen))
        kept, keys, filled = np.empty((most, self.width)), np.empty(most), 0
        with closing(self._pieces(chosen, START, whole=False)) as pieces:
            for _, _, piece in pieces:  # nobody knows how many come: those of the least keys stay
                drawn = rng.random(len(piece))
                count = min(len(piece), most - filled)
                kept[filled : filled + count], keys[filled : filled + count] = piece[:count], drawn[:count]
                filled += count
                if count < len(piece):
                    least = np.argpartition(np.concatenate([keys, drawn[count:]]), most)[:most]
                    new = np.sort(least[least >= most]) - most + count
                    lost = np.ones(most, dtype=bool)
                    lost[least[least < most]] = False
                    kept[lost], keys[lost] = piece[new], drawn[new]
        return kept[:filled]

    def _pieces(self, units: Sequence[Span], start: Position, *, whole: bool = True) -> Generator[Piece, None, None]:
        """Read units in order, by threads that each take every so-manieth unit and run ahead by a few pieces."""
        lanes = [_Lane(self.width) for _ in range(min(self.readers, len(units) - start.unit))]
        rows = self.dataset.stored_rows if whole else sum(span.stop - span.start for span in units)
        skipped = sum(units[i].stop - units[i].start for i in range(start.unit))
        with running_pass(self.task, rows, self.dataset.row_bytes, self.progress) as key, one_blas_thread():
            if skipped:
                with share_of_pass(key) as share:
                    share.note(Tally(rows=skipped))
            threads = []
            for i, lane in enumerate(lanes):
                own = range(start.unit + i, len(units), len(lanes))
                threads.append(Thread(target=self._read, args=(lane, units, own, key), daemon=True))
            try:
                for thread in threads:
                    thread.start()
                for number in range(start.unit, len(units)):
                    lane = lanes[(number - start.unit) % len(lanes)]
                    offset = 0
                    while (found := lane.full.get()) is not None:
                        if isinstance(found, BaseException):
                            raise found
                        memory, height = found
                        first = max(start.offset - offset, 0) if number == start.unit else 0
                        if first < height:
                            yield Piece(number, offset + first, memory[first:height])
                        offset += height
                        lane.free.put(memory)
            finally:
                for lane in lanes:
                    lane.free.put(None)  # a reader that waits for memory ends
            for thread in threads:
                thread.join()
            self.tally = sum((lane.tally for lane in lanes), Tally(rows=skipped))
            if whole:
                end(self.dataset, self._before, self.tally)

    def _read(self, lane: _Lane, units: Sequence[Span], own: range, key: str) -> None:
        """Thread: read units, prepare their rows, and hand them over; an error is handed over too."""
        try:
            with share_of_pass(key) as share, np.errstate(all="ignore"):  # what leaves the range of float64 shows in the descent
                reader = None if any(isinstance(rows, DaskRows) for rows in self.dataset.arrays) else self.dataset.reader()
                for number in own:
                    for block in self._blocks(reader, units[number], share.note):
                        for first in range(0, len(block.x), _piece_rows(self.width)):
                            memory = lane.free.get()
                            if memory is None:
                                return
                            x, y = (part[first : first + _piece_rows(self.width)] for part in (block.x, block.y))
                            weights = None if block.weights is None else block.weights[first : first + len(x)]
                            self.prepare(x, y, weights, memory[: len(x)])
                            lane.full.put((memory, len(x)))
                    lane.tally = share.tally
                    lane.full.put(None)
        except BaseException as error:
            lane.full.put(error)

    def _blocks(self, reader: DatasetReader | None, span: Span, report: Callable[[Tally], None]) -> Iterator[Block]:
        if reader is None:
            return with_computed(self.dataset, span).blocks(span, report)
        return reader.blocks(span, report)


@dataclass
class _Lane:
    """What a reader and its taker exchange: pieces of memory, full and free."""

    width: int
    full: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    free: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        for _ in range(PIECES_AHEAD):
            self.free.put(np.empty((_piece_rows(self.width), self.width)))


def _piece_rows(width: int) -> int:
    return max(PIECE_BYTES // (8 * width), 1)
