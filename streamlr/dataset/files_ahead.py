"""Files of chunks, of which the kernel reads the next one while the present one is decoded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest

from streamlr.dataset.buffers import Buffer

ADVISED = hasattr(os, "posix_fadvise")  # not on macOS and Windows
READING = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # Windows would change ends of lines
NOWAIT = getattr(os, "RWF_NOWAIT", None)  # Linux alone
LARGE = 2**20  # bytes of a file, beside which telling the kernel of the next one costs nothing
AHEAD = 64  # small files that are asked for ahead after one that the disk let wait for


class Files:
    """Reads files below a folder, with a call of the system for each step and none besides.

    Each call lets go of the interpreter's lock, which the other readers of small chunks hold when it comes back. The next file is
    therefore asked for ahead only where it pays: after a large one, and for a while after one that the disk let wait for. It is not
    kept open: with one for every array and task there may be more than a process is allowed.

    Parameters
    ----------
    folder : str
        With a separator at its end.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._coming: Iterator[str] = iter(())
        self._at = ""  # the last of them that was looked at
        self._asked = ""  # the one that the kernel was told of and that was not read yet
        self._ahead = 1  # files to ask for ahead from here: the first, until it is known where they come from

    def expect(self, keys: Iterable[str]) -> None:
        """Hear which files are read next, in this order; whatever was expected before is forgotten."""
        self._coming, self._at, self._asked = iter(keys if ADVISED else ()), "", ""
        if self._ahead:
            self._ask_ahead("")

    def open(self, key: str) -> int:
        """Open a large file, to be read and closed by who asks, and have the kernel fetch the next one."""
        file = self._opened(key)
        if not self._asked:
            self._ask_ahead(key)
        return file

    def read(self, key: str, request: ByteRequest | None, buffer: Buffer) -> memoryview:
        """Read a file, or a part of it, into the memory of `buffer`."""
        found, waited = _read(self._opened(key), request, buffer)
        self._ahead = AHEAD if waited else max(self._ahead - 1, int(len(found) >= LARGE))
        if self._ahead and not self._asked:
            self._ask_ahead(key)
        return found

    def _opened(self, key: str) -> int:
        if self._asked == key:
            self._asked = ""
        return os.open(self._folder + key, READING)

    def _ask_ahead(self, key: str) -> None:
        """Have the kernel fetch the file that comes after this one."""
        while self._at != key:
            self._at = next(self._coming, key)
        for coming in self._coming:
            self._at = coming
            try:
                file = os.open(self._folder + coming, READING)
            except OSError:
                continue  # raised when the file is wanted
            self._asked = coming
            with suppress(OSError):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            os.close(file)
            return


def _read(file: int, request: ByteRequest | None, buffer: Buffer) -> tuple[memoryview, bool]:
    """Read an open file, or a part of it, and close it; tell whether the disk was waited for, as far as that can be known."""
    try:
        start, stop = 0, os.fstat(file).st_size
        if isinstance(request, SuffixByteRequest):
            start = max(stop - request.suffix, 0)
        elif isinstance(request, RangeByteRequest):
            start, stop = min(request.start, stop), min(request.end, stop)
        view = buffer.take(stop - start).data
        done = _in_memory(view, file, start)
        waited = done < len(view)
        done += read_at(view[done:], file, start + done)
        return view[:done], waited
    finally:
        os.close(file)


def _in_memory(view: memoryview, file: int, offset: int) -> int:
    """Read from an offset on what the kernel has in memory, and return the number of bytes; 0 where it cannot be asked for that."""
    if NOWAIT is None:
        return 0
    try:
        return os.preadv(file, [view], offset, NOWAIT)
    except OSError:  # nothing there, or a disk that does not tell; what is wrong with it shows when it is read
        return 0


def read_at(view: memoryview, file: int, offset: int) -> int:
    """Read an open file from an offset on, and return the number of bytes: fewer than there is room for where it ends."""
    done = 0
    while done < len(view) and (count := _read_some(view[done:], file, offset + done)):
        done += count
    return done


def _read_some(view: memoryview, file: int, offset: int) -> int:
    """Read what comes at once."""
    if hasattr(os, "preadv"):  # not on Windows
        return os.preadv(file, [view], offset)
    os.lseek(file, offset, os.SEEK_SET)
    found = os.read(file, len(view))
    view[: len(found)] = found
    return len(found)
