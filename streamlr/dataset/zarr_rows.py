"""zarr arrays, read chunk by chunk and checked."""

from __future__ import annotations

import base64
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ShardingCodec

from streamlr.dataset.blocks import Span
from streamlr.dataset.buffers import Buffer
from streamlr.dataset.codecs import KNOWN_V2, ChunkCodec, ZarrCodec, check_memory, chunk_codec
from streamlr.dataset.integrity import array_fingerprint, check_current, local_root
from streamlr.dataset.read_ahead import chunks_ahead
from streamlr.dataset.remote import shown
from streamlr.dataset.rows import as_float64, check_dtype
from streamlr.dataset.stored_chunks import StoredChunks, is_asked_ahead
from streamlr.errors import ChunkMissing, DataError, StoreChanged, StoreIncomplete, UnsupportedDtype

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

        And the stored chunks that are asked for ahead.
        """
        decoded = self.array.chunks[0] * self.row_bytes
        one = decoded // len(self.column_chunks)
        stored = one + one * chunks_ahead(one) if self.are_asked_ahead else one
        return decoded + stored if chunk_codec(self.array) is not None else 2 * decoded + stored

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


class ZarrReader:
    """Reads a `ZarrRows` in order, holding the chunks of one row of chunks."""

    def __init__(self, rows: ZarrRows) -> None:
        self.rows = rows
        self.chunks_missing = 0
        self._height = rows.decoded_rows
        self._positions = [(column,)[: rows.array.ndim - 1] for column in rows.column_chunks]  # within a row of chunks
        self._stored = StoredChunks(rows.array, rows.label, rows.checksums)
        self._codec = chunk_codec(rows.array) or ZarrCodec(rows.array)
        # numbers stored plainly are used where they were read, so they need a place for each column chunk; others share one
        self._in_place = isinstance(self._codec, ChunkCodec) and self._codec.compressor is None
        self._copies = _column_copies(rows)
        self._whole = rows.column_chunks == (0,) and rows.column_positions == tuple(range(rows.row_bytes // rows.dtype.itemsize))
        # a chunk that is all of some rows, as they are computed with, is decoded where they are wanted
        self._plain = self._whole and isinstance(self._codec, ChunkCodec) and self._codec.is_plain
        self._read: defaultdict[int, Buffer] = defaultdict(Buffer)
        self._decoded: defaultdict[int, Buffer] = defaultdict(Buffer)
        self._held = -1
        self._pieces: list[NDArray[Any]] = []

    def expect(self, spans: Sequence[Span]) -> None:
        """Ask the store for the chunks of these spans, which are read next and in this order, and for no others any more."""
        self._stored.expect(_coming(self.rows, self._held, spans))

    def forget(self) -> None:
        """Let go of the chunks that are held, and of what is known of shards."""
        self._held, self._pieces = -1, []
        self._stored.forget()

    def read_into(self, out: NDArray[np.float64], start: int) -> None:
        """Fill `out` (m, c) with the rows from `start` on."""
        height = self._height
        stop = start + len(out)
        for row_chunk in range(start // height, -(-stop // height)):
            first, last = max(start, row_chunk * height), min(stop, (row_chunk + 1) * height)
            target = out[first - start : last - start]
            if row_chunk != self._held:
                if self._plain and last - first == height and target.flags.c_contiguous:
                    self._decode_into(target, row_chunk)
                    continue
                self._hold(row_chunk, first)
            for piece, (to, source) in zip(self._pieces, self._copies, strict=True):
                target[:, to] = piece[first - row_chunk * height : last - row_chunk * height, source]

    def view(self, start: int, stop: int) -> NDArray[np.float64] | None:
        """Return the rows [start, stop) of a decoded chunk, where one holds all that is read of them, as it is."""
        height = self._height
        row_chunk = start // height
        if not self._whole or stop > (row_chunk + 1) * height:
            return None
        if row_chunk != self._held:
            self._hold(row_chunk, start)
        return as_float64(self._pieces[0][start - row_chunk * height : stop - row_chunk * height])

    def chunk(self, position: Position, into: NDArray[np.uint8] | None = None) -> NDArray[Any]:
        """Return the decoded chunk at `position`, as (rows, columns), after every check that needs no other chunk.

        It is valid until the next chunk of the same columns is asked for, and lies in `into` where that is given and the codec can.

        Raises
        ------
        ChunkMissing
            The chunk is absent or empty, and that is not allowed.
        ChunkCorrupt
            Its bytes cannot be what was written there.
        """
        codec, column = self._codec, position[-1] if len(position) == 2 else 0
        stored = self._stored.get(position, self._read[column if self._in_place else 0])
        if stored is None:
            return self._filled(position)
        if isinstance(codec, ZarrCodec):
            decoded = codec.decode(stored, self._stored.describe, position)
        else:
            try:
                out = self._decoded[column].take(0 if self._in_place else codec.nbytes) if into is None else into
            except (MemoryError, OSError) as error:
                check_memory(error, self._stored.describe(position), codec.nbytes)
                raise
            decoded = codec.decode(stored, out, self._stored.describe, position)
        return decoded.reshape(self._height, -1)

    def _filled(self, position: Position) -> NDArray[Any]:
        """Return what an absent chunk stands for, if it may be absent, and count it."""
        if not self.rows.may_lack_chunks:
            raise ChunkMissing(self._absence(position))
        self.chunks_missing += 1
        array = self.rows.array
        fill = 0 if array.fill_value is None else array.fill_value  # none is stated (v2): zarr reads zeros
        return np.full(array.chunks, fill, dtype=array.dtype).reshape(self._height, -1)

    def _hold(self, row_chunk: int, first: int) -> None:
        self._held = -1  # nothing is held while a chunk is being replaced, so that an error leaves no mixture
        self._pieces = []  # and its memory is free for the next one
        counted = self.chunks_missing
        self._pieces = [self.chunk((row_chunk, *columns)) for columns in self._positions]
        if first > row_chunk * self._height:
            self.chunks_missing = counted  # whoever reads the first row counts, so that two who share a chunk do not both
        self._held = row_chunk

    def _decode_into(self, target: NDArray[np.float64], row_chunk: int) -> None:
        """Fill `target` with all rows of a chunk, which is not held then: nobody asks for its rows twice in a row."""
        self._held, self._pieces = -1, []
        numbers = self.chunk((row_chunk, *self._positions[0]), target.reshape(-1).view(np.uint8))
        if not np.may_share_memory(numbers, target):
            target[...] = numbers

    def _absence(self, position: Position) -> str:
        root = local_root(self.rows.array)
        if root is not None and not (root / self.rows.array.path).is_dir():
            return f"the store {root} is gone while array {self.rows.label!r} was being read; is it still mounted?"
        where = shown(self.rows.array.store_path)
        return f"{self._stored.describe(position)} is missing from {where}; restore it, {self.rows.remedy}"


def _coming(rows: ZarrRows, held: int, spans: Sequence[Span]) -> Iterator[Position]:
    """Iterate over the chunks that reading these spans will ask for: not for one that is held by then.

    No method, which would keep its reader, and so the reader's memory, for as long as nobody has come to its end.
    """
    height = rows.decoded_rows
    for span in spans:
        first, last = span.start // height, -(-span.stop // height)
        yield from rows.positions(first + (first == held), last)
        held = last - 1


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
