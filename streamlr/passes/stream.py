"""stream(): every row once an epoch, in a seeded order, read and decoded ahead of whoever uses it."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from contextvars import copy_context
from dataclasses import replace
from itertools import pairwise
from threading import Condition, Thread

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import Block, Plan, Span, format_bytes
from streamlr.dataset.buffers import Buffer
from streamlr.dataset.checked import surely_finite
from streamlr.dataset.dataset import Dataset
from streamlr.dataset.tally import Tally
from streamlr.errors import MemoryLimitExceeded, UsageError
from streamlr.passes.memory import one_blas_thread
from streamlr.passes.order import Order, Picked, most_rows, unit_spans
from streamlr.passes.planning import make_plan
from streamlr.passes.progress import Callback, running_pass, share_of_pass
from streamlr.passes.shuffle import START, Position, Prepare, Stretch, stretches
from streamlr.passes.tasks import begin, end
from streamlr.passes.windows import Window, read_units

SAMPLED = 4  # units in memory at once while a sample is taken
LATE = -1  # in the place of a unit: all of them were read

Array = NDArray[np.float64]


def plan_stream(
    dataset: Dataset,
    order: Order,
    *,
    task: str,
    sample_bytes: int,
    state_bytes: int = 0,
    passes: int,
    memory: int | str | None,
) -> Plan:
    """Plan epochs: as many readers at once as there are workers and as memory allows; windows are never shrunk.

    Of several streams, each is a task that has a window and a state of its own.

    Parameters
    ----------
    dataset, order
        What is read, and in which order.
    task : str
        What it is for.
    sample_bytes : int
        What a sample takes, before there are windows.
    state_bytes : int
        What the descent itself holds.
    passes : int
        Readings of all rows at most.
    memory : int, str or None
        The limit; see `memory_limit`.

    Raises
    ------
    MemoryLimitExceeded
        The windows and one reader do not fit; the message has the numbers.
    UsageError
        There are more streams than chunks to share.
    """
    units, streams = unit_spans(dataset, order.streams), order.streams
    if streams > len(units):
        raise UsageError(f"streams is {streams:,}, and the rows are in {len(units):,} chunk(s); choose at most so many streams")
    places, height = order.window_units(dataset), most_rows(units)
    window, unit = (Window.nbytes(dataset, count, height, order.run) for count in (places, 1))
    together = 1 if streams > 1 else min(order.windows(0), -(-len(units) // places))
    reading = dataset.reader_bytes(min(dataset.tile_rows, height))
    stretch = 2 * order.stretch_rows(dataset) * (dataset.n_columns + 1) * 8  # and what becomes of it
    shuffled = 4 * 8 * (places * height // order.run) * order.shuffle  # integers for the order of its runs
    try:
        if streams > 1:
            if dataset.lazy:
                reading *= 2  # one block is computed while another is used
            return make_plan(
                dataset,
                range(streams),
                task=task,
                merges=1,
                task_bytes=reading + window + shuffled + stretch + state_bytes + 8 * len(units),  # and their order
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
            task_bytes=reading + (0 if order.shuffle else unit),
            result_bytes=max(together * window + shuffled + stretch, min(SAMPLED, len(units)) * unit + sample_bytes) + state_bytes,
            passes=passes,
            memory=memory,
            here=True,
        )
        return replace(plan, n_tasks=plan.tasks_at_once)  # threads that read, each its share of the units
    except MemoryLimitExceeded as error:
        if places == 1:
            raise
        raise MemoryLimitExceeded(
            f"{error}; {format_bytes(together * window)} of it are {together} x {places * height:,} rows that are shuffled "
            "together: a smaller buffer_rows mixes less"
        ) from None


def sampling_bytes(dataset: Dataset) -> int:
    """Return what reading a sample takes in one thread: a unit is used while another is read."""
    height = most_rows(unit_spans(dataset))
    return dataset.reader_bytes(min(dataset.tile_rows, height)) + 2 * Window.nbytes(dataset, 1, height, 1)


class RowStream:
    """Epochs of a dataset's rows.

    Parameters
    ----------
    dataset : Dataset
        The rows.
    order : Order
        In which order they come.
    prepare : callable
        Makes of a block of rows, which are nobody else's and perhaps to be confirmed, what is handed out.
    readers : int
        Threads that read ahead; the order does not depend on them.
    task : str
        What the pass is called in events.
    progress : callable, optional
        Called with an `Event` at every unit, or tile.
    keep : bool
        Keep the memory of windows from epoch to epoch: nothing else may need it in between.

    Raises
    ------
    DataError
        A chunk is missing, or the store is not what it was when it was opened.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        prepare: Prepare,
        *,
        readers: int,
        task: str,
        progress: Callback | None,
        keep: bool = False,
    ) -> None:
        self.dataset, self.order, self.prepare = dataset, order, prepare
        self.readers, self.task, self.progress = readers, task, progress
        self.tally = Tally()  # of the last reading that came to its end
        self._keep = keep
        self._kept: list[Window] = []  # the kernel clears every page that it gives
        self._before = begin(dataset)

    def epoch(self, number: int, start: Position = START) -> Iterator[Stretch]:
        """Yield the stretches of an epoch from `start` on, and check at its end that every row was seen and none has changed."""
        order = self.order
        units = order.units(self.dataset, number)
        with closing(self._windows(units, start.window)) as windows:  # by itself it would live as long as an error's traceback
            yield from order.stretches(self.dataset, windows, self.prepare, (number,), start)

    def sample(self, rows: int, max_units: int) -> Array:
        """Return so many rows [x y w] of units from all over the dataset, chosen by the seed; all where there are no more.

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
        kept, keys, filled = Buffer().array((most, self.dataset.n_columns)), np.empty(most), 0
        with closing(self._windows(chosen, 0, whole=False)) as windows:
            for piece, _ in stretches(windows, side_by_side, self.order.stretch_rows(self.dataset), START, None):
                drawn = rng.random(len(piece))  # nobody knows how many come: those of the least keys stay
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

    def _windows(self, units: Sequence[Span], first: int, *, whole: bool = True) -> Generator[Window, None, None]:
        """Read units in order into windows, from one of these on, by threads that each take every so-manieth unit."""
        dataset, places = self.dataset, self.order.window_units(self.dataset)
        start = min(first * places, len(units))
        readers = min(self.readers, len(units) - start)
        last = -(-len(units) // places)
        height = most_rows(unit_spans(dataset))
        memory, self._kept = self._kept, []  # given back when no reader is left that may write to it
        for _ in range(len(memory), min(self.order.windows(readers), last - first)):
            memory.append(Window(dataset, places, height, self.order.run))
        rows = dataset.stored_rows if whole else sum(span.stop - span.start for span in units)
        skipped = sum(units[i].stop - units[i].start for i in range(start))
        with running_pass(self.task, rows, dataset.row_bytes, self.progress) as key, one_blas_thread():
            if skipped:
                with share_of_pass(key) as share:
                    share.note(Tally(rows=skipped))
            ahead = _Ahead(memory, places, first)
            threads = []
            for i in range(readers):
                own = range(start + i, len(units), readers)
                run, work = copy_context().run, (self._read, ahead, units, own, key)  # the context knows the active client
                threads.append(Thread(target=run, args=work, name=f"streamlr_reader-{i}", daemon=True))
            try:
                for thread in threads:
                    thread.start()
                for number in range(first, last):
                    yield ahead.filled(number, min(places, len(units) - number * places))
                    ahead.release()
            finally:
                ahead.end()
            for thread in threads:
                thread.join()
            ahead.check()
            for window in memory:
                window.fill(0, ())  # of blocks, which know their readers, and so keep their memory
            self._kept = memory if self._keep else []
            self.tally = sum(ahead.tallies, Tally(rows=skipped))
            if whole:
                end(dataset, self._before, self.tally)

    def _read(self, ahead: _Ahead, units: Sequence[Span], numbers: range, key: str) -> None:
        """Thread: read some of the units, each to its place; an error is handed over too."""
        left = iter(numbers)
        try:
            with (
                share_of_pass(key) as share,
                closing(read_units(self.dataset, Picked(units, numbers), share.note, ahead.rooms(numbers))) as found,
            ):
                for block in found:
                    ahead.put(next(left), block)
                ahead.tallies.append(share.tally)
        except BaseException as error:
            ahead.put(next(left, LATE), error)


def side_by_side(rows: Block) -> Array:
    """Return rows [x y], or [x y w] where they have weights, which are confirmed."""
    if not (surely_finite(rows.x) and surely_finite(rows.y)):
        rows.confirm()
    return np.column_stack((rows.x, rows.y) if rows.weights is None else (rows.x, rows.y, rows.weights))


class _Ahead:
    """What readers and their taker share: windows, each filled while another is used, and what became of units."""

    def __init__(self, memory: Sequence[Window], places: int, first: int) -> None:
        self.tallies: list[Tally] = []
        self._memory, self._places = memory, places
        self._changed = Condition()
        self._free = first + len(memory)  # windows before this one may be filled; none where it is negative
        self._units: dict[int, Block | BaseException] = {}

    def rooms(self, numbers: Iterable[int]) -> Iterator[Block]:
        """Yield memory for units as soon as it is free, until the taker has gone."""
        for number in numbers:
            window, place = divmod(number, self._places)
            if not self._may_fill(window):
                return
            yield self._memory[window % len(self._memory)].room(place)

    def put(self, unit: int, found: Block | BaseException) -> None:
        """Say what became of a unit."""
        with self._changed:
            self._units[unit] = found
            self._changed.notify_all()

    def filled(self, number: int, count: int) -> Window:
        """Wait for the units of a window, and return it, or raise what went wrong with the first that did."""
        window, first = self._memory[number % len(self._memory)], number * self._places
        window.fill(number, [self._found(unit) for unit in range(first, first + count)])
        return window

    def release(self) -> None:
        """Say that the first of the filled windows is not used any more."""
        with self._changed:
            self._free += 1
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what went wrong after the last unit, if anything did."""
        if LATE in self._units:
            self._found(LATE)

    def end(self) -> None:
        """Say that nobody wants any more rows."""
        with self._changed:
            self._free = -1
            self._changed.notify_all()

    def _may_fill(self, window: int) -> bool:
        """Wait until a window is free, and return whether it still has to be filled."""
        with self._changed:
            self._changed.wait_for(lambda: self._free < 0 or window < self._free)
            return self._free >= 0

    def _found(self, unit: int) -> Block:
        with self._changed:
            self._changed.wait_for(lambda: unit in self._units)
            found = self._units.pop(unit)
        if isinstance(found, BaseException):
            raise found
        return found
