"""Rows of a dataset, tile by tile: promoted, checked, and with missing rows left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import Block, Span, tile_edges
from streamlr.dataset.tally import Tally
from streamlr.errors import DataError, NonFiniteValue

if TYPE_CHECKING:
    from streamlr.dataset.dataset import Dataset

EXACT_INTEGERS = 2.0**53  # from here on float64 skips integers: what reads as this may have been the next one


class DatasetReader:
    """Reads the arrays of a dataset side by side; for one thread."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._readers = [rows.reader() for rows in dataset.arrays]
        self._buffers: tuple[NDArray[np.float64], NDArray[np.float64] | None] = (np.empty((0, 0)), None)

    def blocks(self, span: Span, report: Callable[[Tally], None]) -> Iterator[Block]:
        """Read the rows of a span: blocks that end where tiles end, promoted, checked and with missing rows left out.

        Parameters
        ----------
        span : Span
            Rows to read.
        report : callable
            Called with the tally of each block before it is yielded; may raise to stop the reading.

        Yields
        ------
        Block
            Valid until the next one is asked for: its memory is used again.
        """
        dataset = self.dataset
        columns, weights = self._tile(min(dataset.tile_rows, span.stop - span.start))
        places = self._places(columns, weights)
        missing_before = sum(reader.chunks_missing for reader in self._readers)
        for piece in tile_edges(span.start, span.stop, dataset.tile_rows):
            height = piece.stop - piece.start
            for reader, place in zip(self._readers, places, strict=True):
                reader.read_into(place[:height], piece.start)
            w = None if weights is None else weights[:height, 0]
            rounded = self._rounded(columns[:height])
            block, dropped, by_column = self._checked(piece, columns[:height], w)
            chunks_missing = sum(reader.chunks_missing for reader in self._readers)
            report(Tally(height, dropped, by_column, chunks_missing - missing_before, rounded))
            missing_before = chunks_missing
            yield block

    def _tile(self, height: int) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Return memory for a tile of this height and its weights; the same for every span."""
        dataset = self.dataset
        if len(self._buffers[0]) < height:
            columns = np.empty((height, dataset.n_features + dataset.n_targets))
            self._buffers = columns, None if dataset.weights is None else np.empty((height, 1))
        return self._buffers

    def _places(self, columns: NDArray[np.float64], weights: NDArray[np.float64] | None) -> list[NDArray[np.float64]]:
        """Which columns of the tile each array fills."""
        places, at = [], 0
        for rows in (*self.dataset.features, *self.dataset.targets):
            places.append(columns[:, at : at + rows.n_columns])
            at += rows.n_columns
        return places if weights is None else [*places, weights]

    def _checked(
        self, piece: Span, columns: NDArray[np.float64], weights: NDArray[np.float64] | None
    ) -> tuple[Block, int, dict[str, int]]:
        positions: NDArray[np.int64] | None = None
        if self.dataset.subsets:
            positions = np.flatnonzero(self.dataset.chosen(piece.start, piece.stop))
            columns, weights = columns[positions], None if weights is None else weights[positions]
        dropped = 0
        by_column: dict[str, int] = {}
        with np.errstate(all="ignore"):  # one product tells whether all is finite; only then is the place looked for
            sums = np.ones(len(columns)) @ columns
        if not np.isfinite(sums).all() or (weights is not None and not np.isfinite(weights.sum())):
            columns, weights, dropped, by_column = self._without_missing(piece, positions, columns, weights)
        if weights is not None and (weights < 0).any():
            row = _row(piece, positions, int(np.argmax(weights < 0)))
            raise DataError(f"row {row:,} has the weight {weights[np.argmax(weights < 0)]!r}; allowed are finite numbers from 0 on")
        return Block(piece.start, piece.stop, columns, weights, self.dataset.n_features), dropped, by_column

    def _without_missing(
        self, piece: Span, positions: NDArray[np.int64] | None, columns: NDArray[np.float64], weights: NDArray[np.float64] | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None, int, dict[str, int]]:
        everything = columns if weights is None else np.column_stack([columns, weights])
        names = (*self.dataset.feature_names, *self.dataset.target_names, "weights")
        refused = ~np.isfinite(everything) if self.dataset.missing == "error" else np.isinf(everything)
        if refused.any():
            i, j = (int(number) for number in np.argwhere(refused)[0])
            remedy = (
                "leave such rows out with open_dataset(..., missing='drop') (--missing drop), or repair the data"
                if np.isnan(everything[i, j])
                else "repair the data: an infinity is not a missing value"
            )
            row = _row(piece, positions, i)
            raise NonFiniteValue(
                f"row {row:,}, column {names[j]!r} is {everything[i, j]} (NaN or infinity is not allowed); {remedy}"
            )
        lacking = np.isnan(everything)
        keep = ~lacking.any(axis=1)
        dropped = int((~keep).sum())
        by_column = {names[j]: int(count) for j, count in enumerate(lacking.sum(axis=0)) if count}
        if self.dataset.missing == "keep":
            return columns, weights, dropped, by_column
        return columns[keep], None if weights is None else weights[keep], dropped, by_column

    def _rounded(self, columns: NDArray[np.float64]) -> frozenset[str]:
        """Columns of 64-bit integers in which this tile has one that float64 cannot hold."""
        names: set[str] = set()
        at = 0
        for rows in (*self.dataset.features, *self.dataset.targets):
            if rows.dtype.kind in "iu" and rows.dtype.itemsize == 8:
                beyond = (np.abs(columns[:, at : at + rows.n_columns]) >= EXACT_INTEGERS).any(axis=0)
                names.update((*self.dataset.feature_names, *self.dataset.target_names)[at + j] for j in np.flatnonzero(beyond))
            at += rows.n_columns
        return frozenset(names)


def _row(piece: Span, positions: NDArray[np.int64] | None, number: int) -> int:
    return piece.start + (number if positions is None else int(positions[number]))
