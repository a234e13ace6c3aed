"""Dask arrays: used where they lie, one row of blocks at a time. And which kind of rows an array is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from streamlr.dataset.integrity import array_fingerprint, check_current
from streamlr.dataset.rows import MemoryRows, Reader, Rows, check_dtype, plain_array
from streamlr.dataset.zarr_rows import ZarrRows
from streamlr.errors import UnsupportedDtype, UsageError
from streamlr.files import digest

if TYPE_CHECKING:
    import dask.array as da

REMEDY = "or open the store by open_dataset(..., allow_missing_chunks=True)"


@dataclass(frozen=True, slots=True)
class DaskRows:
    """Columns of a Dask array of any graph and chunking with known sizes.

    A pass hands each of its blocks, as `MemoryRows`, to the task that needs it: nothing is pulled to the caller's process.
    """

    array: da.Array
    label: str

    def __post_init__(self) -> None:
        check_dtype(self.array.dtype, self.label)
        if any(np.isnan(size) for sizes in self.array.chunks for size in sizes):
            raise UsageError(
                f"the Dask array {self.label!r} has chunks of unknown size, so its rows cannot be counted before they are read; "
                "call its compute_chunk_sizes() first, or give lengths=True to to_dask_array()"
            )

    @property
    def n_rows(self) -> int:
        """Rows of the array."""
        return int(self.array.shape[0])

    @property
    def n_columns(self) -> int:
        """Columns of the array."""
        return int(self.array.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the array."""
        dtype: np.dtype[Any] = self.array.dtype
        return dtype

    @property
    def chunk_rows(self) -> int:
        """Rows of the largest block."""
        return int(max(self.array.chunks[0]))

    @property
    def decoded_rows(self) -> int:
        """Rows of the largest block."""
        return self.chunk_rows

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.n_columns * self.dtype.itemsize

    @property
    def reader_bytes(self) -> int:
        """An estimate, since a graph may hold anything: the block, what it is made of, and as much of one that waits.

        Where blocks are joined from several, the pieces are held as well.
        """
        held = 4 if len(self.array.chunks[1]) == 1 else 8
        return held * self.chunk_rows * self.row_bytes

    def reader(self) -> Reader:
        """Blocks are only read by the task that computes them."""
        raise TypeError("a Dask array is read block by block by the tasks of a pass; this is a bug in streamlr")

    def fingerprint(self, *, complete: bool = False) -> str:
        """Return Dask's name of the array, a token of the graph that makes it, with what its zarr arrays look like now.

        Raise, if it must be `complete`, unless those have all their chunks: Dask reads an absent one as fill values without a word.
        """
        remedy = REMEDY if complete else None
        found = [array_fingerprint(array, label, None, remedy) for label, array in self.zarr_sources()]
        return f"{self.array.name} {digest(found)}" if found else str(self.array.name)

    def check_current(self) -> None:
        """Raise unless the metadata of the zarr arrays that the graph reads are what they were when it was built."""
        for label, array in self.zarr_sources():
            check_current(array, label)

    def in_rows(self, sizes: tuple[int, ...]) -> da.Array:
        """Return the array with row blocks of these sizes, each of all columns."""
        rechunked: da.Array = self.array.rechunk((sizes, -1))
        return rechunked

    def zarr_sources(self) -> list[tuple[str, zarr.Array[Any]]]:
        """Return names and zarr arrays that the graph reads, as far as they can be found in it."""
        found: dict[int, zarr.Array[Any]] = {}
        for node in self.array.__dask_graph__().values():
            _collect(node, found)
        return [(array.basename or self.label, array) for array in found.values()]


def _collect(node: Any, found: dict[int, zarr.Array[Any]]) -> None:
    """Look for zarr arrays in a node of a graph: by itself, as a literal, or among the arguments of a task, fused or not."""
    if isinstance(node, zarr.Array):
        found[id(node)] = node
    elif isinstance(node, list | tuple):
        for item in node:
            _collect(item, found)
    elif isinstance(node, dict):
        _collect(list(node.values()), found)
    elif hasattr(node, "dependencies"):  # one of Dask's own nodes
        _collect([getattr(node, "value", None), getattr(node, "args", ()), getattr(node, "kwargs", {})], found)


def as_rows(array: Any, label: str) -> Rows:
    """Return a Dask, zarr or NumPy array (or what NumPy can make one of) as `Rows`, a 1-D array as one column."""
    if isinstance(array, zarr.Array):
        return ZarrRows(array, label)
    if hasattr(array, "__dask_graph__"):
        import dask.array as da

        if not isinstance(array, da.Array):
            array = array.to_dask_array()
        return DaskRows(_two_dimensional(array, label), label)
    values = plain_array(array)
    if values.dtype.kind == "O":
        raise UnsupportedDtype(f"{label} has dtype object; allowed are real numbers: convert it with astype(float) first")
    return MemoryRows(_two_dimensional(values, label), label)


def _two_dimensional(array: Any, label: str) -> Any:
    if array.ndim == 1:
        return array[:, None]
    if array.ndim != 2:
        raise UsageError(f"{label} has {array.ndim} dimensions; allowed are 1 (a column) and 2 (rows and columns)")
    return array
