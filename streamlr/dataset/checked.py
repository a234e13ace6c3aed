"""Rows of a dataset, tile by tile: promoted, checked, and with missing rows left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import Block, Span, tile_edges
from streamlr.dataset.buffers import FLOAT64, Buffer
from streamlr.dataset.rows import Rows
from streamlr.dataset.tally import Tally
from streamlr.errors import DataError, NonFiniteValue

if TYPE_CHECKING:
    from streamlr.dataset.dataset import Dataset

EXACT_INTEGERS = 2.0**53  # from here on float64 skips integers: what reads as this may have been the next one


class DatasetReader:
    """Reads the arrays of a dataset side by side; for one thread."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._x, self._y = _Beside(dataset.features), _Beside(dataset.targets)
        self._weights = None if dataset.weights is None else _Beside([dataset.weights])
        self._sides = [side for side in (self._x, self._y, self._weights) if side is not None]
        self._room = Buffer()
        self._expecting = False

    @contextmanager
    def expecting(self, spans: Sequence[Span]) -> Iterator[None]:
        """Ask ahead for the rows of these spans, whose `blocks` are wanted next and in this order, while the block runs."""
        self._expecting = True
        try:
            self._expect(spans)
            yield
        finally:
            self._expecting = False
            self._expect(())  # an error, or a caller that stops here, leaves no request behind

    def blocks(
        self,
        span: Span,
        report: Callable[[Tally], None],
        tile: int | None = None,
        *,
        confirmed: bool = True,
        as_stored: bool = False,
    ) -> Iterator[Block]:
        """Read the rows of a span: blocks that end where tiles end, promoted, checked and with missing rows left out.

        The span's own rows are asked for ahead; and those of later spans where the caller is `expecting` them.

        Parameters
        ----------
        span : Span
            Rows to read.
        report : callable
            Called with the tally of each block before it is yielded; may raise to stop the reading.
        tile : int, optional
            Rows of a tile; by default the dataset's.
        confirmed : bool
            Look for what is not finite in every block. Whoever forms sums in which it shows may do without, and `confirm` blocks
            whose sums are not finite. Where rows are left out they are looked for in any case.
        as_stored : bool
            Leave features of one dtype that is shorter than float64 to be promoted by who uses them.

        Yields
        ------
        Block
            Valid until the next one is asked for: its memory is used again.
        """
        with nullcontext() if self._expecting else self.expecting([span]):
            for piece in tile_edges(span.start, span.stop, tile or self.dataset.tile_rows):
                yield self._read(piece, report, confirmed, as_stored=as_stored)

    def fill(self, span: Span, report: Callable[[Tally], None], room: Block) -> Block:
        """Read the rows of a span into memory, decoded where they stay if possible, and return those that are kept.

        Parameters
        ----------
        span : Span
            Rows to read.
        report : callable
            Called with the tally of what was read; may raise to stop the reading.
        room : Block
            Memory for so many rows, or more.

        Returns
        -------
        Block
            The part of `room` that is filled, which is perhaps to be confirmed.
        """
        dataset = self.dataset
        if dataset.missing == "error" and not dataset.subsets and self._x.exact and self._y.exact:
            with nullcontext() if self._expecting else self.expecting([span]):
                return self._read(span, report, False, room)
        filled = 0
        for block in self.blocks(span, report):
            here = room.part(filled, filled + len(block.x))
            here.x[:], here.y[:] = block.x, block.y
            if here.weights is not None:
                here.weights[:] = block.weights
            filled += len(block.x)
        return room.part(0, filled)

    def forget(self) -> None:
        """Let go of what is held, but for its memory, as if nothing had been read."""
        for side in self._sides:
            side.forget()

    def _expect(self, spans: Sequence[Span]) -> None:
        for side in self._sides:
            side.expect(spans)

    def _chunks_missing(self) -> int:
        return sum(side.chunks_missing for side in self._sides)

    def _read(
        self,
        piece: Span,
        report: Callable[[Tally], None],
        confirmed: bool,
        room: Block | None = None,
        *,
        as_stored: bool = False,
    ) -> Block:
        """Read some rows, into `room` if there is one, and report what was met."""
        missing_before = self._chunks_missing()
        x = self._x.rows(piece, None if room is None else room.x, self._x.dtype if as_stored else FLOAT64)
        y = self._y.rows(piece, None if room is None else room.y)
        weights = None
        if self._weights is not None:
            weights = self._weights.rows(piece, None if room is None or room.weights is None else room.weights[:, None])[:, 0]
        rounded = {self.dataset.feature_names[j] for j in self._x.rounded(x)}
        rounded |= {self.dataset.target_names[j] for j in self._y.rounded(y)}
        block, dropped, by_column = self._checked(piece, x, y, weights, confirmed)
        chunks_missing = self._chunks_missing() - missing_before
        report(Tally(piece.stop - piece.start, dropped, by_column, chunks_missing, frozenset(rounded)))
        return block

    def _checked(
        self, piece: Span, x: NDArray[Any], y: NDArray[np.float64], weights: NDArray[np.float64] | None, confirmed: bool
    ) -> tuple[Block, int, dict[str, int]]:
        positions: NDArray[np.int64] | None = None
        if self.dataset.subsets:
            positions = np.flatnonzero(self.dataset.chosen(piece.start, piece.stop))
            x, y, weights = x[positions], y[positions], None if weights is None else weights[positions]
        dropped, by_column = 0, dict[str, int]()
        block = Block(piece.start, piece.stop, x, y, weights, self._room)
        if confirmed or self.dataset.missing != "error" or not (weights is None or surely_finite(weights)):
            block, dropped, by_column = self._without_missing(block, positions)
        else:
            doubt = partial(self._without_missing, block, positions)
            block = Block(piece.start, piece.stop, x, y, weights, self._room, doubt)
        if weights is not None and (weights < 0).any():
            i = int(np.argmax(weights < 0))
            raise DataError(f"row {_row(piece, positions, i):,} has the weight {weights[i]}; allowed are finite numbers from 0 on")
        return block, dropped, by_column

    def _without_missing(self, block: Block, positions: NDArray[np.int64] | None) -> tuple[Block, int, dict[str, int]]:
        parts = [block.x, block.y, *([] if block.weights is None else [block.weights[:, None]])]
        if all(map(surely_finite, parts)):
            return block, 0, {}
        names = (*self.dataset.feature_names, *self.dataset.target_names, "weights")
        # only masks are made of the whole tile, an eighth of its bytes each
        lacking, infinite = (np.column_stack([test(part) for part in parts]) for test in (np.isnan, np.isinf))
        refused = infinite | lacking if self.dataset.missing == "error" else infinite
        if refused.any():
            i, j = (int(number) for number in np.argwhere(refused)[0])
            value = np.concatenate([part[i] for part in parts])[j]
            remedy = (
                "leave such rows out with open_dataset(..., missing='drop') (--missing drop), or repair the data"
                if np.isnan(value)
                else "repair the data: an infinity is not a missing value"
            )
            row = _row(block, positions, i)
            raise NonFiniteValue(f"row {row:,}, column {names[j]!r} is {value} (NaN or infinity is not allowed); {remedy}")
        keep = ~lacking.any(axis=1)
        dropped = int((~keep).sum())
        by_column = {names[j]: int(count) for j, count in enumerate(lacking.sum(axis=0)) if count}
        if self.dataset.missing == "keep" or not dropped:
            return block, dropped, by_column
        weights = None if block.weights is None else block.weights[keep]
        kept = Block(block.start, block.stop, block.x[keep], block.y[keep], weights, self._room)
        return kept, dropped, by_column


class _Beside:
    """Reads the columns of some arrays side by side: where they lie if they lie together, else copied into memory of its own."""

    def __init__(self, arrays: Sequence[Rows]) -> None:
        self._readers = [rows.reader() for rows in arrays]
        ends = list(itertools.accumulate((rows.n_columns for rows in arrays), initial=0))
        self._places = [slice(*ends[i : i + 2]) for i in range(len(arrays))]
        self._inexact = [
            place for rows, place in zip(arrays, self._places, strict=True) if rows.dtype.kind in "iu" and rows.dtype.itemsize == 8
        ]
        self._width = ends[-1]
        self._tile = Buffer()
        dtypes = {rows.dtype for rows in arrays}
        shorter = len(dtypes) == 1 and arrays[0].dtype.itemsize < FLOAT64.itemsize
        self.dtype = arrays[0].dtype if shorter else FLOAT64  # that holds every number

    @property
    def exact(self) -> bool:
        """Whether float64 holds every number of these dtypes: of others it takes memory to look."""
        return not self._inexact

    @property
    def chunks_missing(self) -> int:
        """Absent chunks that were read as fill values so far."""
        return sum(reader.chunks_missing for reader in self._readers)

    def expect(self, spans: Sequence[Span]) -> None:
        """Tell every reader which rows are read next."""
        for reader in self._readers:
            reader.expect(spans)

    def forget(self) -> None:
        """Let go of what every reader holds."""
        for reader in self._readers:
            reader.forget()

    def rows(self, piece: Span, into: NDArray[np.float64] | None = None, dtype: np.dtype[Any] = FLOAT64) -> NDArray[Any]:
        """Return the rows of a piece, (m, columns) in C order, in `into` or else valid until the next are asked for.

        They are float64, or else of the `dtype` of all arrays.
        """
        shape = piece.stop - piece.start, self._width
        if into is not None:
            tile = into[: shape[0]]
        elif len(self._readers) == 1 and (view := self._view(piece, dtype)) is not None:
            return view
        else:
            tile = self._tile.array(shape, dtype)
        for reader, place in zip(self._readers, self._places, strict=True):
            reader.read_into(tile[:, place], piece.start)
        return tile

    def _view(self, piece: Span, dtype: np.dtype[Any]) -> NDArray[Any] | None:
        view = self._readers[0].view(piece.start, piece.stop)
        return view if view is not None and view.dtype == dtype else None

    def rounded(self, rows: NDArray[Any]) -> list[int]:
        """Return the positions of columns of 64-bit integers in which these rows have one that float64 cannot hold."""
        beyond = [np.flatnonzero((np.abs(rows[:, place]) >= EXACT_INTEGERS).any(axis=0)) + place.start for place in self._inexact]
        return [int(j) for found in beyond for j in found]


def surely_finite(numbers: NDArray[Any]) -> bool:
    """Whether the sum of squares is finite, which is found faster than anything else about numbers; then they are, too.

    `@` would keep other threads out of the interpreter all the while.
    """
    flat = numbers.ravel()
    with np.errstate(all="ignore"):
        return bool(np.isfinite(flat.dot(flat)))


def _row(piece: Span | Block, positions: NDArray[np.int64] | None, number: int) -> int:
    return piece.start + (number if positions is None else int(positions[number]))
