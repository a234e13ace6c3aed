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
NONE = Block(0, 0, np.empty((0, 0)), np.empty((0, 0)))


class Window:
    """The rows of some units, each unit at a place of its own; for one user after the other.

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
        self.number = 0
        self.run = run
        self.blocks = [NONE] * places
        self._height = -(-height // run) * run  # so that runs begin where places do
        widths = (dataset.n_features, dataset.n_targets, *([] if dataset.weights is None else [1]))
        rows = places * self._height  # in buffers, whose memory goes back as a whole
        self._arrays = [Buffer().take(8 * rows * width).view(np.float64).reshape(rows, width) for width in widths]

    @staticmethod
    def nbytes(dataset: Dataset, places: int, height: int, run: int) -> int:
        """Return what a window takes."""
        return 8 * places * (height + run - 1) * sum(rows.n_columns for rows in dataset.arrays)

    @property
    def n_rows(self) -> int:
        """Rows that are kept."""
        return sum(len(block.x) for block in self.blocks)

    def room(self, place: int) -> Block:
        """Return the memory of a place."""
        here = slice(place * self._height, (place + 1) * self._height)
        x, y, *weights = (array[here] for array in self._arrays)
        return Block(0, self._height, x, y, weights[0][:, 0] if weights else None)

    def scratch(self, height: int) -> Block:
        """Return memory for so many rows like these."""
        x, y, *weights = (np.empty((height, array.shape[1])) for array in self._arrays)
        return Block(0, height, x, y, weights[0][:, 0] if weights else None)

    def confirm(self) -> None:
        """Raise if a number of the window is NaN or infinite."""
        for place, block in enumerate(self.blocks):
            block.confirm()
            self.blocks[place] = replace(block, doubt=None)

    def order(self, seed: Sequence[int]) -> tuple[Numbers, Numbers]:
        """Return the numbers of whole runs in a random order; and of the rows that are left at the ends of units."""
        starts = [place * self._height for place in range(len(self.blocks))]
        heights = [len(block.x) for block in self.blocks]
        runs = [start // self.run + np.arange(height // self.run) for start, height in zip(starts, heights, strict=True)]
        rest = [start + np.arange(height - height % self.run, height) for start, height in zip(starts, heights, strict=True)]
        return np.random.default_rng((*seed, self.number)).permutation(np.concatenate(runs)), np.concatenate(rest)

    def stored(self, at: int, count: int) -> Iterator[Block]:
        """Yield `count` rows from the `at`-th on, as they lie."""
        for block in self.blocks:
            first, last = min(at, len(block.x)), min(at + count, len(block.x))
            if first < last:
                yield block.part(first, last)
            at, count = max(at - len(block.x), 0), count - (last - first)

    def taken(self, order: tuple[Numbers, Numbers], at: int, out: Block) -> Block:
        """Fill `out` with the rows that come from the `at`-th on in an order, and return it."""
        weights = [] if out.weights is None else [out.weights[:, None]]
        for array, rows in zip(self._arrays, (out.x, out.y, *weights), strict=True):
            self._take(array, order, at, rows)
        return out

    def _take(self, array: Array, order: tuple[Numbers, Numbers], at: int, out: Array) -> None:
        (runs, rest), run, done = order, self.run, 0
        end = len(runs) * run
        while done < len(out):
            number, within = divmod(at + done, run)
            left = min(len(out), end - at) - done  # of these rows in whole runs
            if left <= 0:
                first = at + done - end
                out[done:] = array[rest[first : first + len(out) - done]]
                return
            if within == 0 and (whole := left // run):
                count = whole * run
                flat = array.reshape(-1, run * array.shape[1])
                # "raise" would copy once more
                np.take(flat, runs[number : number + whole], axis=0, out=out[done : done + count].reshape(whole, -1), mode="clip")
            else:
                count = min(run - within, left)
                row = int(runs[number]) * run + within
                out[done : done + count] = array[row : row + count]
            done += count


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
