"""Tables on disk, read block by block: CSV (plain, gzip, zip) and Parquet, with the place of every cell kept for errors.

What a column holds is decided by whoever asks for it, never guessed from the first block: a number column is read as float64 and
a text column as text in every file. So an integer that turns into a fraction later is no event, and a word among numbers is always
an error.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.tables.csv_files import MISSING, CsvFile, is_number, read_header
from streamlr.dataset.tables.parquet_files import ParquetFile, read_schema
from streamlr.errors import DataError, PathNotFound, UsageError

Table = CsvFile | ParquetFile
BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows of one table.

    Attributes
    ----------
    table : Table
        Where they come from.
    rows : (m,) int64
        Their numbers in that table, the first row being 0.
    numbers : dict of str to (m,) float64
        Number columns; NaN where no value is.
    texts : dict of str to pyarrow.Array of strings
        Text columns; null where no value is.
    """

    table: Table
    rows: NDArray[np.int64]
    numbers: dict[str, NDArray[np.float64]]
    texts: dict[str, Any]

    def keep(self, mask: NDArray[np.bool_]) -> Batch:
        """Return the rows where `mask` is True."""
        numbers = {name: column[mask] for name, column in self.numbers.items()}
        return Batch(self.table, self.rows[mask], numbers, {name: column.filter(mask) for name, column in self.texts.items()})

    def place(self, index: int, column: str) -> str:
        """Say, for an error, where a cell of row `index` of this batch stands: file, line (in Parquet: row, from 1), column."""
        row = int(self.rows[index])
        if isinstance(self.table, ParquetFile):
            return f"{self.table.path}, row {row + 1}, column {column!r}"
        return f"{self.table.path}, line {self.table.line(row)}, column {column!r}"


def open_table(path: str | os.PathLike[str]) -> Table:
    """Read the column names of a CSV or Parquet file.

    Parameters
    ----------
    path : path
        A CSV file in UTF-8 with a header and commas; the same packed by gzip, or alone in a zip file; or a Parquet file. What it is
        shows in its first bytes, whatever it is called.

    Raises
    ------
    PathNotFound, UsageError
        There is no such file, or it is a folder.
    DataError
        It may not be read, is empty, damaged or in another format, or two columns share a name.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name) / "t.csv"
    >>> _ = path.write_text("x,kind\\n1,a\\n2.5,b\\n")
    >>> open_table(path).columns
    ('x', 'kind')
    >>> folder.cleanup()
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name the CSV or Parquet files in it")
        if not path.exists():
            raise PathNotFound(f"no file at {path}; check the path")
        with path.open("rb") as file:
            start = file.read(4)
    except PermissionError as error:
        raise DataError(f"{path} may not be read: {error.strerror}; ask for permission to read it") from error
    table: Table
    if start == b"PAR1":
        table = read_schema(path)
    elif start == b"PK\x03\x04":
        table = read_header(path, "zip")
    else:
        table = read_header(path, "gzip" if start.startswith(b"\x1f\x8b") else None)
    repeated = sorted(name for name, count in Counter(table.columns).items() if count > 1)
    if repeated:
        raise DataError(f"{path} has several columns named {repeated[0]!r}; give each column a name of its own")
    return table


def read_batches(
    table: Table, *, numbers: Sequence[str] = (), texts: Sequence[str] = (), block_bytes: int = BLOCK_BYTES
) -> Iterator[Batch]:
    """Iterate over the rows of a table, a block at a time.

    Parameters
    ----------
    table : Table
        From `open_table`.
    numbers, texts : sequence of str
        Columns to read as float64, and columns to read as text; a column may be in both.
    block_bytes : int
        Bytes read at once; no row may be longer.

    Raises
    ------
    BadCell
        A cell does not hold what was asked for, or a row has too few or too many cells; says file, line and column.
    UnsupportedDtype
        A Parquet column is of a type that is neither.
    DataError
        The file is damaged.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name) / "t.csv"
    >>> _ = path.write_text("x,kind\\n1,a\\n2.5,b\\n")
    >>> for batch in read_batches(open_table(path), numbers=["x"], texts=["kind"]):
    ...     print(batch.numbers["x"].tolist(), batch.texts["kind"].to_pylist())
    [1.0, 2.5] ['a', 'b']
    >>> folder.cleanup()
    """
    start = 0
    for number_columns, text_columns in table.blocks(numbers, texts, block_bytes):
        length = len(next(iter((number_columns | text_columns).values())))
        yield Batch(table, np.arange(start, start + length, dtype=np.int64), number_columns, text_columns)
        start += length


def wordy_columns(table: Table, names: Sequence[str], *, n_rows: int = 1000) -> list[str]:
    """Return those columns among `names` that hold no numbers: by their types, or in a CSV file by its first rows."""
    if isinstance(table, ParquetFile):
        return [name for name in names if name not in table.numeric]
    filled: set[str] = set()
    numeric: set[str] = set()
    for _, (_, cells) in zip(range(n_rows), table.records(), strict=False):
        for name, cell in zip(table.columns, cells, strict=False):
            if name not in numeric and cell not in MISSING:
                filled.add(name)
                if is_number(cell):
                    numeric.add(name)
    return [name for name in names if name in filled and name not in numeric]
