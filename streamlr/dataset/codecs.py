"""From the bytes of a chunk to its numbers, with every length and checksum checked before a number is believed."""

from __future__ import annotations

import bz2
import errno
import json
import lzma
import math
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import google_crc32c
import numcodecs
import numpy as np
import zarr
import zstandard
from numpy.typing import NDArray
from zarr.buffer import default_buffer_prototype
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ZstdCodec

from streamlr.errors import ChunkCorrupt, MemoryLimitExceeded

Stored = bytes | memoryview
Position = tuple[int, ...]
ABSENT = 2**64 - 1  # what a shard's index says of an inner chunk that was never written

# numcodecs by which a zarr v2 store of numbers may have been written; pickles and objects are refused before a byte is read
KNOWN_V2 = frozenset(
    {
        *("adler32", "astype", "bitround", "blosc", "bz2", "crc32", "crc32c", "delta", "fixedscaleoffset", "fletcher32", "gzip"),
        *("jenkins_lookup3", "lz4", "lzma", "packbits", "pcodec", "quantize", "shuffle", "zfpy", "zlib", "zstd"),
    }
)


@dataclass(frozen=True, slots=True)
class ChunkCodec:
    """Decodes whole chunks of one array by itself, into a buffer that is used again.

    Attributes
    ----------
    shape : tuple of int
        Shape of a decoded chunk; chunks at the edge are stored whole.
    dtype : dtype
        Stored dtype, byte order included.
    order : "C" or "F"
        Layout of the elements.
    has_checksum : bool
        Whether the stored bytes end with a crc32c over all that precedes it.
    compressor : numcodecs codec or None
        What the bytes before it were compressed with.
    nbytes : int
        Bytes of a decoded chunk.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: Literal["C", "F"]
    has_checksum: bool
    compressor: Any
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", math.prod(self.shape) * self.dtype.itemsize)

    @property
    def is_plain(self) -> bool:
        """Whether a chunk decodes to float64 in C order, of this machine's byte order."""
        return self.dtype == np.float64 and self.order == "C"

    @property
    def is_bare(self) -> bool:
        """Whether a chunk is stored as its numbers and nothing else."""
        return self.compressor is None and not self.has_checksum

    def decode(
        self, stored: Stored, out: NDArray[np.uint8], describe: Callable[[Position], str], position: Position
    ) -> NDArray[Any]:
        """Decode `stored`, into `out` (uint8, `nbytes`) if it was compressed and the codec can, and return an array of `shape`.

        Raises
        ------
        ChunkCorrupt
            A checksum differs, the bytes cannot be decompressed, or they are too few or too many; `describe` names the chunk.
        MemoryLimitExceeded
            There was no memory to decompress it.
        """
        data: Any = stored
        try:
            if self.has_checksum:
                data = _check_crc32c(data)
            if self.compressor is not None:
                data = _decompress(self.compressor, data, out)
        except Exception as error:  # numcodecs and its C libraries raise what they like; but for memory, this chunk is damaged
            check_memory(error, describe(position), self.nbytes)
            raise ChunkCorrupt(f"{describe(position)} cannot be decoded: {error}; restore it from its source") from error
        if data is not out and (found := memoryview(data).nbytes) != self.nbytes:
            raise ChunkCorrupt(
                f"{describe(position)} decodes to {found:,} bytes where {self.nbytes:,} belong; restore it from its source"
            )
        return np.frombuffer(data, dtype=self.dtype).reshape(self.shape, order=self.order)


def chunk_codec(array: zarr.Array[Any]) -> ChunkCodec | None:
    """Return the codec of the (inner) chunks of `array`, or None where zarr itself must decode them."""
    metadata: Any = array.metadata
    if metadata.zarr_format == 2:
        compressor = metadata.compressor
        if metadata.filters or (compressor is not None and compressor.codec_id not in _DECLARING.keys() | _BOUNDED.keys()):
            return None
        return ChunkCodec(array.chunks, array.dtype, metadata.order, False, compressor)
    codecs = metadata.codecs
    if array.shards is not None:
        codecs = codecs[0].codecs
    if not codecs or not isinstance(codecs[0], BytesCodec):
        return None
    compressors = [codec for codec in codecs[1:3] if isinstance(codec, BloscCodec | GzipCodec | ZstdCodec)]
    checksums = [codec for codec in codecs[1:] if isinstance(codec, Crc32cCodec)]
    if len(compressors) > 1 or len(checksums) > 1 or list(codecs[1:]) != [*compressors, *checksums]:
        return None  # only the last step may decode into the reused buffer: longer chains are zarr's
    dtype = array.dtype.newbyteorder(">" if _word(codecs[0].endian) == "big" else "<")
    return ChunkCodec(array.chunks, dtype, "C", bool(checksums), _numcodec(compressors[0]) if compressors else None)


class ZarrCodec:
    """Lets zarr decode chunks whose codecs are not ours to undo, from the bytes already read and from nothing else.

    zarr is given an array of one chunk in memory: what it cannot find there, it cannot replace by fill values.
    """

    def __init__(self, array: zarr.Array[Any]) -> None:
        name = "zarr.json" if array.metadata.zarr_format == 3 else ".zarray"
        document = json.loads(array.metadata.to_buffer_dict(default_buffer_prototype())[name].to_bytes())
        document["shape"] = list(array.chunks)
        if array.shards is not None:
            document["chunk_grid"]["configuration"]["chunk_shape"] = list(array.chunks)
            document["codecs"] = document["codecs"][0]["configuration"]["codecs"]
        self._stored: dict[str, Any] = {name: _as_buffer(json.dumps(document).encode())}
        self._one = zarr.open_array(zarr.storage.MemoryStore(self._stored), mode="r")
        self._nbytes = math.prod(array.chunks) * array.dtype.itemsize
        self._key = self._one.metadata.encode_chunk_key((0,) * array.ndim)

    def decode(self, stored: Stored, describe: Callable[[Position], str], position: Position) -> NDArray[Any]:
        """Decode `stored` and return an array of the shape of a chunk, or raise `ChunkCorrupt` or `MemoryLimitExceeded`."""
        try:
            self._stored[self._key] = _as_buffer(bytes(stored))
            return np.asarray(self._one[...])
        except Exception as error:  # any codec may fail in its own way; the chunk is named, the cause kept
            check_memory(error, describe(position), self._nbytes)
            raise ChunkCorrupt(f"{describe(position)} cannot be decoded: {error}; restore it from its source") from error
        finally:
            self._stored.pop(self._key, None)


def _as_buffer(data: bytes) -> Any:
    return default_buffer_prototype().buffer.from_bytes(data)


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Where the index of a shard stands and how it reads: (offset, length) of each inner chunk, little-endian, crc32c behind.

    Reference: Zarr specification v3, "sharding_indexed" codec, binary shard format.
    """

    shape: tuple[int, ...]
    at_end: bool
    checked: bool

    @property
    def nbytes(self) -> int:
        """Stored bytes of the index."""
        return 16 * math.prod(self.shape) + 4 * self.checked

    def read(self, stored: Stored, name: str) -> NDArray[np.uint64]:
        """Return the index of the shard of this name as an array of shape (*chunks per shard, 2)."""
        if len(stored) != self.nbytes:
            raise ChunkCorrupt(f"the index of {name} has {len(stored)} bytes where {self.nbytes} belong; restore the shard")
        try:
            entries = _check_crc32c(stored) if self.checked else stored
        except ValueError as error:
            raise ChunkCorrupt(f"the index of {name} is damaged: {error}; restore the shard from its source") from error
        return np.frombuffer(entries, dtype="<u8").reshape(*self.shape, 2)


def shard_index(array: zarr.Array[Any]) -> ShardIndex | None:
    """Return how the shards of `array` are indexed, or None when it has none, or has an index of an unusual kind."""
    metadata: Any = array.metadata
    if array.shards is None:
        return None
    codec = metadata.codecs[0]
    plain = all(isinstance(step, BytesCodec | Crc32cCodec) for step in codec.index_codecs)
    if not plain or _word(codec.index_codecs[0].endian) != "little":
        return None
    shape = tuple(shard // chunk for shard, chunk in zip(array.shards, array.chunks, strict=True))
    return ShardIndex(shape, _word(codec.index_location) == "end", len(codec.index_codecs) > 1)


def check_memory(error: Exception, chunk: str, nbytes: int) -> None:
    """Raise `MemoryLimitExceeded` if `error` says that memory ran out, which is no fault of the chunk of `nbytes` decoded bytes."""
    refused = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if refused or "not enough memory" in str(error):  # the latter is zstd's
        raise MemoryLimitExceeded(
            f"{chunk} ({nbytes:,} bytes decoded) did not fit in memory: {error or type(error).__name__}; run fewer tasks at once "
            "(--threads), give the process more memory, or rewrite the store with smaller chunks"
        ) from error


def _word(value: Any) -> Any:
    """Return the word that a member of one of zarr's enumerations stands for; newer zarr has the word itself."""
    return getattr(value, "value", value)


def _numcodec(codec: BloscCodec | GzipCodec | ZstdCodec) -> Any:
    if isinstance(codec, ZstdCodec):
        return numcodecs.Zstd()
    return numcodecs.Blosc() if isinstance(codec, BloscCodec) else numcodecs.GZip()


def _check_crc32c(data: Stored) -> memoryview:
    view = memoryview(data)
    if len(view) < 4:
        raise ValueError("it is too short to hold its checksum")
    payload = np.frombuffer(view[:-4], dtype=np.uint8)  # an array, since the C function takes no memoryview
    if google_crc32c.value(payload) != int.from_bytes(view[-4:], "little"):
        raise ValueError("its crc32c checksum does not match its bytes")
    return view[:-4]


def _decompress(codec: Any, data: Stored, target: NDArray[np.uint8]) -> Any:
    """Decompress, but never to more than `target` holds: a few stored bytes can stand for gigabytes."""
    if codec.codec_id in _BOUNDED:
        return _decompress_bounded(_BOUNDED[codec.codec_id](codec), data, target.nbytes)
    size, decompress = _DECLARING[codec.codec_id]
    declared = size(memoryview(data))
    if declared is None:  # frames of zstd, whose windows are as large as they like: not to be kept by the thread
        return _read_zstd(zstandard.ZstdDecompressor(), data, target)
    if declared != target.nbytes:
        raise ValueError(f"it declares {declared:,} bytes where {target.nbytes:,} belong")
    return decompress(data, target)


class _Contexts(threading.local):
    """What a thread decompresses with, chunk after chunk: for small ones, it takes long to make."""

    def __init__(self) -> None:
        self.zstd = zstandard.ZstdDecompressor()


_OF_THIS_THREAD = _Contexts()


def _read_zstd(decompressor: zstandard.ZstdDecompressor, data: Stored, target: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Decompress frames that `_zstd_size` saw whole: of a stated size straight into `target`, else by way of their window."""
    reader = decompressor.stream_reader(data, read_across_frames=True)
    if reader.readinto(target) != target.nbytes or reader.read(1):
        raise ValueError(f"it decompresses to fewer or more than the {target.nbytes:,} bytes that belong")
    return target


def _zstd_size(data: memoryview) -> int | None:
    """Content size of one frame or more, None where a header does not state it (RFC 8878, section 3.1).

    The last must end where `data` do: zstandard stops once its numbers are complete, and misses no checksum that was cut off.
    """
    total: int | None = 0
    end = 0
    while end < len(data):
        end, size = _zstd_frame(data, end)
        total = None if total is None or size is None else total + size
    if end > len(data):
        raise ValueError("its last zstd frame is cut off")
    return total


def _zstd_frame(data: memoryview, start: int) -> tuple[int, int | None]:
    """Return where the frame that begins at `start` ends, behind `data` if it is cut off, and its content size."""
    frame = data[start:]
    if int.from_bytes(frame[:4], "little") >> 4 == 0x184D2A5:  # to be skipped
        return start + 8 + int.from_bytes(frame[4:8], "little"), 0
    parameters = zstandard.get_frame_parameters(frame)
    size = None if parameters.content_size == zstandard.CONTENTSIZE_UNKNOWN else parameters.content_size
    end, last = start + zstandard.frame_header_size(frame), 0
    while not last and end <= len(data):
        block = int.from_bytes(data[end : end + 3], "little")
        last, run = block & 1, block >> 1 & 3 == 1  # a run is one byte, for as many as its header says
        end += 3 + (1 if run else block >> 3)
    return end + 4 * parameters.has_checksum, size


def _blosc_size(data: memoryview) -> int | None:
    """Uncompressed and compressed size, bytes 4 to 7 and 12 to 15 of a Blosc-1 header; a cut buffer is told by the latter."""
    if len(data) < 16 or int.from_bytes(data[12:16], "little") != len(data):
        raise ValueError("it is shorter or longer than its Blosc header says")
    return int.from_bytes(data[4:8], "little")


def _lz4_size(data: memoryview) -> int:
    """Uncompressed size, the four bytes that numcodecs puts before an LZ4 block."""
    return int.from_bytes(data[:4], "little")


def _decompress_bounded(decompressor: Any, data: Stored, most: int) -> bytes:
    found: bytes = decompressor.decompress(data, most + 1)
    if len(found) > most:
        raise ValueError(f"it decompresses to more than the {most:,} bytes that belong")
    if not decompressor.eof or decompressor.unused_data:
        raise ValueError("it is shorter or longer than what was compressed")
    return found


def _lzma(codec: Any) -> Any:
    return lzma.LZMADecompressor(codec.format, filters=codec.filters if codec.format == lzma.FORMAT_RAW else None)


# how many bytes the data say that they hold; and what decompresses them (numcodecs' codec objects go a longer way to its functions)
_DECLARING: dict[str, tuple[Callable[[memoryview], int | None], Callable[..., Any]]] = {
    "zstd": (_zstd_size, lambda data, target: _read_zstd(_OF_THIS_THREAD.zstd, data, target)),
    "blosc": (_blosc_size, numcodecs.blosc.decompress),
    "lz4": (_lz4_size, numcodecs.lz4.decompress),
}
_BOUNDED: dict[str, Callable[[Any], Any]] = {
    "gzip": lambda codec: zlib.decompressobj(wbits=31),
    "zlib": lambda codec: zlib.decompressobj(),
    "bz2": lambda codec: bz2.BZ2Decompressor(),
    "lzma": _lzma,
}
