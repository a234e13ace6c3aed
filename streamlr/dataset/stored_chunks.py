"""The stored bytes of an array's chunks, in files or any zarr store, sharded or not: read whole, or opened to be read in parts."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
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
from streamlr.dataset.files_ahead import Files
from streamlr.dataset.integrity import CHECKSUM_BYTES, chunk_keys, describe_chunk, local_root
from streamlr.dataset.read_ahead import Question, ReadAhead, chunks_ahead
from streamlr.dataset.remote import shown
from streamlr.dataset.synchronous import SynchronousStore, answers_at_once, plain_bytes
from streamlr.errors import ChunkCorrupt, ChunkMissing, DataError, StoreUnreachable, StreamlrError
from streamlr.files import check_open_files

PAUSES = (0.1, 0.5)  # seconds before a failed read is tried again: networks and network disks fail for a moment
Position = tuple[int, ...]
Stored = bytes | memoryview
Entries = NDArray[np.uint64]
Answer = memoryview | Exception | None  # the bytes, what went wrong, or nothing there
Early = tuple[list[Answer], list[Answer]]  # for the shard's index and for the chunk: what was answered before it was wanted


def is_local(array: zarr.Array[Any]) -> bool:
    """Whether the chunks are plain files, which are read past zarr: a store that wraps files may do more than read them."""
    return type(array.store) is LocalStore


def is_asked_ahead(array: zarr.Array[Any]) -> bool:
    """Whether chunks are asked for before they are wanted: from a store that lets its readers wait."""
    return not is_local(array) and not answers_at_once(array.store)


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
        self._columns = -(-array.shape[1] // array.chunks[1]) if array.ndim == 2 else 1  # chunks side by side
        self._nbytes = math.prod(array.chunks) * array.dtype.itemsize
        self._key = chunk_keys(array)
        self._index = shard_index(array)
        self._per_shard = None if array.shards is None else tuple(a // b for a, b in zip(array.shards, array.chunks, strict=True))
        self._shards: dict[Position, Entries] = {}  # of one row of shards
        self._direct: Files | SynchronousStore | None = None
        if is_local(array):
            self._direct = Files(f"{local_root(array)}/")
        elif not is_asked_ahead(array):
            self._direct = SynchronousStore(array.store)
        else:
            self._ahead = ReadAhead(self._ask_chunk if self._per_shard is None else self._ask_inner, chunks_ahead(self._nbytes))
            self._indexes: dict[Position, Future[tuple[Answer, Entries | None]]] = {}  # of shards that are ahead

    def expect(self, positions: Iterable[Position]) -> None:
        """Say which chunks will be asked for next, in this order, so that disk or network can begin before they are.

        Whatever was expected before is dropped.
        """
        if self._direct is None:
            for index in self._indexes.values():
                index.cancel()  # it may be that what waits for it has not begun to wait
            self._indexes.clear()
            self._ahead.expect(positions)
        elif self._per_shard is None:
            self._direct.expect(map(self._key, positions))

    def forget(self) -> None:
        """Let go of the indexes of shards: they are read again with the next chunk."""
        self._shards = {}

    @property
    def are_files(self) -> bool:
        """Whether a chunk is a file and nothing else, of which a part can be had."""
        return isinstance(self._direct, Files) and self._per_shard is None and self._checksums is None

    def open(self, position: Position) -> int:
        """Open the file of a chunk, to be read and closed by who asks."""
        assert isinstance(self._direct, Files), "others are no files"
        return self._direct.open(self._key(position))

    def get(self, position: Position, buffer: Buffer) -> Stored | None:
        """Return the stored bytes of the chunk at `position`, in `buffer` where they come from a file; None when it is absent.

        Raises
        ------
        ChunkMissing
            The chunk, or its shard, is there but empty.
        ChunkCorrupt
            It cannot be read, is cut short inside its shard, or is another than the manifest says.
        DataError
            The index of its shard is not one that is read here.
        MemoryLimitExceeded, ResourceError
            There was no memory to read it, or too many files are open.
        StoreUnreachable
            Nor can anything else be read from its store.
        """
        index, chunk = ([], []) if self._direct is not None else self._ahead.answer(position)
        if self._per_shard is None:
            stored = self._read(self._key(position), None, buffer, chunk)
            if stored is not None and not len(stored):
                raise ChunkMissing(f"{self.describe(position)} is there but empty; restore it from its source")
        else:
            stored = self._from_shard(position, buffer, index, chunk)
        if stored is not None and self._checksums is not None:
            self._check_manifest(position, stored, self._checksums)
        return stored

    def describe(self, position: Position) -> str:
        """Name the chunk at `position` and its rows."""
        return describe_chunk(self.array, self.label, position)

    def _from_shard(self, position: Position, buffer: Buffer, index: list[Answer], chunk: list[Answer]) -> Stored | None:
        if self._index is None:
            raise DataError(f"array {self.label!r} has a shard index of an unusual kind; write it with the default")
        shard, place = self._placed(position)
        entries = self._shard_entries(shard, self._index, index)
        if entries is None:
            return None
        request = _request(entries[place])
        if request is None:
            return None
        stored = self._read(self._key(shard), request, buffer, chunk)
        if stored is None or len(stored) != request.end - request.start:
            raise ChunkCorrupt(f"{self.describe(position)} is cut short inside its shard; restore the shard from its source")
        return stored

    def _placed(self, position: Position) -> tuple[Position, Position]:
        """Return the shard that holds a chunk, and the chunk's position in it."""
        both = [divmod(p, n) for p, n in zip(position, self._per_shard or position, strict=True)]
        return tuple(shard for shard, _ in both), tuple(place for _, place in both)

    def _shard_entries(self, shard: Position, index: ShardIndex, early: list[Answer]) -> Entries | None:
        if shard not in self._shards:
            key = self._key(shard)
            if self._direct is None:
                self._indexes.pop(shard, None)
            stored = self._read(key, _index_request(index), Buffer(), early)
            if stored is None:
                return None
            if not len(stored):
                raise ChunkMissing(f"shard {key!r} of array {self.label!r} is there but empty; restore it from its source")
            entries = index.read(stored, f"shard {key!r} of array {self.label!r}")
            self._shards = {other: held for other, held in self._shards.items() if other[0] == shard[0]} | {shard: entries}
        return self._shards[shard]

    def _read(self, key: str, request: ByteRequest | None, buffer: Buffer, early: list[Answer]) -> Stored | None:
        pauses = iter(PAUSES)
        while True:
            try:
                if self._direct is not None:
                    return self._direct.read(key, request, buffer)
                answer = early.pop() if early else sync(self._ask(key, request))
                if isinstance(answer, Exception):
                    raise answer
                return answer
            except (FileNotFoundError, NotADirectoryError):
                return None
            except StreamlrError:  # of a store of ours, which says what to do
                raise
            except Exception as error:  # remote stores raise what their clients raise
                check_memory(error, f"{key!r} of array {self.label!r}", self._nbytes)
                pause = next(pauses, None)
                if pause is None or isinstance(error, PermissionError | IsADirectoryError):
                    raise self._unreadable(key, error) from error
                time.sleep(pause)

    def _unreadable(self, key: str, error: Exception) -> StreamlrError:
        """Tell a chunk that cannot be read from a store of which nothing can be read any more."""
        place = f"{key!r} of array {self.label!r} in {shown(self.array.store)}"
        check_open_files(error, place)
        what = f"{place} cannot be read: {shown(error)}"
        if isinstance(error, ConnectionError | TimeoutError) and not self._store_answers():
            return StoreUnreachable(f"{what}; nor can its metadata: check network and server, and run it again")
        return ChunkCorrupt(f"{what}; check disk, network and permissions")

    def _store_answers(self) -> bool:
        name = "zarr.json" if self.array.metadata.zarr_format == 3 else ".zarray"
        with suppress(Exception):  # remote stores raise what their clients raise
            return sync((self.array.store_path / name).get()) is not None
        return False

    async def _ask(self, key: str, request: ByteRequest | None) -> Answer:
        try:
            found = await self.array.store.get(key, default_buffer_prototype(), request)
        except Exception as error:  # it is raised when its chunk is wanted
            return error
        return None if found is None else plain_bytes(found)

    def _ask_chunk(self, position: Position) -> Question[Early]:
        return partial(self._ask_whole, self._key(position))

    async def _ask_whole(self, key: str) -> Early:
        return [], [await self._ask(key, None)]

    def _ask_inner(self, position: Position) -> Question[Early]:
        """Ask for a chunk in a shard; for the shard's index too, where nobody has yet."""
        shard, place = self._placed(position)
        if shard in self._shards or self._index is None:  # by its turn, others may have taken the shard's place
            return partial(self._ask_part, shard, place, None, self._shards.get(shard))
        if shard not in self._indexes:
            self._indexes[shard] = self._ahead.start(self._ask_index(shard, self._index))
        return partial(self._ask_part, shard, place, self._indexes[shard], None)

    async def _ask_part(
        self, shard: Position, place: Position, index: Future[tuple[Answer, Entries | None]] | None, entries: Entries | None
    ) -> Early:
        early: list[Answer] = []
        if index is not None:
            answer, entries = await asyncio.wrap_future(index)
            early = [answer]
        if entries is None or (request := _request(entries[place])) is None:
            return early, []
        return early, [await self._ask(self._key(shard), request)]

    async def _ask_index(self, shard: Position, index: ShardIndex) -> tuple[Answer, Entries | None]:
        answer = await self._ask(self._key(shard), _index_request(index))
        try:
            return answer, index.read(answer, "") if isinstance(answer, memoryview) else None
        except ChunkCorrupt:  # it is read again, and named, when the first chunk of the shard is wanted
            return answer, None

    def _check_manifest(self, position: Position, stored: Stored, checksums: bytes) -> None:
        at = (position[0] * self._columns + sum(position[1:])) * CHECKSUM_BYTES
        if stored[-CHECKSUM_BYTES:] != checksums[at : at + CHECKSUM_BYTES]:
            raise ChunkCorrupt(
                f"{self.describe(position)} is not the chunk that was written there (its checksum differs from the manifest's); "
                "restore it from its source"
            )


def _request(entry: Entries) -> RangeByteRequest | None:
    """Return where a shard's index says that a chunk is; None where it says that there is none."""
    offset, length = entry.tolist()
    return None if offset == ABSENT else RangeByteRequest(offset, offset + length)


def _index_request(index: ShardIndex) -> ByteRequest:
    return SuffixByteRequest(index.nbytes) if index.at_end else RangeByteRequest(0, index.nbytes)
