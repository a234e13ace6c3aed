"""From the bytes of a chunk to its numbers, with every length and checksum checked before a number is believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec

from streamlr.errors import ChunkCorrupt

Buffer = bytes | memoryview
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
    steps : tuple
        Compressors and checksums in the order in which they are undone.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: str
    steps: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of a decoded chunk."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    @property
    def has_checksum(self) -> bool:
        """Whether the stored bytes end with a crc32c over all that precedes it."""
        return bool(self.steps) and isinstance(self.steps[0], Crc32cCodec)

    def decode(self, stored: Buffer, out: NDArray[np.uint8], describe: Callable[[], str]) -> NDArray[Any]:
        """Decode `stored`, using `out` (uint8, at least `nbytes`) where the codec can, and return an array of `shape`.

        Raises
        ------
        ChunkCorrupt
            A checksum differs, the bytes cannot be decompressed, or they are too few or too many; `describe` names the chunk.
        """
        data: Any = stored
        target = out[: self.nbytes]
        try:
            for step in self.steps:
                data = _check_crc32c(data) if isinstance(step, Crc32cCodec) else _decompress(step, data, target)
        except Exception as error:  # numcodecs and its C libraries raise what they like; whatever it is, this chunk is damaged
            raise ChunkCorrupt(f"{describe()} cannot be decoded: {error}; restore it from its source") from error
        found = memoryview(data).nbytes
        if found != self.nbytes:
            raise ChunkCorrupt(f"{describe()} decodes to {found:,} bytes where {self.nbytes:,} belong; restore it from its source")
        flat = np.frombuffer(data, dtype=self.dtype)
        return flat.reshape(self.shape, order="F" if self.order == "F" else "C")


def chunk_codec(array: zarr.Array[Any]) -> ChunkCodec | None:
    """Return the codec of the (inner) chunks of `array`, or None where zarr itself must decode them."""
    metadata: Any = array.metadata
    if metadata.zarr_format == 2:
        if metadata.filters or (metadata.compressor is not None and metadata.compressor.codec_id not in _DECOMPRESSORS):
            return None
        steps: tuple[Any, ...] = () if metadata.compressor is None else (metadata.compressor,)
        return ChunkCodec(array.chunks, array.dtype, metadata.order, steps)
    codecs = metadata.codecs
    if len(codecs) == 1 and isinstance(codecs[0], ShardingCodec):
        codecs = codecs[0].codecs
    if not codecs or not isinstance(codecs[0], BytesCodec):
        return None
    if not all(isinstance(codec, BloscCodec | Crc32cCodec | GzipCodec | ZstdCodec) for codec in codecs[1:]):
        return None
    endian = codecs[0].endian
    dtype = array.dtype.newbyteorder(">" if endian is not None and endian.value == "big" else "<")
    steps = tuple(codec if isinstance(codec, Crc32cCodec) else _numcodec(codec) for codec in reversed(codecs[1:]))
    return ChunkCodec(array.chunks, dtype, "C", steps)


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
        return 16 * int(np.prod(self.shape)) + 4 * self.checked

    def read(self, stored: Buffer, describe: Callable[[], str]) -> NDArray[np.uint64]:
        """Return the index as an array of shape (*chunks per shard, 2)."""
        if len(stored) != self.nbytes:
            raise ChunkCorrupt(f"the index of {describe()} has {len(stored)} bytes where {self.nbytes} belong; restore the shard")
        try:
            entries = _check_crc32c(stored) if self.checked else stored
        except ValueError as error:
            raise ChunkCorrupt(f"the index of {describe()} is damaged: {error}; restore the shard from its source") from error
        return np.frombuffer(entries, dtype="<u8").reshape(*self.shape, 2)


def shard_index(array: zarr.Array[Any]) -> ShardIndex | None:
    """Return how the shards of `array` are indexed, or None when it has none, or has an index of an unusual kind."""
    metadata: Any = array.metadata
    if array.shards is None:
        return None
    codec = metadata.codecs[0]
    plain = all(isinstance(step, BytesCodec | Crc32cCodec) for step in codec.index_codecs)
    endian = codec.index_codecs[0].endian
    if not plain or endian is None or endian.value != "little":
        return None
    shape = tuple(shard // chunk for shard, chunk in zip(array.shards, array.chunks, strict=True))
    return ShardIndex(shape, codec.index_location.value == "end", len(codec.index_codecs) > 1)


def _numcodec(codec: BloscCodec | GzipCodec | ZstdCodec) -> Any:
    if isinstance(codec, ZstdCodec):
        return numcodecs.Zstd()
    return numcodecs.Blosc() if isinstance(codec, BloscCodec) else numcodecs.GZip()


def _check_crc32c(data: Buffer) -> memoryview:
    view = memoryview(data)
    if len(view) < 4:
        raise ValueError("it is too short to hold its checksum")
    payload = np.frombuffer(view[:-4], dtype=np.uint8)  # an array, since the C function takes no memoryview
    if google_crc32c.value(payload) != int.from_bytes(view[-4:], "little"):
        raise ValueError("its crc32c checksum does not match its bytes")
    return view[:-4]


def _decompress(codec: Any, data: Buffer, target: NDArray[np.uint8]) -> Any:
    """Decompress into `target` when the data declare exactly its size, since numcodecs says nothing of a shorter result."""
    declared = _DECOMPRESSORS[codec.codec_id](memoryview(data))
    if declared is not None and declared > target.nbytes:
        raise ValueError(f"it declares {declared:,} bytes where {target.nbytes:,} belong")
    if declared == target.nbytes:
        codec.decode(data, out=target)
        return target
    return codec.decode(data)


def _zstd_size(data: memoryview) -> int | None:
    """Content size in the frame header (RFC 8878, section 3.1.1.1), None where the frame does not state it."""
    if len(data) < 5 or bytes(data[:4]) != b"\x28\xb5\x2f\xfd":
        raise ValueError("it does not begin like a zstd frame")
    flag, single_segment = data[4] >> 6, data[4] >> 5 & 1
    start = 5 + (not single_segment) + (0, 1, 2, 4)[data[4] & 3]
    length = (int(single_segment), 2, 4, 8)[flag]
    if length == 0 or len(data) < start + length:
        return None
    return int.from_bytes(data[start : start + length], "little") + (256 if length == 2 else 0)


def _blosc_size(data: memoryview) -> int | None:
    """Uncompressed and compressed size, bytes 4 to 7 and 12 to 15 of a Blosc-1 header; a cut buffer is told by the latter."""
    if len(data) < 16 or int.from_bytes(data[12:16], "little") != len(data):
        raise ValueError("it is shorter or longer than its Blosc header says")
    return int.from_bytes(data[4:8], "little")


def _unstated(data: memoryview) -> None:
    return None


_DECOMPRESSORS: dict[str, Callable[[memoryview], int | None]] = {
    "zstd": _zstd_size,
    "blosc": _blosc_size,
    "gzip": _unstated,
    "zlib": _unstated,
    "bz2": _unstated,
    "lz4": _unstated,
    "lzma": _unstated,
}
