"""Files of chunks, of which the kernel reads the next one while the present one is decoded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import FileIO

from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest

from streamlr.dataset.buffers import Buffer

ADVISED = hasattr(os, "posix_fadvise")  # not on macOS and Windows


class Files:
    """Reads files below a folder.

    Parameters
    ----------
    folder : str
        With a separator at its end.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._coming: Iterator[str] = iter(())
        self._next: tuple[str, FileIO] | None = None

    def expect(self, keys: Iterable[str]) -> None:
        """Hear which files are read next, in this order; whatever was expected before is forgotten."""
        if self._next is not None:
            self._next[1].close()
        self._next, self._coming = None, iter(keys if ADVISED else ())
        self._open_next()

    def read(self, key: str, request: ByteRequest | None, buffer: Buffer) -> memoryview:
        """Read a file, or a part of it, into the memory of `buffer`."""
        if self._next is None or self._next[0] != key:
            with open(self._folder + key, "rb", buffering=0) as file:
                return _read(file, request, buffer)
        file, self._next = self._next[1], None
        try:
            with file:
                return _read(file, request, buffer)
        finally:
            self._open_next()

    def _open_next(self) -> None:
        """Open the next file and have the kernel fetch it: small files are no faster read than the disk answers for each."""
        for key in self._coming:
            with suppress(OSError):  # raised when the file is wanted
                self._next = key, open(self._folder + key, "rb", buffering=0)  # noqa: SIM115 - `read` or `expect` closes it
                os.posix_fadvise(self._next[1].fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            if self._next is not None:
                return


def _read(file: FileIO, request: ByteRequest | None, buffer: Buffer) -> memoryview:
    start, stop = 0, file.seek(0, 2)
    if isinstance(request, SuffixByteRequest):
        start = max(stop - request.suffix, 0)
    elif isinstance(request, RangeByteRequest):
        start, stop = min(request.start, stop), min(request.end, stop)
    file.seek(start)
    view = buffer.take(stop - start).data
    done = file.readinto(view)
    while done < len(view) and (count := file.readinto(view[done:])):
        done += count
    return view[:done]
