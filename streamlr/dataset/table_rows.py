"""Rows of tables, coded and written to a store: by this process, one file after another, or by whoever else can."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.row_store import RowStoreWriter
from streamlr.dataset.tables.batches import Batch, Table
from streamlr.dataset.tables.coding import Coder, Coding
from streamlr.dataset.tables.levels import Progress, collect_levels
from streamlr.dataset.tables.missing import Missing, RowCounts, complete_rows
from streamlr.errors import BadCell


@dataclass(frozen=True, slots=True)
class TableRows:
    """What rows of a store are made of: a coding, with or without its targets, and what is done about missing cells."""

    coding: Coding
    with_targets: bool
    missing: Missing

    @property
    def numbers(self) -> list[str]:
        """The number columns that are read."""
        targets = self.coding.target_columns if self.with_targets else ()
        return list(dict.fromkeys([*targets, *self.coding.numbers, *([self.weights] if self.weights else [])]))

    @property
    def weights(self) -> str | None:
        """The column of weights, where there is one."""
        return self.coding.weights if self.with_targets else None

    def writer(self, path: Path, rows_per_chunk: int | None, first_row: int | None = None) -> RowStoreWriter:
        """Return a writer of such rows; see there."""
        coding, weights = self.coding, self.weights is not None
        targets = coding.targets if self.with_targets else ()
        return RowStoreWriter(
            path, features=coding.features, targets=targets, weights=weights, rows_per_chunk=rows_per_chunk, first_row=first_row
        )

    def write(self, writer: RowStoreWriter, batches: Iterator[Batch], first: int = 0, stop: int = sys.maxsize) -> Iterator[None]:
        """Write those rows of batches that have the numbers [first, stop), counted from 0; yield after each batch."""
        coder, before = Coder(self.coding, with_targets=self.with_targets), 0
        for batch in batches:
            low, high = (min(max(row - before, 0), len(batch.rows)) for row in (first, stop))
            before += len(batch.rows)
            if low < high:
                coded = coder.code(batch)
                weights = None if self.weights is None else _weights(batch, self.weights)
                for part, room in writer.room(high - low):
                    rows = slice(part.start + low, part.stop + low)
                    if "y" in room:
                        coded.write_y(room["y"].reshape(-1, len(self.coding.targets)), rows)
                    coded.write_x(room["X"], rows)
                    if weights is not None:
                        room["weights"][:] = weights[rows]
            yield
            if before >= stop:
                return


class Reading(Protocol):
    """How tables are read, and their rows written to a store: here, or by others."""

    def levels(
        self, tables: Sequence[Table], categories: Sequence[str], others: Sequence[str], missing: Missing, progress: Progress | None
    ) -> tuple[dict[str, list[str]], int]:
        """Return what `collect_levels` does."""
        ...

    def write(self, writer: RowStoreWriter, rows: TableRows, tables: Sequence[Table], progress: Progress | None) -> RowCounts:
        """Write all rows to a store that another finishes; return what was read and left out."""
        ...


class OneAfterAnother:
    """Tables are read in order, in this process."""

    def levels(
        self, tables: Sequence[Table], categories: Sequence[str], others: Sequence[str], missing: Missing, progress: Progress | None
    ) -> tuple[dict[str, list[str]], int]:
        """Return what `collect_levels` does."""
        return collect_levels(tables, categories, others, missing, progress)

    def write(self, writer: RowStoreWriter, rows: TableRows, tables: Sequence[Table], progress: Progress | None) -> RowCounts:
        """Write all rows, as they come."""
        counts = RowCounts()
        for _ in rows.write(writer, complete_rows(tables, rows.numbers, list(rows.coding.levels), rows.missing, counts)):
            if progress is not None:
                progress("rows", counts.read)
        return counts


def _weights(batch: Batch, name: str) -> NDArray[np.float64]:
    weights = batch.numbers[name]
    if (weights < 0).any():
        row = int((weights < 0).argmax())
        raise BadCell(f"{batch.place(row, name)}: got the weight {weights[row]}; weights are zero or positive: mend the cell")
    return weights
