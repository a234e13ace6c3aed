"""Memory for chunks and what else is large, straight from the operating system."""

from __future__ import annotations

import mmap
from contextlib import suppress
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}  # not on Windows
HUGE_BYTES = 4 * 2**20  # from here on large pages are asked for, as NumPy does: fewer faults, fewer misses of the page tables
FLOAT64 = np.dtype(np.float64)
HEADROOM = 32  # one part in so many: stored chunks differ a little, and a mapping that is too small goes as a whole


class Buffer:
    """Bytes that grow to the largest chunk asked for, are used again for each, and are given back as a whole.

    An allocator keeps what it was given back for the process's next request, while the kernel goes on counting it; and it may hand
    out fresh pages, each a fault, for every large chunk. A mapping of its own does neither.

    Parameters
    ----------
    lent : (nbytes,) uint8, optional
        Memory of somebody else, to use as long as it suffices.

    Examples
    --------
    >>> Buffer().take(5).nbytes
    5
    >>> memory = np.empty(5, dtype=np.uint8)
    >>> np.shares_memory(Buffer(memory).take(5), memory), np.shares_memory(Buffer(memory).take(6), memory)
    (True, False)
    """

    def __init__(self, lent: NDArray[np.uint8] | None = None) -> None:
        self._bytes = np.empty(0, dtype=np.uint8) if lent is None else lent

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """Return `nbytes` of memory with anything in it; what was taken before is overwritten."""
        if nbytes > len(self._bytes):
            self._bytes = np.empty(0, dtype=np.uint8)  # the old mapping goes before the new one comes
            mapped = mmap.mmap(-1, nbytes + nbytes // HEADROOM, **PRIVATE)
            if nbytes >= HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without them
                    mapped.madvise(mmap.MADV_HUGEPAGE)
            self._bytes = np.frombuffer(mapped, dtype=np.uint8)
        return self._bytes[:nbytes]

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any] = FLOAT64) -> NDArray[Any]:
        """Return memory for numbers in this shape, in C order, with anything in it; what was taken before is overwritten.

        Examples
        --------
        >>> Buffer().array((2, 3)).strides
        (24, 8)
        """
        return self.take(dtype.itemsize * prod(shape)).view(dtype).reshape(shape)
