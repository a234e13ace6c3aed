"""zarr arrays, read chunk by chunk and checked."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.buffer import default_buffer_prototype
from zarr.codecs import ShardingCodec
from zarr.core.sync import sync  # stores are bound to zarr's own event loop, and this is the way in
from zarr.storage import LocalStore

from streamlr.dataset.codecs import ABSENT, KNOWN_V2, ChunkCodec, ShardIndex, ZarrCodec, chunk_codec, shard_index
from streamlr.dataset.integrity import (
    CHECKSUM_BYTES,
    array_fingerprint,
    check_complete,
    check_current,
    chunk_key,
    describe_chunk,
    local_root,
)
from streamlr.dataset.rows import check_dtype
from streamlr.errors import ChunkCorrupt, ChunkMissing, DataError, StoreChanged, StoreIncomplete, UnsupportedDtype

MAX_CHUNKS = 10**9  # more than any disk holds: the shape in the metadata was altered
PAUSES = (0.1, 0.5)  # seconds before a failed read is tried again: networks and network disks fail for a moment
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
    def dtype(self) -> np.dtype[Any]:
        """Stored dtype."""
        return self.array.dtype

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk, or of a shard where there are shards: spans that end between shards open each once."""
        return int((self.array.shards or self.array.chunks)[0])

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
    def reader_bytes(self) -> int:
        """All column chunks of one row of chunks, decoded, one of them stored, and what zarr copies where it decodes."""
        decoded = min(self.array.chunks[0], max(self.n_rows, 1)) * self.row_bytes
        one = self.array.chunks[0] * self.row_bytes // len(self.column_chunks)
        return len(self.column_chunks) * one + one if chunk_codec(self.array) is not None else 2 * decoded + one

    def reader(self) -> ZarrReader:
        """Return a reader of these rows."""
        return ZarrReader(self)

    def fingerprint(self) -> str:
        """Return a digest of the metadata and, per chunk, of the manifest's checksum, else size and time of change."""
        try:
            return array_fingerprint(self.array, self.label, self.checksums)
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise StoreChanged(
                f"the metadata of array {self.label!r} cannot be read any more ({error}); is it still mounted?"
            ) from error

    def positions(self, first: int, stop: int) -> Iterator[Position]:
        """Iterate over the chunks that hold the columns that are read, for rows of chunks from `first` to before `stop`."""
        for row_chunk in range(first, stop):
            for column_chunk in self.column_chunks:
                yield (row_chunk, column_chunk)[: self.array.ndim]

    def check(self, *, complete: bool) -> None:
        """Raise unless the array is what it was when it was opened and, on a local disk, all its chunks are there.

        No chunk is read. Elsewhere the reader finds an absent chunk as soon as it asks for it.
        """
        check_current(self.array, self.label)
        if complete and not self.allow_missing_chunks and local_root(self.array) is not None:
            check_complete(self.array, self.label, REMEDY)


class ZarrReader:
    """Reads a `ZarrRows` in order, holding the chunks of one row of chunks."""

    def __init__(self, rows: ZarrRows) -> None:
        self.rows = rows
        self.chunks_missing = 0
        self._codec = chunk_codec(rows.array) or ZarrCodec(rows.array)
        self._index = shard_index(rows.array)
        self._root = local_root(rows.array)
        self._files = self._root if type(rows.array.store) is LocalStore else None  # a wrapper may do more than read files
        self._held = -1
        self._shard: tuple[Position, NDArray[np.uint64]] | None = None
        self._decoded: dict[int, NDArray[np.uint8]] = {}
        self._pieces: list[NDArray[Any]] = []
        self._copies = _column_copies(rows)

    def read_into(self, out: NDArray[np.float64], start: int) -> None:
        """Fill `out` (m, c) with the rows from `start` on."""
        height = self.rows.array.chunks[0]
        stop = start + len(out)
        for row_chunk in range(start // height, -(-stop // height)):
            if row_chunk != self._held:
                self._hold(row_chunk)
            first, last = max(start, row_chunk * height), min(stop, (row_chunk + 1) * height)
            target = out[first - start : last - start]
            for piece, (to, source) in zip(self._pieces, self._copies, strict=True):
                target[:, to] = piece[first - row_chunk * height : last - row_chunk * height, source]

    def chunk(self, position: Position) -> NDArray[Any]:
        """Return the decoded chunk at `position`, as (rows, columns), after every check that needs no other chunk.

        Raises
        ------
        ChunkMissing
            The chunk is absent or empty, and that is not allowed.
        ChunkCorrupt
            Its bytes cannot be what was written there.
        """
        array = self.rows.array
        stored = self._stored(position)
        if stored is None:
            if not self.rows.allow_missing_chunks:
                raise ChunkMissing(self.absence(position))
            self.chunks_missing += 1
            fill = 0 if array.fill_value is None else array.fill_value  # none is stated (v2): zarr reads zeros
            return np.full(array.chunks, fill, dtype=array.dtype).reshape(array.chunks[0], -1)
        self._check_manifest(position, stored)
        if isinstance(self._codec, ZarrCodec):
            decoded = self._codec.decode(stored, lambda: self._describe(position))
        else:
            decoded = self._codec.decode(stored, self._buffer(position, self._codec), lambda: self._describe(position))
        return decoded.reshape(array.chunks[0], -1)

    def _hold(self, row_chunk: int) -> None:
        self._held = -1  # nothing is held while a chunk is being replaced, so that an error leaves no mixture
        self._pieces = []  # and its memory is free for the next one
        ndim = self.rows.array.ndim
        self._pieces = [self.chunk((row_chunk, column)[:ndim]) for column in self.rows.column_chunks]
        self._held = row_chunk

    def _buffer(self, position: Position, codec: ChunkCodec) -> NDArray[np.uint8]:
        column = position[-1] if len(position) == 2 else 0
        if column not in self._decoded:
            self._decoded[column] = np.empty(codec.nbytes, dtype=np.uint8)
        return self._decoded[column]

    def _stored(self, position: Position) -> bytes | None:
        """Return the stored bytes of a chunk, None when there are none; a file that is there but empty is an error."""
        array = self.rows.array
        if array.shards is None:
            stored = self._get(chunk_key(array, position), None)
            if stored is not None and not stored:
                raise ChunkMissing(f"{self._describe(position)} is there but empty; restore it from its source")
            return stored
        per_shard = tuple(shard // chunk for shard, chunk in zip(array.shards, array.chunks, strict=True))
        shard = tuple(p // n for p, n in zip(position, per_shard, strict=True))
        if self._index is None:
            raise DataError(f"array {self.rows.label!r} has a shard index of an unusual kind; write it with the default")
        entries = self._shard_entries(shard, self._index)
        if entries is None:
            return None
        offset, length = (int(number) for number in entries[tuple(p % n for p, n in zip(position, per_shard, strict=True))])
        if offset == ABSENT:
            return None
        stored = self._get(chunk_key(array, shard), RangeByteRequest(offset, offset + length))
        if stored is None or len(stored) != length:
            raise ChunkCorrupt(f"{self._describe(position)} is cut short inside its shard; restore the shard from its source")
        return stored

    def _shard_entries(self, shard: Position, index: ShardIndex) -> NDArray[np.uint64] | None:
        if self._shard is None or self._shard[0] != shard:
            key = chunk_key(self.rows.array, shard)
            request = SuffixByteRequest(index.nbytes) if index.at_end else RangeByteRequest(0, index.nbytes)
            stored = self._get(key, request)
            if stored is None:
                return None
            if not stored:
                raise ChunkMissing(f"shard {key!r} of array {self.rows.label!r} is there but empty; restore it from its source")
            self._shard = shard, index.read(stored, lambda: f"shard {key!r} of array {self.rows.label!r}")
        return self._shard[1]

    def _get(self, key: str, request: ByteRequest | None) -> bytes | None:
        for pause in (*PAUSES, None):
            try:
                if self._files is not None:
                    return _read_file(self._files / key, request)
                buffer = sync(self.rows.array.store.get(key, default_buffer_prototype(), request))
                return None if buffer is None else buffer.to_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
            except Exception as error:  # remote stores raise what their clients raise
                if pause is None or isinstance(error, PermissionError | IsADirectoryError):
                    raise ChunkCorrupt(
                        f"{key!r} of array {self.rows.label!r} in {self.rows.array.store} cannot be read: {error}; "
                        "check disk, network and permissions"
                    ) from error
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _check_manifest(self, position: Position, stored: bytes) -> None:
        if self.rows.checksums is None:
            return
        grid = tuple(-(-length // size) for length, size in zip(self.rows.array.shape, self.rows.array.chunks, strict=True))
        number = int(np.ravel_multi_index(position, grid)) * CHECKSUM_BYTES
        if stored[-CHECKSUM_BYTES:] != self.rows.checksums[number : number + CHECKSUM_BYTES]:
            raise ChunkCorrupt(
                f"{self._describe(position)} is not the chunk that was written there (its checksum differs from the manifest's); "
                "restore it from its source"
            )

    def _describe(self, position: Position) -> str:
        return describe_chunk(self.rows.array, self.rows.label, position)

    def absence(self, position: Position) -> str:
        """Say that the chunk at `position` is absent, and what to do."""
        if self._root is not None and not (self._root / self.rows.array.path).is_dir():
            return f"the store {self._root} is gone while array {self.rows.label!r} was being read; is it still mounted?"
        return f"{self._describe(position)} is missing from {self.rows.array.store_path}; restore it, {REMEDY}"


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
    pieces = 1
    for length, size in zip(array.shape, array.chunks, strict=True):
        pieces *= -(-length // size)
    if pieces > MAX_CHUNKS:
        raise StoreIncomplete(f"array {label!r} promises {pieces:,} chunks (shape {array.shape}): its metadata were altered")


def _column_copies(rows: ZarrRows) -> list[tuple[Any, Any]]:
    """For each column chunk: where its columns go, and which they are; as slices when they are neighbours."""
    width = rows.array.chunks[1] if rows.array.ndim == 2 else 1
    copies = []
    for column_chunk in rows.column_chunks:
        held = range(column_chunk * width, (column_chunk + 1) * width)
        pairs = [(to, column - held.start) for to, column in enumerate(rows.column_positions) if column in held]
        to, source = zip(*pairs, strict=True)
        copies.append((_as_slice(to), _as_slice(source)))
    return copies


def _as_slice(numbers: tuple[int, ...]) -> slice | list[int]:
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    return slice(numbers[0], numbers[-1] + 1) if steps <= {1} else list(numbers)


def _read_file(path: Path, request: ByteRequest | None) -> bytes:
    with path.open("rb") as file:
        if isinstance(request, SuffixByteRequest):
            size = file.seek(0, 2)
            file.seek(max(size - request.suffix, 0))
        elif isinstance(request, RangeByteRequest):
            file.seek(request.start)
            return file.read(request.end - request.start)
        elif isinstance(request, OffsetByteRequest):
            file.seek(request.offset)
        return file.read()
