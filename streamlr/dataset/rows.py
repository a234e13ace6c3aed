"""What the dataset asks of an array, wherever it lives; and arrays that are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import Span
from streamlr.errors import UnsupportedDtype

NUMERIC_KINDS = "biuf"


class Reader(Protocol):
    """Reads rows in order; holds the chunk it stands in, unless it reads parts, so that nothing is read or decoded twice."""

    chunks_missing: int

    def expect(self, spans: Sequence[Span]) -> None:
        """Hear that the rows of these spans are read next, in this order, and none after them that it is not told of."""
        ...

    def forget(self) -> None:
        """Let go of what is held, but for its memory, as if nothing had been read."""
        ...

    def read_into(self, out: NDArray[Any], start: int) -> None:
        """Fill `out` (m, c), of float64 or the stored dtype, with the rows start, ..., start + m - 1."""
        ...

    def view(self, start: int, stop: int) -> NDArray[Any] | None:
        """Return the rows [start, stop) where they lie as they are stored, valid until others are read, if that is in C order.

        None where it is not: `read_into` copies them.
        """
        ...


class Rows(Protocol):
    """Some columns of one array, of which `Reader`s can be made; small and picklable."""

    @property
    def label(self) -> str:
        """Name of the array, for messages."""
        ...

    @property
    def n_rows(self) -> int:
        """Rows of the array."""
        ...

    @property
    def n_columns(self) -> int:
        """Columns that are read."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Stored dtype."""
        ...

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk."""
        ...

    @property
    def decoded_rows(self) -> int:
        """Rows that are decoded together; 1 where rows can be had one by one."""
        ...

    @property
    def row_bytes(self) -> int:
        """Bytes to decode for one row."""
        ...

    @property
    def reader_bytes(self) -> int:
        """Most bytes that a reader holds at once."""
        ...

    def reader(self) -> Reader:
        """Return a reader of these rows."""
        ...

    def fingerprint(self, *, complete: bool = False) -> str:
        """Return a digest that changes when the rows may have changed; raise if they must be `complete` and a chunk is absent."""
        ...


def check_dtype(dtype: np.dtype[Any], label: str) -> None:
    """Raise unless `dtype` is one of real numbers that float64 can hold."""
    if dtype.kind not in NUMERIC_KINDS or dtype.itemsize > 8:
        advice = {
            "M": "convert times to numbers, for example seconds since a fixed moment",
            "m": "convert durations to numbers, for example seconds",
            "c": "split complex numbers into real and imaginary columns",
        }.get(dtype.kind, "code text and categories as numbers first, for example with `streamlr ingest --formula`")
        raise UnsupportedDtype(f"array {label!r} has dtype {dtype}; allowed are integers, bool and float16 to float64: {advice}")


def in_c_order(rows: NDArray[Any]) -> NDArray[Any] | None:
    """Return rows that lie in C order, as BLAS takes them; None for others."""
    return rows if rows.flags.c_contiguous and rows.flags.aligned else None


def plain_array(values: Any) -> NDArray[Any]:
    """Return an array in memory as a plain one; what a mask hides becomes NaN, so that it is missing and not a number.

    Examples
    --------
    >>> plain_array(np.ma.masked_equal([1, 2], 2))
    array([ 1., nan])
    """
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        return np.where(np.ma.getmaskarray(values), np.nan, values.data)
    return np.asarray(values)


@dataclass(frozen=True, slots=True)
class MemoryRows:
    """Columns of a NumPy array; the array's first row is row `offset` of the dataset."""

    array: NDArray[Any]
    label: str
    offset: int = 0

    def __post_init__(self) -> None:
        check_dtype(self.array.dtype, self.label)

    @property
    def n_rows(self) -> int:
        """Rows of the array."""
        return self.offset + int(self.array.shape[0])

    @property
    def n_columns(self) -> int:
        """Columns of the array."""
        return int(self.array.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the array."""
        return self.array.dtype

    @property
    def chunk_rows(self) -> int:
        """One row: spans of an array in memory may end anywhere."""
        return 1

    @property
    def decoded_rows(self) -> int:
        """One row."""
        return 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.n_columns * self.dtype.itemsize

    @property
    def reader_bytes(self) -> int:
        """Nothing is held but the array, which is there already."""
        return 0

    def reader(self) -> MemoryReader:
        """Return a reader of these rows."""
        return MemoryReader(self.array, self.offset)

    def fingerprint(self, *, complete: bool = False) -> str:
        """Return Dask's token of the array: a hash of its contents, which are all there."""
        from dask.base import tokenize

        return str(tokenize(self.array))


class MemoryReader:
    """Copies rows out of a NumPy array."""

    def __init__(self, array: NDArray[Any], offset: int) -> None:
        self.array = array
        self.offset = offset
        self.chunks_missing = 0

    def expect(self, spans: Sequence[Span]) -> None:
        """Do nothing: the rows are here."""

    def forget(self) -> None:
        """Do nothing: nothing is held."""

    def read_into(self, out: NDArray[Any], start: int) -> None:
        """Fill `out` with the rows from `start` on."""
        first = start - self.offset
        out[...] = self.array[first : first + len(out)]

    def view(self, start: int, stop: int) -> NDArray[Any] | None:
        """Return the rows [start, stop) of the array itself."""
        return in_c_order(self.array[start - self.offset : stop - self.offset])
