"""Reading one block ahead, since Arrow parses in the thread that asks for a block, and only then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Iterate over `items`, each made by a thread while its predecessor is in use; at most one is waiting.

    An error reaches the caller when the item that could not be made is asked for. Who stops early waits for the item being made.

    Examples
    --------
    >>> list(one_ahead(range(3)))
    [0, 1, 2]
    """
    source = iter(items)
    with ThreadPoolExecutor(1, "streamlr-read-ahead") as thread:
        coming = thread.submit(next, source, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, source, None)
            yield item
