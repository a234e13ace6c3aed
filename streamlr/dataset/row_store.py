"""A store of rows, written a chunk at a time: zarr v3, each chunk ended by its checksum, unfinished until it is sealed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numcodecs
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from streamlr.dataset.integrity import ATTRIBUTE, CHECKSUM_BYTES, chunk_key, seal
from streamlr.errors import Cancelled, NoRows, UsageError

CHUNK_BYTES = 16 * 2**20
LEAST_ROWS, MOST_ROWS = 2**10, 2**20  # by default; where columns are many, CHUNK_BYTES allows fewer
LARGEST_CHUNK_BYTES = 2**31 - 1
COMPRESSION_LEVEL = 1

Rows = dict[str, NDArray[np.float64]]  # by the name of the array


class RowStoreWriter:
    """Append rows to a new store; `finish` seals it. Before that, whoever reads the store finds that it is unfinished.

    A thread compresses and writes one chunk while the next is filled, and that one too is written while the first still is: two
    chunks are held. The end of a `with` block waits for the thread, so that nothing is written to the store after it.

    Parameters
    ----------
    path : path
        Where to make the zarr group; nothing may be there. Within `streamlr.files.publish`, it appears only when whole.
    features, targets : sequence of str
        Names of the columns of X and y. No targets: the store holds X alone.
    weights : bool
        Whether each row comes with a weight.
    rows_per_chunk : int, optional
        Rows in a chunk of every array. Default: `default_rows_per_chunk`, or fewer when all rows fit in less.
    first_row : int, optional
        Where in a store that another writer began, and will finish, rows are to be written: at the start of a chunk.

    Raises
    ------
    UsageError
        No feature, or chunks of no rows or too many bytes.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> with RowStoreWriter(Path(folder.name) / "rows.zarr", features=["a", "b"], targets=["y"]) as writer:
    ...     writer.append(np.ones((3, 2)), np.arange(3.0))
    ...     writer.finish()
    >>> zarr.open_group(Path(folder.name) / "rows.zarr", mode="r")["y"][:].tolist()
    [0.0, 1.0, 2.0]
    >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        features: Sequence[str],
        targets: Sequence[str] = (),
        weights: bool = False,
        rows_per_chunk: int | None = None,
        first_row: int | None = None,
    ) -> None:
        if not features:
            raise UsageError("a store needs at least one feature column; name one")
        n_columns = max(len(features), len(targets))
        check_rows_per_chunk(rows_per_chunk, n_columns)
        self.path = Path(path)
        self._features, self._targets = list(features), list(targets)
        self._given_rows, self._joins = rows_per_chunk, first_row is not None
        self.rows_per_chunk = rows_per_chunk or default_rows_per_chunk(n_columns)
        self.n_rows = 0
        shapes: dict[str, tuple[int, ...]] = {"X": (len(features),)}
        if targets:
            shapes["y"] = () if len(targets) == 1 else (len(targets),)
        if weights:
            shapes["weights"] = ()
        self._buffers: Rows = {name: np.empty((self.rows_per_chunk, *shape), "<f8") for name, shape in shapes.items()}
        self._spare: Rows = {}
        self._filled = 0
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._thread = ThreadPoolExecutor(1, "streamlr-chunk-writer")
        self._writing: Future[None] | None = None
        if first_row is None:
            self._group = zarr.create_group(str(self.path), zarr_format=3, attributes={ATTRIBUTE: {"complete": False}})
        else:
            self.n_rows = first_row
            try:
                self._group = zarr.open_group(str(self.path), mode="r")
                there = dict(self._group.arrays())
                self._arrays = {name: there[name] for name in shapes}
            except (FileNotFoundError, KeyError) as error:
                raise self._removed() from error

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk of every array."""
        return sum(buffer[: self.rows_per_chunk].nbytes for buffer in self._buffers.values())

    def append(
        self, x: NDArray[np.float64], y: NDArray[np.float64] | None = None, weights: NDArray[np.float64] | None = None
    ) -> None:
        """Add m rows, however many.

        Parameters
        ----------
        x : (m, p) float64
            Features.
        y : (m,) or (m, k) float64, optional
            Targets, when the store has any.
        weights : (m,) float64, optional
            Weights, when the store has them.
        """
        given = {"X": x, "y": y, "weights": weights}
        rows = {
            name: np.reshape(array, (len(x), *self._buffers[name].shape[1:])) for name, array in given.items() if array is not None
        }
        if rows.keys() != self._buffers.keys():
            raise UsageError(f"this store takes {', '.join(self._buffers)}, but rows came with {', '.join(rows)}")
        for part, room in self.room(len(x)):
            for name, buffer in room.items():
                buffer[:] = rows[name][part]

    def room(self, n_rows: int) -> Iterator[tuple[slice, Rows]]:
        """Add rows that are made in their place: iterate over room for `n_rows`, to be filled before the next is asked for.

        Yields
        ------
        slice
            Which of the rows.
        dict of str to array
            For each array of the store, where these rows are to be written.
        """
        start = 0
        while start < n_rows:
            stop = min(n_rows, start + self.rows_per_chunk - self._filled)
            filled = self._filled + stop - start
            yield slice(start, stop), {name: buffer[self._filled : filled] for name, buffer in self._buffers.items()}
            start, self._filled = stop, filled
            if filled == self.rows_per_chunk:
                self._hand_over()

    def finish(self, *, coding: Mapping[str, Any] | None = None, counts: Mapping[str, Any] | None = None) -> None:
        """Write the last rows, then the manifest and the success marker.

        Parameters
        ----------
        coding, counts : mapping, optional
            JSON values for the seal: how tables were coded, and how many rows were read and dropped.

        Raises
        ------
        NoRows
            Nothing was appended.
        """
        if not self.n_rows and not self._filled:
            raise NoRows(f"no row was given to write to {self.path}")
        if not self.n_rows:
            self._shrink(self._filled)
        self.flush()
        for array in self._arrays.values():
            array.resize((self.n_rows, *array.shape[1:]))
        seal(self.path, features=self._features, targets=self._targets, coding=coding or {}, counts=counts or {})

    def share(self, n_rows: int) -> None:
        """Leave the writing of so many rows to other writers of this store, each from a `first_row` on; then `finish`."""
        self._shrink(n_rows)
        self._arrays = {name: self._create(name, buffer.shape[1:]) for name, buffer in self._buffers.items()}
        self.n_rows = n_rows

    def flush(self) -> None:
        """Write the last rows, and wait until they are written."""
        if self._filled:
            self._hand_over()
        self._wait()
        self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _shrink(self, n_rows: int) -> None:
        """Make chunks smaller where nobody said how large, and all rows fit in less."""
        if self._given_rows is None:
            self.rows_per_chunk = min(self.rows_per_chunk, max(LEAST_ROWS, 1 << (n_rows - 1).bit_length()))

    def _hand_over(self) -> None:
        """Have the chunk written, by the thread if it is free, else here and now: compressing takes longer than coding."""
        if not self._arrays:
            self._arrays = {name: self._create(name, buffer.shape[1:]) for name, buffer in self._buffers.items()}
        chunks = {name: buffer[: self.rows_per_chunk] for name, buffer in self._buffers.items()}
        number, filled = self.n_rows // self.rows_per_chunk, self._filled
        self.n_rows, self._filled = self.n_rows + filled, 0
        if self._writing is not None and not self._writing.done():
            self._write(number, filled, chunks)
            return
        self._wait()
        self._writing = self._thread.submit(self._write, number, filled, chunks)
        self._spare = self._spare or {name: np.empty_like(buffer) for name, buffer in self._buffers.items()}
        self._buffers, self._spare = self._spare, self._buffers

    def _wait(self) -> None:
        """Wait for the chunk that is being written; raise what went wrong with it."""
        if self._writing is not None:
            self._writing.result()

    def _write(self, number: int, n_rows: int, chunks: Rows) -> None:
        """Write a chunk of every array as zarr would by the codecs of `_create`, which takes several copies and several threads."""
        for name, chunk in chunks.items():
            chunk[n_rows:] = np.nan
            path = self.path / chunk_key(self._arrays[name], (number, *(0 for _ in chunk.shape[1:])))
            for folder in reversed(path.relative_to(self.path / name).parents[:-1]):
                self._make(self.path / name / folder)
            stored = numcodecs.Zstd(level=COMPRESSION_LEVEL).encode(chunk)
            beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}") if self._joins else path
            with beside.open("xb") as file:
                file.write(stored)
                file.write(google_crc32c.value(stored).to_bytes(CHECKSUM_BYTES, "little"))
            if self._joins:  # perhaps another was killed while it wrote this chunk
                beside.replace(path)

    def _make(self, folder: Path) -> None:
        """Make a folder within one that must be there: of a store that was given up, and removed, nothing is to come again."""
        try:
            folder.mkdir(exist_ok=True)
        except FileNotFoundError as error:
            raise self._removed() from error

    def _removed(self) -> Cancelled:
        return Cancelled(f"{self.path} was removed while it was written; nothing is left of it")

    def _create(self, name: str, shape: tuple[int, ...]) -> zarr.Array[Any]:
        array: zarr.Array[Any] = self._group.create_array(
            name,
            shape=(0, *shape),
            chunks=(self.rows_per_chunk, *shape),
            dtype="float64",
            compressors=[ZstdCodec(level=COMPRESSION_LEVEL), Crc32cCodec()],
            fill_value=np.nan,  # should a chunk ever be lost, nobody takes the gap for numbers
            dimension_names=("row", "feature" if name == "X" else "target")[: 1 + len(shape)],
            config={"write_empty_chunks": True},
        )
        return array


def default_rows_per_chunk(n_columns: int) -> int:
    """Return the rows in a chunk of about 16 MB of X, or of y if that is wider: a power of two, at most 1,048,576.

    Examples
    --------
    >>> default_rows_per_chunk(23), default_rows_per_chunk(1), default_rows_per_chunk(100_000)
    (65536, 1048576, 16)
    """
    rows = CHUNK_BYTES // (8 * n_columns)
    return min(MOST_ROWS, 1 << max(0, rows.bit_length() - 1))


def check_rows_per_chunk(rows: int | None, n_columns: int) -> None:
    """Raise unless a chunk of that many rows can be written."""
    if rows is None:
        return
    most = max(1, LARGEST_CHUNK_BYTES // (8 * n_columns))
    if not isinstance(rows, int) or isinstance(rows, bool) or not 1 <= rows <= most:
        raise UsageError(
            f"rows_per_chunk is {rows!r}; it should be an integer from 1 to {most:,} for {n_columns:,} columns (2 GB a chunk)"
        )
