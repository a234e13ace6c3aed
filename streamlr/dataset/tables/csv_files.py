"""CSV files, plain or compressed, read block by block by Arrow; the standard library finds the line when a cell is wrong."""

from __future__ import annotations

import csv
import gzip
import io
import re
import time
import zipfile
import zlib
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.tables.ahead import one_ahead
from streamlr.dataset.tables.extras import load_extra
from streamlr.errors import BadCell, DataError

MISSING = ("", "NA", "NaN", "nan", "null", "NULL")  # the cells that stand for no value
LARGEST_INTEGER = 2**53  # beyond it, float64 skips integers
CACHED_BYTES = 2**20  # Arrow reads a quarter faster by blocks that stay in the processor's cache
CELLS_AT_ONCE = 2**13  # but many columns should not come a few rows at a time
LETTING_GO = 0.05  # seconds, in which Arrow's thread gets the interpreter's lock once more, to let go of what it has read
NUMERAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_NOT_FINITE = re.compile(r"[+-]?(inf(inity)?|nan(\(\w*\))?)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CsvFile:
    """A CSV file in UTF-8, with a header and commas.

    Attributes
    ----------
    path : Path
        The file.
    compression : "gzip", "zip" or None
        How it is packed; a zip file holds it alone.
    columns : tuple of str
        The header; empty while it has not been read.
    """

    path: Path
    compression: Literal["gzip", "zip"] | None
    columns: tuple[str, ...] = ()

    def blocks(
        self, numbers: Sequence[str], texts: Sequence[str], block_bytes: int
    ) -> Iterator[tuple[dict[str, NDArray[np.float64]], dict[str, Any]]]:
        """Iterate over blocks of rows: number columns (NaN where missing) and text columns (Arrow, null where missing).

        Raises
        ------
        BadCell
            At the first block with a cell or row that is not as expected, or with an integer that float64 cannot hold; says
            file, line and column.
        DataError
            The compressed file is damaged.
        """
        pa = load_extra("pyarrow")
        unchecked, n_read = set(numbers), 0
        narrow = max(CACHED_BYTES, CELLS_AT_ONCE * len(self.columns))
        for size in sorted({min(narrow, block_bytes), block_bytes}):
            try:
                for block in one_ahead(self._rows_after(n_read, numbers, texts, size)):
                    number_columns = {name: _as_numbers(pa, block.column(name)) for name in numbers}
                    large = {name for name in unchecked if (np.abs(number_columns[name]) >= LARGEST_INTEGER).any()}
                    if large:
                        _refuse_rounded_integers(self, large, block_bytes)
                        unchecked -= large
                    yield number_columns, {name: block.column(name) for name in texts}
                    n_read += len(block)
                return
            except _OddQuotes:
                _raise_first_bad_cell(self, numbers, texts)
                return
            except pa.ArrowInvalid as error:  # perhaps a row that is longer than a small block: again with a large one
                if size == block_bytes:
                    _raise_first_bad_cell(self, numbers, texts)
                    raise BadCell(
                        f"{self.path} cannot be read as CSV: {error}; rows may have at most {block_bytes:,} bytes"
                    ) from error

    def _rows_after(
        self, n_rows: int, numbers: Sequence[str], texts: Sequence[str], block_bytes: int
    ) -> Generator[Any, None, None]:
        """Iterate over the record batches of Arrow, passing over the first `n_rows` rows."""
        pa, arrow_csv = load_extra("pyarrow"), load_extra("pyarrow.csv")
        types = {name: pa.float64() for name in numbers} | {name: pa.string() for name in texts}
        with _opened(self) as file:
            watched = _CountsQuotes(file)
            try:
                with arrow_csv.open_csv(
                    watched,
                    read_options=arrow_csv.ReadOptions(block_size=block_bytes),
                    # in a file of one column an empty line is a missing value; elsewhere it is nothing
                    parse_options=arrow_csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=len(self.columns) > 1),
                    convert_options=arrow_csv.ConvertOptions(
                        column_types=types, include_columns=list(types), null_values=list(MISSING), strings_can_be_null=True
                    ),
                ) as reader:
                    for block in reader:
                        passed = min(n_rows, len(block))
                        n_rows -= passed
                        if passed < len(block):
                            yield block.slice(passed)
            except BaseException:
                # Arrow reads ahead in a thread of its own, for which nobody waits, and a thread of C++ that asks for the lock of an
                # interpreter that ends aborts the process
                reader = None  # which a traceback would keep until then
                watched.stop()
                raise
        if watched.quotes % 2:
            raise _OddQuotes

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """Iterate over the rows by the standard library, slowly: the line on which each starts, and its cells."""
        lines = _lines(self)
        next(lines)
        return lines

    def line(self, row: int) -> int | None:
        """Return the line on which a row starts, counting rows from 0 and lines from 1; None if the file has lost it since."""
        return next((line for number, (line, _) in enumerate(self.records()) if number == row), None)


def read_header(path: Path, compression: Literal["gzip", "zip"] | None) -> CsvFile:
    """Open a CSV file and read its column names.

    Parameters
    ----------
    path : Path
        The file.
    compression : "gzip", "zip" or None
        How it is packed.

    Raises
    ------
    DataError
        It is empty, damaged, or not a CSV file in UTF-8.
    """
    file = CsvFile(path, compression)
    with _opened(file) as stream:
        start = stream.read(2)
    if start in (b"b'", b'b"'):
        raise BadCell(f"{path} starts with {start.decode()}: it is a printed Python bytes object, not CSV; fetch the file again")
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise BadCell(f"{path} is in UTF-16; save it as UTF-8")
    line, names = next(_lines(file), (0, []))
    if not names:
        raise DataError(f"{path} is empty; a CSV file starts with a line of column names")
    if any(_undecodable(name) for name in names):
        raise BadCell(f"{path}, line {line}: the header is not UTF-8; save the file as UTF-8")
    if len(names) == 1 and ";" in names[0]:
        raise BadCell(f"{path}, line {line}: the columns are separated by ';'; save the file with commas, and decimal points")
    return CsvFile(path, compression, tuple(names))


def is_number(cell: str) -> bool:
    """Tell whether a cell reads as a number, an infinity or a NaN.

    Examples
    --------
    >>> [is_number(cell) for cell in ("1.5", " -2e3", "inf", "1,5", "0x10", "")]
    [True, True, True, False, False, False]
    """
    cell = cell.strip(" \t")
    return bool(NUMERAL.fullmatch(cell) or _NOT_FINITE.fullmatch(cell))


class _OddQuotes(Exception):
    """All was read, but one quote has no other: it may have swallowed rows."""


class _CountsQuotes(io.RawIOBase):
    """A file that counts its quotes: Arrow does not mind one that is never closed, though it swallows the rows that follow."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._reading = Lock()
        self.quotes = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        with self._reading:
            data: bytes = self._file.read(size)
            self.quotes += data.count(b'"')
        return data

    def stop(self) -> None:
        """Wait for whoever is reading, and be at the end of the file for all who ask later."""
        with self._reading:
            self._file = io.BytesIO()
        time.sleep(LETTING_GO)


@contextmanager
def _opened(file: CsvFile) -> Iterator[Any]:
    """Open the bytes of a CSV file, unpacked as they are read."""
    try:
        if file.compression == "zip":
            with zipfile.ZipFile(file.path) as archive, archive.open(_only_member(archive, file.path)) as member:
                yield member
        else:
            with gzip.open(file.path) if file.compression == "gzip" else file.path.open("rb") as stream:
                yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise DataError(f"{file.path} is damaged: {error}; fetch or write the file again") from error


def _only_member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    members = [member for member in archive.infolist() if member.filename.lower().endswith(".csv")]
    members = [member for member in members if not member.filename.startswith("__MACOSX/")]
    if len(members) != 1 or members[0].flag_bits & 1:
        found = "an encrypted one" if len(members) == 1 else str(len(members))
        raise DataError(f"{path} should hold one .csv file, not encrypted; it holds {found}: unpack it and name the files")
    return members[0]


def _as_numbers(pa: Any, column: Any) -> NDArray[np.float64]:
    if column.type == pa.string():  # asked for as text as well
        column = load_extra("pyarrow.compute").utf8_trim(column, " \t").cast(pa.float64())
    numbers: NDArray[np.float64] = column.to_numpy(zero_copy_only=False)
    return numbers


def _lines(file: CsvFile) -> Iterator[tuple[int, list[str]]]:
    """Iterate over header and rows by the standard library, passing over empty lines as Arrow does."""
    with _opened(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, strict=True)
        line = 1
        try:
            for cells in reader:
                if cells:
                    yield line, cells
                elif len(file.columns) == 1:
                    yield line, [""]
                line = reader.line_num + 1
        except csv.Error as error:
            raise BadCell(f"{file.path}, line {line}: not CSV ({error}); look for a quote that is never closed") from error
        finally:
            text.detach()


def _raise_first_bad_cell(file: CsvFile, numbers: Collection[str], texts: Collection[str]) -> None:
    """Read the file again and raise BadCell at the first cell that is not what it should be, if there is one."""
    width = len(file.columns)
    for line, cells in file.records():
        where = f"{file.path}, line {line}"
        if len(cells) != width:
            last = f", column {file.columns[len(cells)]!r} is not there" if len(cells) < width else ""
            raise BadCell(f"{where}{last}: got {len(cells)} cells, but the header has {width}; quote cells that hold commas")
        for name, cell in zip(file.columns, cells, strict=True):
            if name in numbers and cell not in MISSING and not is_number(cell):
                raise BadCell(
                    f"{where}, column {name!r}: got {_shown(cell)}, but a number is expected, with a decimal point and no other "
                    f"separator, or {', '.join(map(repr, MISSING))} for no value; mend the cell, or write C({name}) in a formula "
                    "if the column holds categories"
                )
            if name in texts and _undecodable(cell):
                raise BadCell(f"{where}, column {name!r}: got bytes that are not UTF-8; save the file as UTF-8")


def _refuse_rounded_integers(file: CsvFile, names: Collection[str], block_bytes: int) -> None:
    """Read columns again, as text, and raise BadCell at the first integer that float64 does not hold.

    It is done once for a column, if it holds a large number at all: as text, 12345678901234567 tells from 12345678901234567.0.
    """
    compute, start = load_extra("pyarrow.compute"), 0
    for _, columns in file.blocks((), sorted(names), block_bytes):
        for name, column in columns.items():
            long = compute.match_substring_regex(column, r"^[ \t]*[+-]?[0-9]{16,}[ \t]*$").fill_null(False)
            for index in np.flatnonzero(long.to_numpy(zero_copy_only=False)):
                cell = column[int(index)].as_py()
                if float(cell) != Decimal(cell.strip()):
                    where = f"{file.path}, line {file.line(start + int(index))}, column {name!r}"
                    raise BadCell(
                        f"{where}: got {_shown(cell)}, an integer beyond 2**53, which float64 does not hold exactly; leave the "
                        "column out, or write it with a decimal point where that loss does no harm"
                    )
        start += len(column)


def _undecodable(cell: str) -> bool:
    return not cell.isascii() and any("\udc80" <= character <= "\udcff" for character in cell)


def _shown(cell: str) -> str:
    return repr(cell if len(cell) <= 60 else cell[:57] + "...")
