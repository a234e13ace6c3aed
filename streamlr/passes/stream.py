"""stream(): every row once an epoch, in a seeded order, read and decoded ahead of whoever uses it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from itertools import pairwise
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import Plan, Span, format_bytes
from streamlr.dataset.dataset import Dataset
from streamlr.dataset.tally import Tally
from streamlr.errors import MemoryLimitExceeded, UsageError
from streamlr.passes.memory import one_blas_thread
from streamlr.passes.order import Order, Picked, unit_spans
from streamlr.passes.pieces import Prepare, new_piece, prepared
from streamlr.passes.planning import make_plan
from streamlr.passes.progress import Callback, running_pass, share_of_pass
from streamlr.passes.shuffle import START, Piece, Position, Stretch
from streamlr.passes.tasks import begin, end

PIECES_AHEAD = 8

Array = NDArray[np.float64]


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
    """Plan epochs: as many readers at once as there are workers and as memory allows; buffers are never shrunk.

    Of several streams, each is a task that has a buffer and a state of its own.

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
    UsageError
        There are more streams than chunks to share.
    """
    units, streams = unit_spans(dataset, order.streams), order.streams
    if streams > len(units):
        raise UsageError(f"streams is {streams:,}, and the rows are in {len(units):,} chunk(s); choose at most so many streams")
    capacity = order.capacity(dataset, width)
    buffer = (capacity * width + 2 * (capacity // order.run + 1)) * 8  # two integers a run for the order of its slots
    reading, descending = dataset.reader_bytes, buffer + order.stretch_rows(width) * width * 8
    try:
        if streams > 1:
            if dataset.lazy:
                reading *= 2  # one block is computed while another is used
            return make_plan(
                dataset,
                range(streams),
                task=task,
                merges=1,
                task_bytes=reading + new_piece(width).nbytes + descending + state_bytes + 8 * len(units),  # and their order
                result_bytes=streams * state_bytes,
                solution_bytes=sample_bytes + streams * state_bytes,  # of who asks for them, whose sample comes first
                passes=passes,
                memory=memory,
            )
        plan = make_plan(
            dataset,
            units,
            task=task,
            merges=0,
            task_bytes=reading + PIECES_AHEAD * new_piece(width).nbytes,
            result_bytes=max(descending, sample_bytes) + state_bytes,
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
        order = self.order
        units = order.units(self.dataset, number)
        with closing(self._pieces(units, start)) as pieces:  # by itself it would live as long as the traceback of an error
            yield from order.stretches(pieces, self.width, order.capacity(self.dataset, self.width), (number,), start)

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
                own = Picked(units, range(start.unit + i, len(units), len(lanes)))
                run, work = copy_context().run, (self._read, lane, own, key)  # the context knows the active client
                threads.append(Thread(target=run, args=work, name=f"streamlr_reader-{i}", daemon=True))
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

    def _read(self, lane: _Lane, units: Sequence[Span], key: str) -> None:
        """Thread: read units, prepare their rows, and hand them over; an error is handed over too."""
        try:
            with (
                share_of_pass(key) as share,
                np.errstate(all="ignore"),  # what leaves the range of float64 shows in the descent
                closing(prepared(self.dataset, units, self.prepare, share.note, lane.rooms())) as found,
            ):
                for unit in found:
                    for piece in unit:
                        lane.full.put(piece)
                    lane.tally = share.tally
                    lane.full.put(None)
        except BaseException as error:
            lane.full.put(error)


@dataclass
class _Lane:
    """What a reader and its taker exchange: pieces of memory, full and free."""

    width: int
    full: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    free: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        for _ in range(PIECES_AHEAD):
            self.free.put(new_piece(self.width))

    def rooms(self) -> Iterator[Array]:
        """Yield free pieces of memory, until the taker has gone."""
        while (memory := self.free.get()) is not None:
            yield memory
