"""Large chunks of zstd, decoded a tile at a time while their files are read: neither their bytes nor their numbers go to memory."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import zstandard
from numpy.typing import NDArray

READ_BYTES = 2**18  # of a file at once: they are decoded while a core's cache holds them
SKIPPED_BYTES = 2**20  # decoded at once where nobody wants them
HEADER_BYTES = 18  # of a frame, at most
WINDOW_BYTES = 2**23  # of a frame, at most: its decoder keeps as many
# One to be skipped, put behind a file whose numbers are complete: what is cut off its checksum is taken from here, and differs.
EMPTY_FRAME = bytes.fromhex("502a4d1800000000")


class ZstdStream:
    """Decodes chunks that are each a file of one frame, in order, into memory of who wants them.

    Whatever is unusual or wrong is not told here, but left to who reads whole chunks: a file that is not there, other frames, and
    such as end before their file does, or behind it.

    Parameters
    ----------
    open_file : callable
        Opens the file of a row of chunks and returns its descriptor.
    nbytes : int
        Decoded bytes of a chunk.
    """

    def __init__(self, open_file: Callable[[int], int], nbytes: int) -> None:
        self._file: _File | None = None
        self._open_file, self._nbytes = open_file, nbytes
        self._decompressor = zstandard.ZstdDecompressor()
        self._reader: zstandard.ZstdDecompressionReader | None = None
        self._at = 0
        self.row_chunk = -1  # the one that is being decoded

    def fill(self, row_chunk: int, start: int, into: NDArray[np.uint8], *, last: bool) -> bool:
        """Fill `into` with the decoded bytes of a chunk from `start` on, and return whether all is well so far.

        With the last byte of a chunk it is known that its frame ends where its file does, and is what its checksum says. Where
        these are the `last` bytes that anybody wants, those behind them are decoded too.
        """
        try:
            if row_chunk != self.row_chunk or start < self._at:
                self._begin(row_chunk)
            self._skip(start)
            self._read(into)
            if last:
                self._skip(self._nbytes)
            if self._at == self._nbytes:
                self._end()
        except (OSError, ValueError, MemoryError, zstandard.ZstdError):
            self.close()
            return False
        return True

    def close(self) -> None:
        """Let go of the file."""
        file, self._file, self._reader, self.row_chunk = self._file, None, None, -1
        if file is not None:
            file.close()

    def __del__(self) -> None:
        self.close()

    def _begin(self, row_chunk: int) -> None:
        self.close()
        self._file = _File(self._open_file(row_chunk))
        frame = zstandard.get_frame_parameters(self._file.read(HEADER_BYTES))
        self._file.seek(0)
        if frame.content_size != self._nbytes or frame.window_size > WINDOW_BYTES:
            raise ValueError("it is not one frame of its size")
        self._reader = self._decompressor.stream_reader(self._file, read_size=READ_BYTES, closefd=False)
        self._at, self.row_chunk = 0, row_chunk

    def _skip(self, stop: int) -> None:
        while self._at < stop:
            self._read(np.empty(min(stop - self._at, SKIPPED_BYTES), dtype=np.uint8))

    def _read(self, into: NDArray[np.uint8]) -> None:
        assert self._reader is not None
        if self._reader.readinto(into.data) != into.nbytes:
            raise ValueError("it is cut off")
        self._at += into.nbytes

    def _end(self) -> None:
        assert self._file is not None
        assert self._reader is not None
        self._file.behind = EMPTY_FRAME
        if self._reader.read(1) or self._file.behind:
            raise ValueError("it does not end where its file does")
        self.close()


class _File(io.FileIO):
    """A file, and what is put behind it."""

    behind = b""

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes, none at the end."""
        found = super().read(size) or b""
        if not found:
            found, self.behind = self.behind, b""
        return found
