"""Windows: memory for the rows of some units of reading, where they are decoded, and from where they are handed out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import Block, Span
from streamlr.dataset.buffers import Buffer
from streamlr.dataset.dataset import Dataset
from streamlr.dataset.tally import Tally
from streamlr.errors import Cancelled
from streamlr.passes.tasks import with_computed

Array = NDArray[np.float64]
Numbers = NDArray[np.int64]


class Window:
    """The rows of some units, each unit at a place of its own; handed out as they lie, or shuffled.

    Parameters
    ----------
    dataset : Dataset
        Whose rows they are.
    places : int
        Units that fit.
    height : int
        Rows of the largest unit.
    run : int
        Rows that stay neighbours when they are shuffled.
    """

    def __init__(self, dataset: Dataset, places: int, height: int, run: int = 1) -> None:
        self.number, self._run = 0, run
        self._height = -(-height // run) * run  # so that runs begin where places do
        widths = (dataset.n_features, dataset.n_targets, *([] if dataset.weights is None else [1]))
        rows = places * self._height  # in buffers, whose memory goes back as a whole
        self._arrays = [Buffer().array((rows, width)) for width in widths]
        self._blocks: list[Block] = []
        self._order: tuple[Numbers, Numbers] | None = None

    @staticmethod
    def nbytes(dataset: Dataset, places: int, height: int, run: int) -> int:
        """Return what a window takes."""
        return 8 * places * (height + run - 1) * dataset.n_columns

    def room(self, place: int) -> Block:
        """Return the memory of a place."""
        return self._rows([array[place * self._height : (place + 1) * self._height] for array in self._arrays])

    def fill(self, number: int, blocks: Sequence[Block]) -> None:
        """Note which window of an epoch this is now, and which rows are at its places, parts of their rooms."""
        self.number, self._blocks, self._order = number, list(blocks), None

    def shuffle(self, seed: Sequence[int]) -> None:
        """Choose a random order of whole runs; rows that are left at the ends of units come after them."""
        starts = [place * self._height for place in range(len(self._blocks))]
        heights = [len(block.x) for block in self._blocks]
        runs = [start // self._run + np.arange(height // self._run) for start, height in zip(starts, heights, strict=True)]
        rest = [start + np.arange(height - height % self._run, height) for start, height in zip(starts, heights, strict=True)]
        self._order = np.random.default_rng((*seed, self.number + 1)).permutation(np.concatenate(runs)), np.concatenate(rest)

    def __len__(self) -> int:
        return sum(len(block.x) for block in self._blocks)

    def room_for(self, height: int) -> Block:
        """Return memory for so many rows, apart from the window's."""
        return self._rows([np.empty((height, array.shape[1])) for array in self._arrays])

    def copy_into(self, at: int, out: Block) -> None:
        """Copy rows, in their order, from the `at`-th on, into all of `out`."""
        if self._order is not None:
            self._draw(*self._order, at, out)
            return
        filled = 0
        for block in self._blocks:
            first, last = min(at, len(block.x)), min(at + len(out.x) - filled, len(block.x))
            rows, to = block.part(first, last), out.part(filled, filled + last - first)
            to.x[:], to.y[:] = rows.x, rows.y
            if rows.weights is not None and to.weights is not None:
                to.weights[:] = rows.weights
            at, filled = max(at - len(block.x), 0), filled + last - first

    def confirm(self) -> None:
        """Raise if a number of the window is NaN or infinite."""
        for block in self._blocks:
            block.confirm()
        self._blocks = [replace(block, doubt=None) for block in self._blocks]

    def _rows(self, arrays: Sequence[Array]) -> Block:
        x, y, *weights = arrays
        return Block(0, len(x), x, y, weights[0][:, 0] if weights else None)

    def _draw(self, runs: Numbers, rest: Numbers, at: int, out: Block) -> None:
        for array, rows in zip(self._arrays, (out.x, out.y, out.weights), strict=False):
            if rows is not None:
                _take(array, runs, rest, self._run, at, rows.reshape(len(rows), -1))


def _take(array: Array, runs: Numbers, rest: Numbers, run: int, at: int, out: Array) -> None:
    """Copy rows out of `array`, from the `at`-th on of an order: first those of whole runs, then the rest."""
    end, done = len(runs) * run, 0
    while done < len(out) and at < end:
        number, within = divmod(at, run)
        left = min(len(out) - done, end - at)
        if within == 0 and (whole := left // run):
            count, flat = whole * run, array.reshape(-1, run * array.shape[1])
            to = out[done : done + count].reshape(whole, -1)
            np.take(flat, runs[number : number + whole], axis=0, out=to, mode="clip")  # "raise" would copy once more
        else:
            count, row = min(run - within, left), int(runs[number]) * run + within
            out[done : done + count] = array[row : row + count]
        at, done = at + count, done + count
    if done < len(out):
        out[done:] = array[rest[at - end : at - end + len(out) - done]]


def read_units(
    dataset: Dataset, units: Sequence[Span], report: Callable[[Tally], None], rooms: Iterator[Block]
) -> Generator[Block, None, None]:
    """Read units, each into a room of its own, and yield their kept rows, which nobody may have confirmed.

    Parameters
    ----------
    dataset : Dataset
        The rows.
    units : sequence of Span
        Which of them, in this order: the store hears of them before.
    report : callable
        Called with what was met.
    rooms : iterator of Block
        Memory; its end is that of the reading.

    Raises
    ------
    Cancelled
        There was no more memory: nobody wants the rows.
    """

    def room() -> Block:
        found = next(rooms, None)
        if found is None:
            raise Cancelled("nobody takes the rows any more")
        return found

    if dataset.lazy:
        for unit in units:
            memory = room()
            yield with_computed(dataset, unit).reader().fill(unit, report, memory)
        return
    reader = dataset.reader()  # which keeps its memory from unit to unit
    with reader.expecting(units):
        for unit in units:
            yield reader.fill(unit, report, room())
