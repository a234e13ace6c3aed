"""Memory as a store: it answers at once, in the thread that asks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zarr.abc.store import ByteRequest, Store
from zarr.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from streamlr.dataset.buffers import Buffer


def answers_at_once(store: Store) -> bool:
    """Whether a store is memory, and no subclass has changed its `get` without its `get_sync`.

    Such an answer needs no event loop, on which readers on several threads wait for each other. Other stores have a `get_sync` too
    that depends on what they wrap: they are asked ahead.

    Examples
    --------
    >>> from zarr.storage import MemoryStore, WrapperStore
    >>> answers_at_once(WrapperStore(MemoryStore()))
    False
    """
    changed = next(kind for kind in type(store).__mro__ if {"get", "get_sync"} & vars(kind).keys())
    return isinstance(store, MemoryStore) and "get_sync" in vars(changed)


class SynchronousStore:
    """Reads from a store that answers at once; there is nothing to ask for ahead.

    Parameters
    ----------
    store : zarr store
        One that `answers_at_once`.
    """

    def __init__(self, store: Any) -> None:
        self._get = store.get_sync
        self._prototype = default_buffer_prototype()

    def expect(self, keys: Iterable[str]) -> None:
        """Hear which keys are read next."""

    def read(self, key: str, request: ByteRequest | None, buffer: Buffer) -> memoryview | None:
        """Return what is at a key, or a part of it; None when nothing is."""
        found = self._get(key, prototype=self._prototype, byte_range=request)
        return None if found is None else plain_bytes(found)


def plain_bytes(found: Any) -> memoryview:
    """Return the bytes of a zarr buffer, without a copy and for reading only."""
    return memoryview(found.as_numpy_array()).cast("B").toreadonly()
