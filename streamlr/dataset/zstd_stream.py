"""Large chunks of zstd, decoded while their files are read: some MiB of stored bytes at a time, into a tile or a whole chunk."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable

import numpy as np
import zstandard
from numpy.typing import NDArray

from streamlr.dataset.codecs import check_memory
from streamlr.dataset.stored_chunks import PAUSES, Position
from streamlr.errors import ChunkCorrupt

READ_BYTES = 2**22  # of a file at once: fewer, and threads wait for each other at every call
SKIPPED_BYTES = 2**20  # decoded at once where nobody wants them
HEADER_BYTES = 18  # of a frame, at most
WINDOW_BYTES = 2**23  # of a frame, at most: its decoder keeps as many
# One to be skipped, put behind a file whose numbers are complete: what is cut off its checksum is taken from here, and differs.
EMPTY_FRAME = bytes.fromhex("502a4d1800000000")


class ZstdStream:
    """Decodes chunks that are each a file of one frame, in order, into memory of who wants them.

    What is unusual or wrong before a number was given is left to who reads whole chunks: a file that is not there, or other frames.
    Afterwards it is an error, since what was given may be wrong, too.

    Parameters
    ----------
    open_file : callable
        Opens the file of the chunk at a position and returns its descriptor.
    describe : callable
        Names the chunk at a position.
    nbytes : int
        Decoded bytes of a chunk.
    """

    def __init__(self, open_file: Callable[[Position], int], describe: Callable[[Position], str], nbytes: int) -> None:
        self._file: _File | None = None
        self._open_file, self._describe, self._nbytes = open_file, describe, nbytes
        self._reader: zstandard.ZstdDecompressionReader | None = None
        self._at = 0
        self._given = self._checked = False
        self.position: Position | None = None  # of the chunk that is being decoded

    def suits(self, _nbytes: int) -> bool:
        """Any part is worth reading: its file stays open, and is decoded from there on."""
        return True

    def fill(self, position: Position, start: int, into: NDArray[np.uint8], *, last: bool) -> bool:
        """Fill `into` with the decoded bytes of a chunk from `start` on, and return whether it can be decoded here.

        With the last byte of a chunk it is known that there is nothing behind it, and that it is what its checksum says. Where
        these are the `last` bytes that anybody wants, those behind them are decoded too.

        Raises
        ------
        ChunkCorrupt
            A chunk of which bytes were given is damaged, or cannot be read.
        MemoryLimitExceeded
            There was no memory to decompress it.
        """
        if position != self.position or start < self._at:
            self.leave()
        try:
            if self._reader is None:
                self._begin(position)
            self._skip(start)
            self._read(into)
            self._given = True
            if last:
                self._skip(self._nbytes)
            if self._at == self._nbytes:
                self._end()
        except (OSError, ValueError, MemoryError, zstandard.ZstdError) as error:
            self._fail(error)
            return False
        return True

    def leave(self) -> None:
        """Let go of a chunk: if something of it was given that has a checksum, not before that was met; the same is raised."""
        try:
            if self._reader is not None and self._given and self._checked:
                self._skip(self._nbytes)
                self._end()
        except (OSError, ValueError, MemoryError, zstandard.ZstdError) as error:
            self._fail(error)
        self._close()

    def __del__(self) -> None:
        self._close()

    def _fail(self, error: Exception) -> None:
        given = None if self.position is None or not self._given else self._describe(self.position)
        self._close()
        if given is not None:
            check_memory(error, given, self._nbytes)
            raise ChunkCorrupt(f"{given} cannot be decoded: {error}; restore it from its source") from error

    def _close(self) -> None:
        file, self._file, self._reader, self.position, self._given = self._file, None, None, None, False
        if file is not None:
            file.close()

    def _begin(self, position: Position) -> None:
        self._file = _File(self._open_file(position))
        frame = zstandard.get_frame_parameters(self._file.read(HEADER_BYTES))
        self._file.seek(0)
        if frame.content_size != self._nbytes or frame.window_size > WINDOW_BYTES:
            raise ValueError("it is not one frame of its size")
        # a decompressor of its own, which gives the frame's window back with it
        self._reader = zstandard.ZstdDecompressor().stream_reader(self._file, read_size=READ_BYTES, closefd=False)
        self._at, self.position, self._checked = 0, position, frame.has_checksum

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
        self._close()


class _File(io.FileIO):
    """A file that is read again where that fails for a moment, and what is put behind it."""

    behind = b""

    def __init__(self, file: int) -> None:
        try:
            super().__init__(file)
        except OSError:
            os.close(file)
            raise

    def read(self, size: int | None = READ_BYTES) -> bytes:
        """Return the next bytes, none at the end."""
        pauses = iter(PAUSES)
        while True:
            try:
                found = os.read(self.fileno(), READ_BYTES if size is None else size)
                break
            except OSError:
                if (pause := next(pauses, None)) is None:
                    raise
                time.sleep(pause)
        if not found:
            found, self.behind = self.behind, b""
        return found
