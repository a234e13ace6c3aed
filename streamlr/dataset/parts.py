"""Parts of large chunks, which are read and decoded where they are wanted: no memory is taken for the others."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import TILE_BYTES
from streamlr.dataset.blosc_blocks import BloscBlocks
from streamlr.dataset.codecs import ChunkCodec, ZarrCodec
from streamlr.dataset.stored_chunks import Position, StoredChunks
from streamlr.dataset.zstd_stream import ZstdStream

LARGE_BYTES = 2 * TILE_BYTES  # of a chunk that is compressed: at least two tiles
PART_BYTES = 2**20  # of bare numbers: fewer, and opening their file for them costs more than to hold its chunk


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
    stored : StoredChunks
        The files.
    nbytes : int
        Bytes of a chunk.
    """

    position = None  # each part opens its file

    def __init__(self, stored: StoredChunks, nbytes: int) -> None:
        self._stored, self._nbytes = stored, nbytes

    def suits(self, nbytes: int) -> bool:
        """Whether there are enough of them to open a file for, and others left."""
        return nbytes >= PART_BYTES and 2 * nbytes <= self._nbytes

    def fill(self, position: Position, start: int, into: NDArray[np.uint8], *, last: bool) -> bool:
        """Fill `into` with the bytes of a chunk from `start` on, if its file is there and has the size of its numbers."""
        return self._stored.fill(position, start, into)

    def leave(self) -> None:
        """Do nothing: no file is open."""


def parts_of(codec: ChunkCodec | ZarrCodec, stored: StoredChunks) -> Parts | None:
    """Return what reads parts of chunks of this codec, None where they are read as a whole."""
    if not isinstance(codec, ChunkCodec) or codec.order != "C" or codec.has_checksum or not stored.are_files:
        return None
    if codec.compressor is None:
        return BareParts(stored, codec.nbytes) if codec.nbytes >= 2 * PART_BYTES else None
    if codec.nbytes < LARGE_BYTES:
        return None
    if codec.compressor.codec_id == "zstd":
        return ZstdStream(stored.open, stored.describe, codec.nbytes)
    return BloscBlocks(stored.open, codec.nbytes) if codec.compressor.codec_id == "blosc" else None
