"""Parquet files, read block by block; their types are declared, so a column either is what was asked for or is refused at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.tables.ahead import one_ahead
from streamlr.dataset.tables.csv_files import LARGEST_INTEGER
from streamlr.dataset.tables.extras import load_extra
from streamlr.errors import BadCell, DataError, UnsupportedDtype


@dataclass(frozen=True, slots=True)
class ParquetFile:
    """A Parquet file.

    Attributes
    ----------
    path : Path
        The file.
    columns : tuple of str
        Names of its columns.
    numeric : frozenset of str
        Those that hold numbers or booleans.
    categorical : frozenset of str
        Those whose values can be levels: text, integers, booleans.
    """

    path: Path
    columns: tuple[str, ...]
    numeric: frozenset[str]
    categorical: frozenset[str]

    def blocks(
        self, numbers: Sequence[str], texts: Sequence[str], block_bytes: int
    ) -> Iterator[tuple[dict[str, NDArray[np.float64]], dict[str, Any]]]:
        """Iterate over blocks of rows: number columns (NaN where missing) and text columns (Arrow, null where missing).

        Raises
        ------
        UnsupportedDtype
            A column is of a type that cannot be read as asked.
        BadCell
            An integer that float64 cannot hold.
        DataError
            The file is damaged.
        """
        pa = load_extra("pyarrow")
        names = list(dict.fromkeys([*numbers, *texts]))
        n_rows = max(1, block_bytes // (8 * max(1, len(names))))
        with _opened(self.path) as file:
            for name in names:
                found = file.schema_arrow.field(name).type
                if name in numbers and name not in self.numeric:
                    raise UnsupportedDtype(
                        f"{self.path}: column {name!r} is of type {found}, but numbers are expected; convert it, "
                        f"or write C({name}) in a formula if it holds categories"
                    )
                if name in texts and name not in self.categorical:
                    raise UnsupportedDtype(
                        f"{self.path}: column {name!r} is of type {found}, but categories are text, integer or boolean; convert it"
                    )
            start = 0
            for block in one_ahead(file.iter_batches(batch_size=n_rows, columns=names)):
                for name in numbers:
                    self._refuse_large_integers(name, block.column(name), start)
                number_columns = {name: block.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False) for name in numbers}
                yield number_columns, {name: block.column(name).cast(pa.string()) for name in texts}
                start += block.num_rows

    def _refuse_large_integers(self, name: str, column: Any, start: int) -> None:
        if not load_extra("pyarrow.types").is_integer(column.type):
            return
        extremes = load_extra("pyarrow.compute").min_max(column).as_py()
        if extremes["min"] is None or -LARGEST_INTEGER <= extremes["min"] <= extremes["max"] <= LARGEST_INTEGER:
            return
        index = next(i for i, value in enumerate(column.to_pylist()) if value is not None and abs(value) > LARGEST_INTEGER)
        raise BadCell(
            f"{self.path}, row {start + index + 1}, column {name!r}: got {column[index]}, an integer beyond 2**53, which float64 "
            "may not hold exactly; leave the column out, or store it as floating point where that loss does no harm"
        )


def read_schema(path: Path) -> ParquetFile:
    """Open a Parquet file and read the names and types of its columns.

    Raises
    ------
    DataError
        It is damaged.
    """
    types = load_extra("pyarrow.types")
    both = (types.is_integer, types.is_boolean, types.is_null)
    number_tests = (*both, types.is_floating, types.is_decimal)
    category_tests = (*both, types.is_string, types.is_large_string, types.is_string_view)
    with _opened(path) as file:
        kinds = {field.name: field.type for field in file.schema_arrow}
        columns = tuple(file.schema_arrow.names)
    numeric = frozenset(name for name, kind in kinds.items() if any(test(kind) for test in number_tests))
    values = {name: kind.value_type if types.is_dictionary(kind) else kind for name, kind in kinds.items()}
    categorical = frozenset(name for name, kind in values.items() if any(test(kind) for test in category_tests))
    return ParquetFile(path, columns, numeric, categorical)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    pa, parquet = load_extra("pyarrow"), load_extra("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}; fetch or write the file again") from error
