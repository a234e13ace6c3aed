"""Parts of large chunks, which are read and decoded where they are wanted: no memory is taken for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import TILE_BYTES
from streamlr.dataset.blosc_blocks import BloscBlocks
from streamlr.dataset.chunk_file import ChunkFile
from streamlr.dataset.codecs import ChunkCodec, ZarrCodec
from streamlr.dataset.stored_chunks import Position, StoredChunks
from streamlr.dataset.zstd_stream import ZstdStream

LARGE_BYTES = 2 * TILE_BYTES  # of a chunk that is compressed: at least two tiles
PART_BYTES = 2**20  # of bare numbers: fewer, and a call of the system for each of them costs more than to hold their chunk


class Parts(Protocol):
    """Reads the decoded bytes of chunks that are files, some at a time."""

    @property
    def position(self) -> Position | None:
        """Of the chunk whose file is open, if one is."""
        ...

    def suits(self, nbytes: int) -> bool:
        """Whether so many bytes of a chunk are better read as a part than taken from the whole."""
        ...

    def fill(self, position: Position, start: int, into: NDArray[np.uint8], *, last: bool) -> bool:
        """Fill `into` with the bytes of a chunk from `start` on; return False, for whoever reads whole chunks, if it cannot be.

        Nobody wants what is behind the `last` bytes, so that it is time to look whether all is well there, too.
        """
        ...

    def leave(self) -> None:
        """Let go of the chunk whose file is open."""
        ...


class BareParts:
    """Reads parts of files that are numbers and nothing else.

    Parameters
    ----------
    open_file : callable
        Opens the file of the chunk at a position and returns its descriptor.
    nbytes : int
        Bytes of a chunk.
    """

    def __init__(self, open_file: Callable[[Position], int], nbytes: int) -> None:
        self._file, self._nbytes = ChunkFile(open_file), nbytes

    @property
    def position(self) -> Position | None:
        """Of the chunk whose file is open, if one is."""
        return self._file.position

    def suits(self, nbytes: int) -> bool:
        """Whether there are enough of them to open a file for, and others left; any will do of a file that is open."""
        return self.position is not None or (nbytes >= PART_BYTES and 2 * nbytes <= self._nbytes)

    def fill(self, position: Position, start: int, into: NDArray[np.uint8], *, last: bool) -> bool:
        """Fill `into` with the bytes of a chunk from `start` on, if its file is there and has the size of its numbers."""
        try:
            if position != self.position and self._file.begin(position) != self._nbytes:
                raise ValueError("it is not numbers and nothing else")
            self._file.read(into, start)
        except (OSError, ValueError):
            self.leave()
            return False
        return True

    def leave(self) -> None:
        """Let go of the chunk whose file is open."""
        self._file.leave()


def parts_of(codec: ChunkCodec | ZarrCodec, stored: StoredChunks) -> Parts | None:
    """Return what reads parts of chunks of this codec, None where they are read as a whole."""
    if not isinstance(codec, ChunkCodec) or codec.order != "C" or codec.has_checksum or not stored.are_files:
        return None
    if codec.compressor is None:
        return BareParts(stored.open, codec.nbytes) if codec.nbytes >= 2 * PART_BYTES else None
    if codec.nbytes < LARGE_BYTES:
        return None
    if codec.compressor.codec_id == "zstd":
        return ZstdStream(stored.open, stored.describe, codec.nbytes)
    return BloscBlocks(stored.open, codec.nbytes) if codec.compressor.codec_id == "blosc" else None
