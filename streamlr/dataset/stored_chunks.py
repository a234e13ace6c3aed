"""The stored bytes of an array's chunks: in files or any zarr store, sharded or not, read whole or not at all."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.buffer import default_buffer_prototype
from zarr.core.sync import sync  # stores are bound to zarr's own event loop, and this is the way in
from zarr.storage import LocalStore

from streamlr.dataset.buffers import Buffer
from streamlr.dataset.codecs import ABSENT, ShardIndex, check_memory, shard_index
from streamlr.dataset.integrity import CHECKSUM_BYTES, chunk_key, describe_chunk, local_root
from streamlr.errors import ChunkCorrupt, ChunkMissing, DataError

PAUSES = (0.1, 0.5)  # seconds before a failed read is tried again: networks and network disks fail for a moment
Position = tuple[int, ...]
Stored = bytes | memoryview


class StoredChunks:
    """Fetches the stored bytes of chunks.

    Parameters
    ----------
    array : zarr.Array
        The array.
    label : str
        Its name, for messages.
    checksums : bytes or None
        The manifest's four bytes for each chunk, where the store has a manifest.
    """

    def __init__(self, array: zarr.Array[Any], label: str, checksums: bytes | None) -> None:
        self.array, self.label = array, label
        self._checksums = checksums
        self._index = shard_index(array)
        self._shard: tuple[Position, NDArray[np.uint64]] | None = None
        # a store that wraps files may do more than read them, so only plain files are read past zarr
        self._files = local_root(array) if type(array.store) is LocalStore else None

    def get(self, position: Position, buffer: Buffer) -> Stored | None:
        """Return the stored bytes of the chunk at `position`, in `buffer` where they come from a file; None when it is absent.

        Raises
        ------
        ChunkMissing
            The chunk, or its shard, is there but empty.
        ChunkCorrupt
            It cannot be read, is cut short inside its shard, or is another than the manifest says.
        MemoryLimitExceeded
            There was no memory to read it.
        """
        stored = (
            self._whole(position, buffer) if self.array.shards is None else self._from_shard(position, self.array.shards, buffer)
        )
        if stored is not None and self._checksums is not None:
            self._check_manifest(position, stored, self._checksums)
        return stored

    def describe(self, position: Position) -> str:
        """Name the chunk at `position` and its rows."""
        return describe_chunk(self.array, self.label, position)

    def _whole(self, position: Position, buffer: Buffer) -> Stored | None:
        stored = self._read(chunk_key(self.array, position), None, buffer)
        if stored is not None and not len(stored):
            raise ChunkMissing(f"{self.describe(position)} is there but empty; restore it from its source")
        return stored

    def _from_shard(self, position: Position, shards: Position, buffer: Buffer) -> Stored | None:
        if self._index is None:
            raise DataError(f"array {self.label!r} has a shard index of an unusual kind; write it with the default")
        per_shard = tuple(shard // chunk for shard, chunk in zip(shards, self.array.chunks, strict=True))
        shard = tuple(p // n for p, n in zip(position, per_shard, strict=True))
        entries = self._shard_entries(shard, self._index)
        if entries is None:
            return None
        offset, length = (int(number) for number in entries[tuple(p % n for p, n in zip(position, per_shard, strict=True))])
        if offset == ABSENT:
            return None
        stored = self._read(chunk_key(self.array, shard), RangeByteRequest(offset, offset + length), buffer)
        if stored is None or len(stored) != length:
            raise ChunkCorrupt(f"{self.describe(position)} is cut short inside its shard; restore the shard from its source")
        return stored

    def _shard_entries(self, shard: Position, index: ShardIndex) -> NDArray[np.uint64] | None:
        if self._shard is None or self._shard[0] != shard:
            key = chunk_key(self.array, shard)
            request = SuffixByteRequest(index.nbytes) if index.at_end else RangeByteRequest(0, index.nbytes)
            stored = self._read(key, request, Buffer())
            if stored is None:
                return None
            if not len(stored):
                raise ChunkMissing(f"shard {key!r} of array {self.label!r} is there but empty; restore it from its source")
            self._shard = shard, index.read(stored, lambda: f"shard {key!r} of array {self.label!r}")
        return self._shard[1]

    def _read(self, key: str, request: ByteRequest | None, buffer: Buffer) -> Stored | None:
        pauses = iter(PAUSES)
        while True:
            try:
                if self._files is not None:
                    return _read_file(self._files / key, request, buffer)
                found = sync(self.array.store.get(key, default_buffer_prototype(), request))
                return None if found is None else found.to_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
            except Exception as error:  # remote stores raise what their clients raise
                nbytes = math.prod(self.array.chunks) * self.array.dtype.itemsize
                check_memory(error, f"{key!r} of array {self.label!r}", nbytes)
                pause = next(pauses, None)
                if pause is None or isinstance(error, PermissionError | IsADirectoryError):
                    raise ChunkCorrupt(
                        f"{key!r} of array {self.label!r} in {self.array.store} cannot be read: {error}; "
                        "check disk, network and permissions"
                    ) from error
                time.sleep(pause)

    def _check_manifest(self, position: Position, stored: Stored, checksums: bytes) -> None:
        grid = tuple(-(-length // size) for length, size in zip(self.array.shape, self.array.chunks, strict=True))
        at = int(np.ravel_multi_index(position, grid)) * CHECKSUM_BYTES
        if bytes(stored[-CHECKSUM_BYTES:]) != checksums[at : at + CHECKSUM_BYTES]:
            raise ChunkCorrupt(
                f"{self.describe(position)} is not the chunk that was written there (its checksum differs from the manifest's); "
                "restore it from its source"
            )


def _read_file(path: Path, request: ByteRequest | None, buffer: Buffer) -> memoryview:
    """Read a file, or a part of it, into the memory of `buffer`."""
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, 2)
        start, stop = 0, size
        if isinstance(request, SuffixByteRequest):
            start = max(size - request.suffix, 0)
        elif isinstance(request, RangeByteRequest):
            start, stop = min(request.start, size), min(request.end, size)
        file.seek(start)
        view = buffer.take(stop - start).data
        done = 0
        while done < len(view) and (count := file.readinto(view[done:])):
            done += count
        return view[:done]
