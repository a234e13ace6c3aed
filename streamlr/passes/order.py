"""The order of rows in an epoch: a function of the dataset's shape, its chunk grid and a few options, and of nothing that runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import Span
from streamlr.dataset.dataset import Dataset
from streamlr.passes.planning import block_spans
from streamlr.passes.shuffle import START, Position, Prepare, Stretch, stretches
from streamlr.passes.windows import Window

UNIT_BYTES = 4 * 2**20  # smaller chunks are read several at a time
STRETCH_BYTES = 2**21
BUFFER_BYTES = 64 * 2**20
DRAWS = 256  # from a window for a batch, at least
BUFFER_UNITS = 4  # that are shuffled together at least, so that rows from as many places are mixed


@dataclass(frozen=True, slots=True)
class Order:
    """The order of rows: a function of the dataset's shape, dtypes and chunk grid, and of these options.

    Attributes
    ----------
    batch_rows : int
        Rows of a batch; stretches are whole batches.
    seed : int
        Another seed, another order.
    shuffle : bool
        Shuffle units, and the rows of so many of them that follow each other; else rows come as stored.
    buffer_rows : int or None
        Rows that are shuffled together, in whole units, one at least; None for four units, at least 64 MiB of rows.
    streams : int
        Streams that units are dealt to in turn, each with windows of its own.
    """

    batch_rows: int
    seed: int
    shuffle: bool = True
    buffer_rows: int | None = None
    streams: int = 1

    def stretch_rows(self, dataset: Dataset) -> int:
        """Rows that are handed out together: whole batches, about a cache full."""
        return self.batch_rows * max(STRETCH_BYTES // (8 * dataset.n_columns * self.batch_rows), 1)

    @property
    def run(self) -> int:
        """Rows that stay neighbours, which memory likes: one, but for batches of more than 256."""
        return max(self.batch_rows // DRAWS, 1)

    def window_units(self, dataset: Dataset) -> int:
        """Units that are shuffled together; one where nothing is."""
        if not self.shuffle:
            return 1
        units = unit_spans(dataset, self.streams)
        wanted = self.buffer_rows or max(BUFFER_UNITS * most_rows(units), BUFFER_BYTES // dataset.row_bytes)
        return max(min(wanted // most_rows(units), -(-len(units) // self.streams)), 1)

    def windows(self, readers: int) -> int:
        """Windows in memory at once: the one that is used, and those that are read meanwhile."""
        return 2 if self.shuffle else 1 + readers

    def units(self, dataset: Dataset, epoch: int) -> Sequence[Span]:
        """Return the units in the order of an epoch."""
        units = unit_spans(dataset, self.streams)
        if not self.shuffle:
            return units
        return Picked(units, np.random.default_rng((self.seed, epoch)).permutation(len(units)))

    def stretches(
        self, dataset: Dataset, windows: Iterator[Window], prepare: Prepare, place: tuple[int, ...], start: Position = START
    ) -> Iterator[Stretch]:
        """Cut the windows of an epoch, and perhaps of one of its streams, which is their `place`, into stretches, in this order."""
        return stretches(windows, prepare, self.stretch_rows(dataset), start, (self.seed, *place) if self.shuffle else None)


@dataclass(frozen=True, slots=True)
class Even(Sequence[Span]):
    """The rows [0, `rows`) in units of `step` rows, the last perhaps shorter: two numbers, however many units there are."""

    rows: int
    step: int

    def __len__(self) -> int:
        return -(-self.rows // self.step)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return Span(number * self.step, min((number + 1) * self.step, self.rows))


@dataclass(frozen=True, slots=True)
class Picked(Sequence[Span]):
    """Some of the units, or all in another order, by their numbers."""

    units: Sequence[Span]
    numbers: Sequence[int] | NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: Any) -> Any:
        return self.units[int(self.numbers[number])]


def unit_spans(dataset: Dataset, streams: int = 1) -> Sequence[Span]:
    """Cut the rows into units of reading: one chunk, or as many small ones as make 4 MiB; one row of blocks of a Dask array.

    Where several streams would not get one each, fewer chunks make a unit.

    Where arrays have chunks of different heights, units end where chunks of all of them end, as long as that takes no more than
    16 MiB; else where chunks of the array with the longest rows end, and the others are decoded again where units share them.
    """
    if lazy := dataset.lazy:
        return block_spans(max(lazy, key=lambda rows: rows.row_bytes))
    chunk = max(dataset.arrays, key=lambda rows: rows.row_bytes).decoded_rows
    shared = lcm(*(rows.decoded_rows for rows in dataset.arrays))
    if shared * dataset.row_bytes <= BUFFER_BYTES // BUFFER_UNITS:
        chunk = shared
    together = min(UNIT_BYTES // (chunk * dataset.row_bytes), -(-dataset.stored_rows // chunk) // streams)
    return Even(dataset.stored_rows, chunk * max(together, 1))


def most_rows(units: Sequence[Span]) -> int:
    """Return the rows of the largest unit."""
    return min(units.step, units.rows) if isinstance(units, Even) else max(span.stop - span.start for span in units)
