"""Large chunks of Blosc, of which such blocks are read and decoded as are wanted: into a tile, which stays in a core's cache."""

from __future__ import annotations

from collections.abc import Callable

import numcodecs.blosc
import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.buffers import Buffer
from streamlr.dataset.chunk_file import ChunkFile
from streamlr.dataset.stored_chunks import Position

HEADER_BYTES = 16
FLAGS, ITEMSIZE = 2, 3  # where they stand in the header
COPIED = 0x02  # a flag: there are no blocks, but the numbers as they are
UNSPLIT = 0x10  # a flag: a block is compressed in one piece, and not byte by byte of its numbers
LEAST_BYTES = 2**10  # of a block: the table of smaller ones would be long
BLOCK_BYTES = 2**21  # of a block, at most: the one in which a part ends is kept for the next part
PIECE_BYTES = 2**23  # decoded at once


class BloscBlocks:
    """Decodes parts of chunks that are each a file of Blosc's first format, which is blocks that are compressed one by one.

    Some blocks behind a header of their own are a whole that Blosc decodes. What is unusual or wrong is left to who reads whole
    chunks: there is no checksum by which something could show later of what was given.

    Parameters
    ----------
    open_file : callable
        Opens the file of the chunk at a position and returns its descriptor.
    nbytes : int
        Decoded bytes of a chunk.

    References
    ----------
    Alted and others, Blosc chunk format, in the documentation of C-Blosc 1.21.
    """

    def __init__(self, open_file: Callable[[Position], int], nbytes: int) -> None:
        self._file, self._nbytes = ChunkFile(open_file), nbytes
        self._header = np.empty(HEADER_BYTES, dtype=np.uint8)
        self._block = 0  # bytes of a block; the last may be short
        self._starts = self._ends = np.empty(0, dtype=np.int64)  # of the blocks, in the file
        self._stored, self._edge = Buffer(), Buffer()
        self._held = -1  # the block that lies in the latter

    @property
    def position(self) -> Position | None:
        """Of the chunk whose file is open, if one is."""
        return self._file.position

    def suits(self, _nbytes: int) -> bool:
        """Any part is worth reading: its file stays open, and the block at its end is held."""
        return True

    def fill(self, position: Position, start: int, into: NDArray[np.uint8], *, last: bool) -> bool:
        """Fill `into` with the decoded bytes of a chunk from `start` on, and return whether it can be decoded here.

        Where these are the `last` bytes that anybody wants, those behind them are decoded too, to see that they can be.
        """
        try:
            if position != self.position:
                self._begin(position)
            self._decode(start, into)
            if last:
                for number in range(-(-(start + len(into)) // self._block), len(self._starts)):
                    self._at_edge(number)
        except (OSError, ValueError, RuntimeError, MemoryError):
            self.leave()
            self._stored, self._edge = Buffer(), Buffer()  # there is to be room for a whole chunk
            return False
        return True

    def leave(self) -> None:
        """Let go of the chunk whose file is open, and of the block that is held."""
        self._file.leave()
        self._held = -1

    def _begin(self, position: Position) -> None:
        """Open a file, and find out where its blocks lie."""
        self._held = -1
        size = self._file.begin(position)
        self._file.read(self._header, 0)
        nbytes, self._block, stored = (int(number) for number in self._header[4:].view("<u4"))
        itemsize = max(int(self._header[ITEMSIZE]), 1)
        sound = nbytes == self._nbytes and stored == size
        # a size that is off by less than an item would show in the last block alone
        if not sound or not LEAST_BYTES <= self._block <= BLOCK_BYTES or self._block % itemsize or self._header[FLAGS] & COPIED:
            raise ValueError("it is not blocks of its size")
        table = np.empty(-(-nbytes // self._block), dtype="<i4")
        self._file.read(table.view(np.uint8), HEADER_BYTES)
        if table.min() < HEADER_BYTES + table.nbytes or table.max() >= stored:
            raise ValueError("its blocks lie outside")
        order = np.argsort(table)  # several threads may have written them
        self._starts, self._ends = table.astype(np.int64), np.empty(len(table), dtype=np.int64)
        self._ends[order] = np.append(self._starts[order[1:]], stored)

    def _decode(self, start: int, into: NDArray[np.uint8]) -> None:
        at, stop = start, start + len(into)
        whole = len(self._starts) if stop == self._nbytes else stop // self._block  # blocks that end by then
        while at < stop:
            number, within = divmod(at, self._block)
            if within == 0 and number < whole:
                end = min(number + max(PIECE_BYTES // self._block, 1), whole)
                here = into[at - start : min(end * self._block, self._nbytes) - start]
                self._decode_blocks(number, end, here)
            else:
                piece = self._at_edge(number)[within:]
                here = into[at - start :][: len(piece)]
                here[:] = piece[: len(here)]
            at += len(here)

    def _at_edge(self, number: int) -> NDArray[np.uint8]:
        """Return a block of which some bytes are wanted now, and perhaps the others next."""
        edge = self._edge.take(min(self._block, self._nbytes - number * self._block))
        if number != self._held:
            self._held = -1
            self._decode_blocks(number, number + 1, edge)
            self._held = number
        return edge

    def _decode_blocks(self, first: int, end: int, into: NDArray[np.uint8]) -> None:
        starts, below, above = self._starts[first:end], self._starts[first:end].min(), self._ends[first:end].max()
        front, nbytes = HEADER_BYTES + 4 * len(starts), int(above - below)
        if nbytes > 2 * len(into) + BLOCK_BYTES:
            raise ValueError("its blocks lie too far apart")
        stored = self._stored.take(front + nbytes)
        stored[:HEADER_BYTES] = self._header
        if len(into) < self._block:  # the last one, which is short, and never split
            stored[FLAGS] |= UNSPLIT
        stored[4:HEADER_BYTES].view("<u4")[:] = len(into), min(self._block, len(into)), len(stored)
        stored[HEADER_BYTES:front].view("<i4")[:] = starts - below + front
        self._file.read(stored[front:], int(below))
        numcodecs.blosc.decompress(stored, into)
