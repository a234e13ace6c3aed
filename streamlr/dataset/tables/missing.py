"""Rows with missing or infinite cells: an error that says where, or left out and counted; none goes on unseen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from streamlr.dataset.tables.batches import Batch, Table, read_batches
from streamlr.errors import BadCell, NoRows

Missing = Literal["error", "drop"]


@dataclass(slots=True)
class RowCounts:
    """What a pass over tables has read so far, and what it left out.

    Attributes
    ----------
    read, dropped : int
        Rows seen, and rows left out of them.
    by_column : dict of str to int
        In how many rows each column was missing; a row may miss several.
    """

    read: int = 0
    dropped: int = 0
    by_column: dict[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Rows that were not left out."""
        return self.read - self.dropped

    def __add__(self, other: RowCounts) -> RowCounts:
        """Return what was read and left out in two passes over different tables."""
        columns = dict.fromkeys([*self.by_column, *other.by_column])
        both = {name: self.by_column.get(name, 0) + other.by_column.get(name, 0) for name in columns}
        return RowCounts(self.read + other.read, self.dropped + other.dropped, both)


def complete_rows(
    tables: Sequence[Table], numbers: Sequence[str], texts: Sequence[str], missing: Missing, counts: RowCounts
) -> Iterator[Batch]:
    """Iterate over the rows of all tables in which no cell is missing.

    Parameters
    ----------
    tables : sequence of Table
        Read in this order.
    numbers, texts : sequence of str
        The columns to read.
    missing : "error" or "drop"
        Whether to stop at the first row with a missing cell, or to leave such rows out.
    counts : RowCounts
        Brought up to date before each batch.

    Raises
    ------
    BadCell
        A cell is missing (with "error") or infinite, or cannot be read.
    NoRows
        No complete row was found.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from streamlr.dataset.tables.batches import open_table
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name) / "t.csv"
    >>> _ = path.write_text("x,kind\\n1,a\\nNA,b\\n")
    >>> counts = RowCounts()
    >>> [batch.numbers["x"].tolist() for batch in complete_rows([open_table(path)], ["x"], [], "drop", counts)], counts.by_column
    ([[1.0]], {'x': 1})
    >>> folder.cleanup()
    """
    yield from kept_rows(tables, numbers, texts, missing, counts)
    check_rows_left(tables, counts)


def kept_rows(
    tables: Sequence[Table], numbers: Sequence[str], texts: Sequence[str], missing: Missing, counts: RowCounts
) -> Iterator[Batch]:
    """Iterate as `complete_rows` does over tables that may be a part of all, of which no row need be left."""
    for table in tables:
        for batch in read_batches(table, numbers=numbers, texts=texts):
            absent = {name: np.isnan(column) for name, column in batch.numbers.items()}
            absent |= {name: column.is_null().to_numpy(zero_copy_only=False) for name, column in batch.texts.items()}
            incomplete = np.logical_or.reduce(list(absent.values()))
            if missing == "error" and incomplete.any():
                row = int(incomplete.argmax())
                where = batch.place(row, next(name for name, mask in absent.items() if mask[row]))
                raise BadCell(
                    f"{where}: the cell is missing; fill it in, or leave such rows out by missing='drop' (--missing drop)"
                )
            _refuse_infinities(batch)
            for name, mask in absent.items():
                if mask.any():
                    counts.by_column[name] = counts.by_column.get(name, 0) + int(mask.sum())
            counts.read += len(incomplete)
            counts.dropped += int(incomplete.sum())
            kept = batch.keep(~incomplete) if incomplete.any() else batch
            if len(kept.rows):
                yield kept


def check_rows_left(tables: Sequence[Table], counts: RowCounts) -> None:
    """Raise `NoRows` where all rows of all tables were left out."""
    if counts.read == counts.dropped:
        columns = ", ".join(f"{name!r} in {count:,}" for name, count in counts.by_column.items())
        reason = f"all {counts.read:,} rows miss a cell ({columns})" if counts.read else "there is a header and nothing below it"
        raise NoRows(f"no row is left of {', '.join(str(table.path) for table in tables[:3])}: {reason}")


def _refuse_infinities(batch: Batch) -> None:
    for name, column in batch.numbers.items():
        infinite = np.isinf(column)
        if infinite.any():
            row = int(infinite.argmax())
            raise BadCell(
                f"{batch.place(row, name)}: got {column[row]}; every number must be finite: mend the cell or leave out the row"
            )
