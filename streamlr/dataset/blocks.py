"""Blocks of rows, and where tiles and spans begin and end: integers only, nothing is read here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.buffers import Buffer

TILE_BYTES = 8 * 2**20
MANY_ROWS = 8192  # of a tile: what it leaves takes 7 % of the time of its product, of however many columns
MIN_SPAN_BYTES = 16 * 2**20
MAX_SPAN_BYTES = 256 * 2**20
WAITING_SPAN_BYTES = 2**30  # from a store with latency, for which the first chunks of each span wait
SPANS_PER_WORKER = 8  # so that the last spans balance the cores
MAX_SPANS = 7_500  # with the merges, four at a time: 10,000 tasks


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows in memory, checked; rows that were left out still count in `start` and `stop`.

    Attributes
    ----------
    start, stop : int
        The rows of the dataset that this block covers.
    x, y : (m, p) and (m, k) float64
        Features and targets of the m <= stop - start rows that are kept; C-contiguous as they are read, and perhaps where somebody
        else keeps them: not to be written to, but by who made room for them. For who asks for it features are as they are stored,
        in float32 say.
    weights : (m,) float64 or None
        Weights of the kept rows.
    room : Buffer or None
        Memory to work in that its owner uses again for the next block.
    doubt : callable or None
        Raises if a feature or target is NaN or infinite, where nobody has looked yet.
    """

    start: int
    stop: int
    x: NDArray[Any]
    y: NDArray[np.float64]
    weights: NDArray[np.float64] | None = None
    room: Buffer | None = None
    doubt: Callable[[], object] | None = None

    def confirm(self) -> None:
        """Look for values that are NaN or infinite, unless somebody has: sums of them are not finite, which calls for a look.

        Raises
        ------
        NonFiniteValue
            There is one.
        """
        if self.doubt is not None:
            self.doubt()

    def workspace(self, count: int) -> NDArray[np.float64]:
        """Return memory for `count` numbers, with anything in it; what was taken before is overwritten."""
        return np.empty(count) if self.room is None else self.room.array((count,))

    def part(self, first: int, last: int) -> Block:
        """Return the kept rows from one number to before another, where they lie."""
        weights = None if self.weights is None else self.weights[first:last]
        return Block(self.start, self.stop, self.x[first:last], self.y[first:last], weights, doubt=self.doubt)

    def copy(self) -> Block:
        """Return a block that owns its rows, which are confirmed."""
        self.confirm()
        weights = None if self.weights is None else self.weights.copy()
        return Block(self.start, self.stop, self.x.copy(), self.y.copy(), weights)

    def followed_by(self, later: Block) -> Block:
        """Return this block and the one that starts where it stops, as one."""
        weights = None
        if self.weights is not None and later.weights is not None:
            weights = np.concatenate([self.weights, later.weights])
        return Block(self.start, later.stop, np.concatenate([self.x, later.x]), np.concatenate([self.y, later.y]), weights)


@dataclass(frozen=True, slots=True)
class Span:
    """The rows [start, stop) that one task reads."""

    start: int
    stop: int


def tile_rows(n_columns: int, left_bytes: int | None = None, cache_bytes: int = TILE_BYTES) -> int:
    """Return how many rows a tile has: a power of two, about a cache full, and more where a tile leaves many numbers to add up.

    It depends on the number of columns alone, so that the arithmetic does not know how the rows are stored.

    Parameters
    ----------
    n_columns : int
        Columns of the rows, targets included.
    left_bytes : int, optional
        What the statistic leaves of a tile. A tile has eight times as many bytes, or at least eight rows for each column, whichever
        is less; by default the latter, as for moments. Of more than 8,192 rows, four times and four rows will do.
    cache_bytes : int, optional
        What a cache holds.

    Examples
    --------
    >>> tile_rows(101), tile_rows(11), tile_rows(1001), tile_rows(1001, 100)
    (8192, 65536, 8192, 1024)
    """
    columns = max(n_columns, 1)
    cached = max(cache_bytes // (8 * columns), 1)
    left = columns if left_bytes is None else min(columns, -(-left_bytes // (8 * columns)))  # rows that take as many bytes
    least = max(4 * left, min(8 * left, MANY_ROWS), 1)
    return max(1 << (cached.bit_length() - 1), 1 << (least - 1).bit_length())


def tile_edges(start: int, stop: int, rows: int) -> list[Span]:
    """Cut the rows [start, stop) where tiles of `rows` rows end.

    Examples
    --------
    >>> tile_edges(3, 9, 4)
    [Span(start=3, stop=4), Span(start=4, stop=8), Span(start=8, stop=9)]
    """
    edges = [start, *range((start // rows + 1) * rows, stop, rows), stop]
    return [Span(a, b) for a, b in itertools.pairwise(edges) if a < b]


def ended_by_tiles(following: Iterable[Span], rows: int) -> Iterator[Span]:
    """Move the ends of spans that follow on each other back to where tiles of `rows` rows end, but for the end of all.

    A span is drawn when all whole tiles before it were handed out.

    Examples
    --------
    >>> list(ended_by_tiles([Span(3, 10), Span(10, 11), Span(11, 18)], 4))
    [Span(start=3, stop=8), Span(start=8, stop=16), Span(start=16, stop=18)]
    """
    rest = None
    for span in following:
        start, stop = span.start if rest is None else rest.start, span.stop // rows * rows
        if start < stop:
            yield Span(start, stop)
        rest = Span(max(start, stop), span.stop)
    if rest is not None and rest.start < rest.stop:
        yield rest


def spans(
    n_rows: int,
    row_bytes: int,
    *,
    tile: int,
    chunks: Sequence[int],
    workers: int,
    whole_tiles: bool,
    waiting: bool = False,
) -> list[Span]:
    """Cut the rows into spans: few enough to schedule, enough to balance, about as long as each other, ending where chunks end.

    Parameters
    ----------
    n_rows, row_bytes : int
        Rows of the dataset and decoded bytes of one.
    tile : int
        Rows in a tile.
    chunks : sequence of int
        Rows per chunk of each array that is read, the array with the most bytes first. Spans follow the edges that all share
        when those are near enough, so that every chunk is decoded once; else the edges of the first array.
    workers : int
        Tasks that run at once.
    whole_tiles : bool
        Cut at power-of-two numbers of tiles instead, so that a span leaves one node of the merge tree; for many columns,
        where open nodes cost more than decoding a chunk at the edge twice.
    waiting : bool
        Prefer longer spans: chunks are asked for ahead, but not before their span begins.

    Examples
    --------
    >>> spans(1000, 2**20, tile=64, chunks=[100, 50], workers=2, whole_tiles=False)[:3]
    [Span(start=0, stop=100), Span(start=100, stop=200), Span(start=200, stop=300)]
    """
    total = n_rows * row_bytes
    wanted = min(max(total // (workers * SPANS_PER_WORKER), MIN_SPAN_BYTES), MAX_SPAN_BYTES)
    wanted_rows = max(wanted // max(row_bytes, 1), -(-n_rows // MAX_SPANS), 1)
    if waiting:
        together = 2 * workers if whole_tiles else workers  # a power of two may be twice as long as wanted
        rounds = max(-(-total // (together * WAITING_SPAN_BYTES)), 1)
        wanted_rows = max(wanted_rows, -(-n_rows // (together * rounds)))
    if whole_tiles:
        rows = tile * 2 ** max(math.ceil(math.log2(wanted_rows / tile)), 0)
        return [Span(start, min(start + rows, n_rows)) for start in range(0, n_rows, rows)]
    shared = math.lcm(*chunks)
    if waiting:  # few spans had better be of one length, and may end within tiles
        unit = shared if shared <= wanted_rows // 2 else chunks[0]
    else:  # the ends of those that end within tiles are copied and kept: longer ones are better, if all workers get as many
        whole = math.lcm(shared, tile)
        most = wanted_rows if -(-n_rows // whole) % workers else 2 * wanted_rows
        unit = next((rows for rows, limit in ((whole, most), (shared, wanted_rows)) if rows <= limit), chunks[0])
    units = -(-n_rows // unit)
    count = min(-(-n_rows // wanted_rows), units)
    count -= count % workers if count > workers else 0
    edges = [min(number * units // count * unit, n_rows) for number in range(count + 1)]
    return [Span(start, stop) for start, stop in itertools.pairwise(edges)]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a pass would do, computed before any row is read. All sizes in bytes.

    Attributes
    ----------
    solver : str
        What the pass feeds: the route of the solver, or what else it is for.
    n_rows, n_features, n_targets : int
        Size of the problem.
    passes : int
        Readings of all rows.
    tile_rows, n_spans, n_tasks : int
        Rows in a tile; spans, and tasks in all, merges included.
    tasks_at_once : int
        Tasks that run together: as many as there are workers, fewer where memory is short.
    tasks_per_process : int
        Those of them that share a process and its memory: all, but on a cluster the threads of a worker.
    fan_in : int
        Results that one merging task joins.
    spans_per_task : int
        Neighbouring spans that one task may read on its own: the chunks at their edges are decoded once, the tiles kept by nobody.
    bytes_read : int
        Decoded bytes of one pass.
    base_bytes, task_bytes, result_bytes, solution_bytes : int
        The interpreter and its imports; one running task; results that wait to be merged; what comes after, as the solution.
    peak_bytes : int
        The most of it at any time.
    limit_bytes : int
        What the peak was compared with.
    limit_source : str
        Where that limit comes from.
    """

    solver: str
    n_rows: int
    n_features: int
    n_targets: int
    passes: int
    tile_rows: int
    n_spans: int
    n_tasks: int
    tasks_at_once: int
    tasks_per_process: int
    fan_in: int
    spans_per_task: int
    bytes_read: int
    base_bytes: int
    task_bytes: int
    result_bytes: int
    solution_bytes: int
    peak_bytes: int
    limit_bytes: int
    limit_source: str

    @property
    def fits(self) -> bool:
        """Whether one task at a time, and the solution after it, stay within the limit."""
        return self.tasks_at_once > 0 and self.base_bytes + self.solution_bytes <= self.limit_bytes

    def __str__(self) -> str:
        return "\n".join(
            [
                f"solver          {self.solver}",
                f"rows            {self.n_rows:,} x {self.n_features} features, {self.n_targets} target(s)",
                f"passes          {self.passes}, {format_bytes(self.bytes_read)} decoded in each",
                f"tasks           {self.n_tasks:,} ({self.n_spans:,} spans), {self.tasks_at_once} at once",
                f"tile            {self.tile_rows:,} rows",
                f"memory, peak    {format_bytes(self.peak_bytes)} = {format_bytes(self.base_bytes)} for Python and imports"
                f" + {self.tasks_per_process} x {format_bytes(self.task_bytes)} + {format_bytes(self.result_bytes)} of results"
                + (f"; {format_bytes(self.solution_bytes)} later, to solve or for the cost" if self.solution_bytes else ""),
                f"memory, limit   {format_bytes(self.limit_bytes)} ({self.limit_source})",
            ]
        )


def format_bytes(count: int) -> str:
    """Return a number of bytes for people, in powers of 1,000.

    Examples
    --------
    >>> format_bytes(52_428_800), format_bytes(999), format_bytes(3_200_000_000)
    ('52.4 MB', '999 B', '3.2 GB')
    """
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
