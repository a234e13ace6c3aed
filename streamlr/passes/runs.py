"""Runs of neighbouring spans: who reads on where it stopped decodes the chunk at the edge once, and has the tile there whole."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

from streamlr.dataset.blocks import Span, tile_edges

PIECES = 8  # that a span is handed out in, so that the last ones balance the threads


class Runs:
    """Hands the spans of a pass to the threads that read them: a run of neighbours to each, of which idle ones take over a part.

    Parameters
    ----------
    cut : sequence of Span
        All spans, in order.
    length : int
        Spans in a run. A power of two leaves one node of the merge tree where spans of whole tiles do.
    rows : int, optional
        Where they are handed out in pieces, these end at multiples of it.
    """

    def __init__(self, cut: Sequence[Span], length: int, rows: int | None = None) -> None:
        runs = (cut[at : at + length] for at in range(0, len(cut), length))
        self._lock = threading.Lock()
        self._whole = deque(
            deque(piece for span in run for piece in ([span] if rows is None else tile_edges(span.start, span.stop, rows)))
            for run in runs
        )
        self._begun: list[deque[Span]] = []  # what is left of each

    @classmethod
    def of_spans(cls, cut: Sequence[Span], count: int, unit: int) -> Runs:
        """Return runs of so many spans that end with units of rows, as tiles or chunks, in pieces that do, too.

        Examples
        --------
        >>> list(Runs.of_spans([Span(0, 8), Span(8, 13)], 2, 4).take())
        [Span(start=0, stop=4), Span(start=4, stop=8), Span(start=8, stop=12), Span(start=12, stop=13)]
        >>> [piece.start for piece in Runs.of_spans([Span(0, 60_000)], 8, 2_048).take()][:3]
        [0, 6144, 12288]
        """
        height = max(span.stop - span.start for span in cut)
        return cls(cut, count, max(height // PIECES // unit, 1) * unit)

    def take(self) -> Run:
        """Begin a run; an empty one when all spans are begun.

        Examples
        --------
        >>> runs = Runs([Span(row, row + 1) for row in range(8)], 8)
        >>> mine, yours = runs.take(), runs.take()
        >>> next(mine).start, [span.start for span in yours], [span.start for span in mine]
        (0, [4, 5, 6, 7], [1, 2, 3])
        """
        with self._lock:
            rest = self._whole.popleft() if self._whole else self._half_of_longest()
            self._begun.append(rest)
            return Run(self, rest)

    def draw(self, rest: deque[Span]) -> Span | None:
        """Return the next span of a run that was begun; None where there is no more of it."""
        with self._lock:
            if rest:
                return rest.popleft()
            self._begun = [other for other in self._begun if other is not rest]
            return None

    def _half_of_longest(self) -> deque[Span]:
        """Take the latter half of what is left of the longest run; a single span too, since its owner is busy with another."""
        longest = max(self._begun, key=len, default=deque[Span]())
        return deque(reversed([longest.pop() for _ in range(-(-len(longest) // 2))]))


class Run(Iterator[Span]):
    """Iterates over spans that follow on each other, as far as nobody else has begun them.

    Attributes
    ----------
    extent : Span
        The rows of all of them.
    """

    def __init__(self, runs: Runs, rest: deque[Span]) -> None:
        self._runs, self._rest = runs, rest
        self.extent = Span(rest[0].start, rest[-1].stop) if rest else Span(0, 0)

    def __next__(self) -> Span:
        span = self._runs.draw(self._rest)
        if span is None:
            raise StopIteration
        return span
