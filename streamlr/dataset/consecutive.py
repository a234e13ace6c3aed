"""Rows that come a chunk at a time and are wanted in other pieces: where they lie, with as little moving as the memory allows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.buffers import Buffer


class Consecutive:
    """Rows that follow each other, in one piece of memory: the next ones come behind, and the first are left when room runs out.

    Parameters
    ----------
    width : int
        Numbers in a row.

    Attributes
    ----------
    stop : int
        The row that comes next; those held end before it.

    Examples
    --------
    >>> rows = Consecutive(1)
    >>> for row in (0, 2, 4):
    ...     rows.room(2, most=5, since=3)[:] = [[row], [row + 1]]
    ...     rows.add(2)
    >>> rows.stop, rows.rows(3, 6).ravel().tolist()
    (6, [3.0, 4.0, 5.0])
    """

    def __init__(self, width: int) -> None:
        self.stop = 0
        self._width, self._buffer = width, Buffer()
        self._rows = np.empty((0, width))
        self._end = 0  # where those held end

    def begin(self, row: int) -> None:
        """Hold nothing; this row comes next."""
        self.stop, self._end = row, 0

    def room(self, height: int, most: int, since: int) -> NDArray[np.float64]:
        """Return memory for the next `height` rows, behind those held.

        Where there is none, it is at the front of memory for `most` rows, behind such rows as are held `since` one.
        """
        if self._end + height > len(self._rows):
            kept = self.rows(min(since, self.stop), self.stop)
            if most > len(self._rows):
                kept = kept.copy()
                self.begin(self.stop)
                self._rows = np.empty((0, self._width))  # a part of the old ones would keep their memory
                self._rows = self._buffer.array((most, self._width))
            self._rows.ravel()[: kept.size] = kept.ravel()  # in one dimension NumPy moves what overlaps without a copy
            self._end = len(kept)
        return self._rows[self._end : self._end + height]

    def add(self, height: int) -> None:
        """Hold the rows that were put where there was room for them."""
        self.stop, self._end = self.stop + height, self._end + height

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Return rows that are held, valid until room is asked for."""
        before = self._end - self.stop
        return self._rows[before + start : before + stop]
