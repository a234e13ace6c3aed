"""Reading one block ahead: Arrow parses in the thread that asks for a block, and only then."""

from __future__ import annotations

import atexit
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

Item = TypeVar("Item")


def one_ahead(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """Iterate over `items`, each made by a thread while its predecessor is in use; at most one is waiting.

    An error reaches the caller when the item that could not be made is asked for. Who stops early waits for the item being made;
    after that, `items` is closed.

    Examples
    --------
    >>> list(one_ahead(number for number in range(3)))
    [0, 1, 2]
    """
    # A traceback may keep all this until the interpreter ends, which ends Arrow's own threads in the middle of a read: an abort
    atexit.register(items.close)
    try:
        with closing(items), ThreadPoolExecutor(1, "streamlr-read-ahead") as thread:
            coming = thread.submit(next, items, None)
            while (item := coming.result()) is not None:
                coming = thread.submit(next, items, None)
                yield item
    finally:
        atexit.unregister(items.close)
