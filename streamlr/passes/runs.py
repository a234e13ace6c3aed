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
    """

    def __init__(self, cut: Sequence[Span], length: int) -> None:
        self._lock = threading.Lock()
        self._whole = deque(deque(cut[at : at + length]) for at in range(0, len(cut), length))
        self._begun: list[deque[Span]] = []  # what is left of each

    @classmethod
    def of_spans(cls, cut: Sequence[Span], count: int, tile: int) -> Runs:
        """Return runs of so many spans of whole tiles, in pieces that are whole tiles too.

        Examples
        --------
        >>> list(Runs.of_spans([Span(0, 8), Span(8, 13)], 2, 4).take())
        [Span(start=0, stop=4), Span(start=4, stop=8), Span(start=8, stop=12), Span(start=12, stop=13)]
        >>> [piece.start for piece in Runs.of_spans([Span(0, 60_000)], 8, 2_048).take()][:3]
        [0, 6144, 12288]
        """
        height = cut[0].stop - cut[0].start
        rows = max(height // PIECES // tile, 1) * tile
        return cls([piece for span in cut for piece in tile_edges(span.start, span.stop, rows)], count * -(-height // rows))

    def take(self) -> Iterator[Span]:
        """Begin a run, and iterate over its spans as far as nobody else has begun them; over none when all spans are begun.

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
        while True:
            with self._lock:
                if not rest:
                    self._begun = [other for other in self._begun if other is not rest]
                    return
                span = rest.popleft()
            yield span

    def _half_of_longest(self) -> deque[Span]:
        """Take the latter half of what is left of the longest run; a single span too, since its owner is busy with another."""
        longest = max(self._begun, key=len, default=deque[Span]())
        return deque(reversed([longest.pop() for _ in range(-(-len(longest) // 2))]))
