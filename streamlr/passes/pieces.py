"""A unit of reading as pieces of prepared rows, in memory that is used again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import Block, Span
from streamlr.dataset.dataset import Dataset
from streamlr.dataset.tally import Tally
from streamlr.errors import Cancelled
from streamlr.passes.tasks import with_computed

PIECE_BYTES = 2**21  # what a reader hands over at once: less, and the interpreter's lock is passed on too often

Array = NDArray[np.float64]
Prepare = Callable[[Array, Array, Array | None, Array], None]


def new_piece(width: int) -> Array:
    """Return memory for a piece of rows of so many numbers: a power of two of them, so that whole tiles are whole pieces."""
    rows = max(PIECE_BYTES // (8 * width), 1)
    return np.empty((1 << (rows.bit_length() - 1), width))


def prepared(
    dataset: Dataset, units: Sequence[Span], prepare: Prepare, report: Callable[[Tally], None], rooms: Iterator[Array]
) -> Generator[Iterator[tuple[Array, int]], None, None]:
    """Read units, and yield for each, whenever it has one, the memory of a piece and how many rows of it are filled.

    Parameters
    ----------
    dataset : Dataset
        The rows.
    units : sequence of Span
        Which of them. A unit is read to its end before the next one is asked for; but the store hears of it before.
    prepare : callable
        Writes rows x (m, p) and y (m, k), with their weights (m,) or None, into `out` (m, width).
    report : callable
        Called with what was met at each tile.
    rooms : iterator of (height, width) float64
        Memory for pieces; its end is that of the reading.

    Raises
    ------
    Cancelled
        There was no more memory: nobody wants the rows.
    """
    if dataset.lazy:
        for unit in units:
            yield _pieces(with_computed(dataset, unit).blocks(unit, report), prepare, rooms)
        return
    reader = dataset.reader()  # which keeps its memory from unit to unit
    with reader.expecting(units):
        for unit in units:
            yield _pieces(reader.blocks(unit, report), prepare, rooms)


def _pieces(blocks: Iterator[Block], prepare: Prepare, rooms: Iterator[Array]) -> Iterator[tuple[Array, int]]:
    for block in blocks:
        first = 0
        while first < len(block.x):
            room = next(rooms, None)
            if room is None:
                raise Cancelled("nobody takes the rows any more")
            x, y = (part[first : first + len(room)] for part in (block.x, block.y))
            weights = None if block.weights is None else block.weights[first : first + len(room)]
            prepare(x, y, weights, room[: len(x)])
            yield room, len(x)
            first += len(x)
