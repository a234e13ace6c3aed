"""Requests to a store that are under way while the chunks before them are decoded."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from typing import Any, Generic, TypeVar

from zarr.core.sync import sync  # stores are bound to zarr's own event loop, and this is the way in

REQUESTS = 64  # under way at once for one reader: latency is shared by so many
HANDOVERS = 4  # in which those are asked for, and answered: the way to the loop and back costs as much as a small chunk
AHEAD_BYTES = 64 * 2**20  # of chunks: 600 MB/s at 50 ms, and as long to arrive. Of larger ones, one comes while another is decoded

A = TypeVar("A")
B = TypeVar("B")
Position = tuple[int, ...]
Question = Callable[[], Coroutine[Any, Any, A]]


def chunks_ahead(chunk_bytes: int) -> int:
    """Return how many chunks may be asked for before they are wanted, by the bytes of one when decoded.

    What is held is stored bytes; but how many those are is not known before they are there, only that they are hardly more.

    Examples
    --------
    >>> chunks_ahead(65_536), chunks_ahead(5_000_000), chunks_ahead(52_428_800)
    (64, 13, 1)
    """
    return min(max(AHEAD_BYTES // chunk_bytes, 1), REQUESTS)


class ReadAhead(Generic[A]):
    """Asks for chunks before they are wanted, at most so many at once, and hands out the answers in order.

    The requests are tasks on the loop that `sync` runs everything on. No thread is started for them, and cancelling ends them.

    Parameters
    ----------
    ask : callable
        From a position to the coroutine function that answers for it; it must return errors, not raise them.
    most : int
        Answers that are waited for or wait at once.
    """

    def __init__(self, ask: Callable[[Position], Question[A]], most: int) -> None:
        self._ask, self._most = ask, most
        self._together = max(most // HANDOVERS, 1)
        self._loop = sync(_running_loop())
        self._coming: Iterator[Position] = iter(())
        self._asked: deque[tuple[Position, Future[A]]] = deque()
        self._under_way: deque[Future[None]] = deque(maxlen=most // self._together + 1)  # before so many, all are answered

    def start(self, coroutine: Coroutine[Any, Any, B]) -> Future[B]:
        """Start a request that several answers need; it is dropped when they are."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def expect(self, positions: Iterable[Position]) -> None:
        """Drop all requests, and ask for what will be wanted next, in this order."""
        for requests in self._under_way:
            requests.cancel()
        self._under_way.clear()
        self._asked.clear()
        self._coming = iter(positions)
        self._fill()

    def answer(self, position: Position) -> A:
        """Return the answer for a position: the first of those that are expected, or any other."""
        if not self._asked or self._asked[0][0] != position:
            return sync(self._ask(position)())
        answer = self._asked.popleft()[1].result()
        self._fill()
        return answer

    def _fill(self) -> None:
        """Ask for some more at once, as soon as there is room for so many."""
        while len(self._asked) <= self._most - self._together:
            positions = list(islice(self._coming, self._together))
            if not positions:
                return
            answers: list[Future[A]] = [Future() for _ in positions]
            self._under_way.append(self.start(_answer(list(map(self._ask, positions)), answers)))
            self._asked.extend(zip(positions, answers, strict=True))


async def _answer(questions: list[Question[A]], answers: list[Future[A]]) -> None:
    async def one(question: Question[A], answer: Future[A]) -> None:
        try:
            answer.set_result(await question())
        except BaseException as error:  # whoever waits for it must hear of it, whatever it is
            answer.set_exception(error)
            raise

    await asyncio.gather(*map(one, questions, answers))


async def _running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()
