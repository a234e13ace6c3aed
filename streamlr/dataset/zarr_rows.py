"""zarr arrays, read chunk by chunk and checked."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ShardingCodec

from streamlr.dataset.codecs import KNOWN_V2, chunk_codec
from streamlr.dataset.integrity import array_fingerprint, check_current, local_root
from streamlr.dataset.read_ahead import chunks_ahead
from streamlr.dataset.rows import check_dtype
from streamlr.dataset.stored_chunks import is_asked_ahead
from streamlr.dataset.zarr_reader import ZarrReader
from streamlr.errors import DataError, StoreChanged, StoreIncomplete, UnsupportedDtype
from streamlr.files import check_open_files

MAX_CHUNKS = 10**9  # more than any disk holds: the shape in the metadata was altered
REMEDY = "or, if its writer leaves out chunks of fill values, pass allow_missing_chunks=True (--allow-missing-chunks)"
Position = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ZarrRows:
    """Columns of a 1-D or 2-D zarr array.

    Attributes
    ----------
    array : zarr.Array
        The array; v2 or v3, sharded or not, on any store.
    label : str
        Its name, for messages.
    columns : tuple of int or None
        Which columns of a 2-D array are read; None for all.
    allow_missing_chunks : bool
        Read an absent chunk as fill values and count it, instead of raising.
    checksums : bytes or None
        The manifest's four bytes for each chunk, where the store has a manifest.
    """

    array: zarr.Array[Any]
    label: str
    columns: tuple[int, ...] | None = None
    allow_missing_chunks: bool = False
    checksums: bytes | None = None

    def __post_init__(self) -> None:
        check_array(self.array, self.label)

    @property
    def n_rows(self) -> int:
        """Rows of the array."""
        return int(self.array.shape[0])

    @property
    def n_columns(self) -> int:
        """Columns that are read."""
        return len(self.column_positions)

    @property
    def column_positions(self) -> tuple[int, ...]:
        """Positions of the columns that are read."""
        if self.columns is not None:
            return self.columns
        return tuple(range(self.array.shape[1])) if self.array.ndim == 2 else (0,)

    @property
    def may_lack_chunks(self) -> bool:
        """Whether an absent chunk stands for fill values: never where a manifest says that it was written."""
        return self.allow_missing_chunks and self.checksums is None

    @property
    def remedy(self) -> str:
        """What else to do about an absent chunk: nothing but restore it, where a manifest says that it was written."""
        return REMEDY if self.checksums is None else "or ingest its source again: the store's manifest says that it was written"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Stored dtype."""
        return self.array.dtype

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk, or of a shard where there are shards: spans that end between shards open each once."""
        return int((self.array.shards or self.array.chunks)[0])

    @property
    def decoded_rows(self) -> int:
        """Rows of a chunk; within a shard, of one of its chunks."""
        return int(self.array.chunks[0])

    @property
    def column_chunks(self) -> tuple[int, ...]:
        """Which chunks along the columns hold the columns that are read."""
        if self.array.ndim == 1:
            return (0,)
        width = self.array.chunks[1]
        return tuple(sorted({column // width for column in self.column_positions}))

    @property
    def row_bytes(self) -> int:
        """Bytes to decode for one row: whole chunks, whatever columns of them are wanted."""
        width = self.array.chunks[1] if self.array.ndim == 2 else 1
        return len(self.column_chunks) * width * self.dtype.itemsize

    @property
    def are_asked_ahead(self) -> bool:
        """Whether chunks are asked for before they are wanted, since they come from a store with latency."""
        return is_asked_ahead(self.array)

    @property
    def reader_bytes(self) -> int:
        """All column chunks of one row of chunks, decoded, one of them stored, and what zarr copies where it decodes.

        And the stored chunks that are asked for ahead. Files of bare numbers are read where they are used.
        """
        decoded, codec = self.array.chunks[0] * self.row_bytes, chunk_codec(self.array)
        one = decoded // len(self.column_chunks)
        if codec is not None and codec.is_bare and not self.are_asked_ahead:
            return decoded
        stored = one + one * chunks_ahead(one) if self.are_asked_ahead else one
        return decoded + stored if codec is not None else 2 * decoded + stored

    def reader(self) -> ZarrReader:
        """Return a reader of these rows."""
        return ZarrReader(self)

    def fingerprint(self, *, complete: bool = False) -> str:
        """Return a digest of the metadata and, per chunk, of the manifest's checksum, else size and time of change.

        Raise, if it must be `complete`, unless all chunks are there, as far as a local disk can tell; elsewhere the reader finds an
        absent chunk as soon as it asks for it.
        """
        strict = complete and not self.may_lack_chunks and local_root(self.array) is not None
        try:
            return array_fingerprint(self.array, self.label, self.checksums, self.remedy if strict else None)
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            check_open_files(error, f"array {self.label!r}")
            raise StoreChanged(
                f"the metadata of array {self.label!r} cannot be read any more ({error}); is it still mounted?"
            ) from error

    def check_current(self) -> None:
        """Raise unless the array's metadata are what they were when it was opened."""
        check_current(self.array, self.label)

    def positions(self, first: int, stop: int) -> Iterator[Position]:
        """Iterate over the chunks that hold the columns that are read, for rows of chunks from `first` to before `stop`."""
        ndim, column_chunks = self.array.ndim, self.column_chunks
        for row_chunk in range(first, stop):
            for column_chunk in column_chunks:
                yield (row_chunk, column_chunk)[:ndim]


def check_array(array: zarr.Array[Any], label: str) -> None:
    """Raise unless `array` holds plain real numbers in one or two dimensions, by its metadata alone."""
    if array.ndim not in (1, 2):
        raise DataError(f"array {label!r} has {array.ndim} dimensions; allowed are 1 (a column) and 2 (rows and columns)")
    check_dtype(array.dtype, label)
    metadata: Any = array.metadata
    if metadata.zarr_format == 2:
        codecs = [*(metadata.filters or ()), *([metadata.compressor] if metadata.compressor is not None else [])]
        unknown = [codec.codec_id for codec in codecs if codec.codec_id not in KNOWN_V2]
        if unknown:
            raise UnsupportedDtype(f"array {label!r} uses the codec {unknown[0]!r}, not one for numbers; write it again without")
    elif getattr(metadata.chunk_grid, "chunk_shape", None) is None:
        raise DataError(f"array {label!r} has chunks of unequal sizes; write it again with a regular chunk grid")
    elif any(isinstance(codec, ShardingCodec) for codec in metadata.inner_codecs):
        raise DataError(f"array {label!r} has shards within shards or other codecs; write it again with plain shards")
    packed = [key for key in ("scale_factor", "add_offset") if key in array.attrs]
    if packed:
        raise DataError(
            f"array {label!r} holds packed numbers (attribute {packed[0]!r}): the stored integers are not the values; "
            "unpack them first, for example by opening the store with xarray and writing it again"
        )
    for key in ("_FillValue", "missing_value"):
        if key in array.attrs and not _is_nan(array.attrs[key], array.dtype):
            raise DataError(
                f"array {label!r} has the attribute {key!r} = {array.attrs[key]!r}: that number stands for missing values, and "
                "would be fitted as one; write the array again with NaN in its place, for example through xarray"
            )
    pieces = 1
    for length, size in zip(array.shape, array.chunks, strict=True):
        pieces *= -(-length // size)
    if pieces > MAX_CHUNKS:
        raise StoreIncomplete(f"array {label!r} promises {pieces:,} chunks (shape {array.shape}): its metadata were altered")


def _is_nan(value: Any, dtype: np.dtype[Any]) -> bool:
    """Whether an attribute is NaN: as JSON has it (null, "NaN"), or as xarray writes floats (base64 of their bytes)."""
    if isinstance(value, str) and dtype.kind == "f":
        with suppress(ValueError):  # no such bytes: a word
            value = np.frombuffer(base64.b64decode(value, validate=True), dtype="<f8" if dtype.itemsize == 8 else "<f4")[0]
    try:
        return value is None or bool(np.isnan(float(value)))
    except (TypeError, ValueError):
        return False
