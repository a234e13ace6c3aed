"""The file of the chunk of which parts are read: it stays open from one part to the next."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.files_ahead import read_at
from streamlr.dataset.stored_chunks import Position


class ChunkFile:
    """Reads the file of one chunk after the other, some bytes at a time.

    A file is opened once: whoever opens and closes it lets go of the interpreter's lock each time, and waits to have it back.

    Parameters
    ----------
    open_file : callable
        Opens the file of the chunk at a position and returns its descriptor.
    """

    def __init__(self, open_file: Callable[[Position], int]) -> None:
        self._open_file = open_file
        self._descriptor: int | None = None
        self.position: Position | None = None  # of the chunk whose file is open

    def begin(self, position: Position) -> int:
        """Open the file of a chunk in the place of another, and return how many bytes it has.

        Raises
        ------
        OSError
            It cannot be opened, or does not tell its size.
        """
        self.leave()
        self._descriptor = self._open_file(position)
        nbytes = os.fstat(self._descriptor).st_size
        self.position = position
        return nbytes

    def read(self, into: NDArray[np.uint8], offset: int) -> None:
        """Fill `into` with the bytes of the file from an offset on.

        Raises
        ------
        OSError, ValueError
            It cannot be read, or ends before.
        """
        assert self._descriptor is not None, "its file was opened"
        if read_at(into.data, self._descriptor, offset) != len(into):
            raise ValueError("it is cut off")

    def leave(self) -> None:
        """Let go of the chunk whose file is open."""
        descriptor, self._descriptor, self.position = self._descriptor, None, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self.leave()
