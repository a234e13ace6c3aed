"""Dask arrays: used where they lie, one row of blocks at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from streamlr.dataset.rows import Reader, check_dtype
from streamlr.dataset.zarr_rows import ZarrRows
from streamlr.errors import UsageError

if TYPE_CHECKING:
    import dask.array as da


@dataclass(frozen=True, slots=True)
class DaskRows:
    """Columns of a Dask array of any graph and chunking with known sizes.

    A pass hands each of its blocks, as `MemoryRows`, to the task that needs it: nothing is pulled to the caller's process.
    """

    array: da.Array
    label: str
    allow_missing_chunks: bool = False

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
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.n_columns * self.dtype.itemsize

    @property
    def reader_bytes(self) -> int:
        """One row of blocks, and its pieces where it has several column blocks to be joined."""
        joined = 1 if len(self.array.chunks[1]) == 1 else 2
        return joined * self.chunk_rows * self.row_bytes

    def reader(self) -> Reader:
        """Blocks are only read by the task that computes them."""
        raise TypeError("a Dask array is read block by block by the tasks of a pass; this is a bug in streamlr")

    def fingerprint(self) -> str:
        """Return Dask's name of the array: a token of the graph that makes it."""
        return str(self.array.name)

    def in_rows(self, sizes: tuple[int, ...]) -> da.Array:
        """Return the array with row blocks of these sizes, each of all columns."""
        rechunked: da.Array = self.array.rechunk((sizes, -1))
        return rechunked

    def zarr_sources(self) -> list[ZarrRows]:
        """Return the zarr arrays of numbers that the graph reads, as far as they can be found in it."""
        found: dict[int, ZarrRows] = {}
        for node in self.array.__dask_graph__().values():
            value = getattr(node, "value", node)
            if isinstance(value, zarr.Array) and value.ndim in (1, 2):
                found[id(value)] = ZarrRows(value, value.basename or self.label, allow_missing_chunks=self.allow_missing_chunks)
        return list(found.values())
