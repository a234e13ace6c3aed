"""Files of chunks, of which the kernel reads the next one while the present one is decoded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest

from streamlr.dataset.buffers import Buffer

ADVISED = hasattr(os, "posix_fadvise")  # not on macOS and Windows
READING = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # Windows would change ends of lines


class Files:
    """Reads files below a folder, with a call of the system for each step and none besides.

    Each call lets go of the interpreter's lock, which the other readers of small chunks hold when it comes back.

    Parameters
    ----------
    folder : str
        With a separator at its end.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._coming: Iterator[str] = iter(())
        self._next: tuple[str, int] | None = None

    def expect(self, keys: Iterable[str]) -> None:
        """Hear which files are read next, in this order; whatever was expected before is forgotten."""
        opened, self._next = self._next, None
        if opened is not None:
            os.close(opened[1])
        self._coming = iter(keys if ADVISED else ())
        self._open_next()

    def read(self, key: str, request: ByteRequest | None, buffer: Buffer) -> memoryview:
        """Read a file, or a part of it, into the memory of `buffer`."""
        if self._next is None or self._next[0] != key:
            return _read(os.open(self._folder + key, READING), request, buffer)
        file, self._next = self._next[1], None
        try:
            return _read(file, request, buffer)
        finally:
            self._open_next()

    def _open_next(self) -> None:
        """Open the next file and have the kernel fetch it: small files are no faster read than the disk answers for each."""
        for key in self._coming:
            try:
                file = os.open(self._folder + key, READING)  # `read` or `expect` closes it
            except OSError:
                continue  # raised when the file is wanted
            self._next = key, file
            with suppress(OSError):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            return


def _read(file: int, request: ByteRequest | None, buffer: Buffer) -> memoryview:
    """Read an open file, or a part of it, and close it."""
    try:
        start, stop = 0, os.fstat(file).st_size
        if isinstance(request, SuffixByteRequest):
            start = max(stop - request.suffix, 0)
        elif isinstance(request, RangeByteRequest):
            start, stop = min(request.start, stop), min(request.end, stop)
        view, done = buffer.take(stop - start).data, 0
        while done < len(view) and (count := _fill(view[done:], file, start + done)):
            done += count
        return view[:done]
    finally:
        os.close(file)


def _fill(view: memoryview, file: int, offset: int) -> int:
    """Read from an offset on, as much as comes at once, and return the number of bytes."""
    if hasattr(os, "preadv"):  # not on Windows
        return os.preadv(file, [view], offset)
    os.lseek(file, offset, os.SEEK_SET)
    found = os.read(file, len(view))
    view[: len(found)] = found
    return len(found)
