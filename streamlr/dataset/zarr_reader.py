"""Reads a zarr array in order, chunk by chunk: each is decoded once, or read in parts, where its rows are wanted if that can be."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import Span
from streamlr.dataset.buffers import Buffer
from streamlr.dataset.codecs import ChunkCodec, ZarrCodec, check_memory, chunk_codec
from streamlr.dataset.consecutive import Consecutive
from streamlr.dataset.integrity import local_root
from streamlr.dataset.parts import Parts, parts_of
from streamlr.dataset.remote import shown
from streamlr.dataset.rows import in_c_order
from streamlr.dataset.stored_chunks import StoredChunks
from streamlr.errors import ChunkMissing

if TYPE_CHECKING:
    from streamlr.dataset.zarr_rows import ZarrRows

PROMOTED_BYTES = 2**22  # of numbers of another dtype, which are promoted before the next are read
Position = tuple[int, ...]


class ZarrReader:
    """Reads a `ZarrRows` in order, holding the last row of chunks; of plain chunks, rows before it too."""

    def __init__(self, rows: ZarrRows) -> None:
        self.rows = rows
        self.chunks_missing = 0
        self._height, self._row_bytes, self._n_rows = rows.decoded_rows, rows.row_bytes, rows.n_rows
        self._positions = [(column,)[: rows.array.ndim - 1] for column in rows.column_chunks]  # within a row of chunks
        self._stored = StoredChunks(rows.array, rows.label, rows.checksums)
        self._codec = chunk_codec(rows.array) or ZarrCodec(rows.array)
        # numbers stored plainly are used where they were read, so they need a place for each column chunk; others share one
        self._in_place = isinstance(self._codec, ChunkCodec) and self._codec.compressor is None
        self._bare = isinstance(self._codec, ChunkCodec) and self._codec.is_bare
        self._copies = _column_copies(rows)
        self._whole = rows.column_chunks == (0,) and rows.column_positions == tuple(range(self._row_bytes // rows.dtype.itemsize))
        # plain chunks, which are all of some rows as they are computed with, are decoded where they are wanted
        self._plain = self._whole and isinstance(self._codec, ChunkCodec) and self._codec.is_plain
        # of large files of rows only such are read or decoded as are wanted: they stay in a core's cache
        self._parts = parts_of(self._codec, self._stored) if self._whole else None
        self._part = Buffer()  # of numbers that are to be promoted
        self._read: defaultdict[int, Buffer] = defaultdict(Buffer)
        self._decoded: defaultdict[int, Buffer] = defaultdict(Buffer)
        self._held = -1  # the last row of chunks
        self._rows = Consecutive(rows.n_columns)  # of plain chunks, it and some before it
        self._most = -(-self._n_rows // self._height) * self._height  # rows in all chunks
        self._pieces: list[NDArray[Any]] = []  # of others, it alone

    def expect(self, spans: Sequence[Span]) -> None:
        """Ask the store for the chunks of these spans, which are read next and in this order, and for no others any more."""
        opened = None if self._parts is None else self._parts.position
        self._stored.expect(_coming(self.rows, self._held if opened is None else opened[0], spans))

    def forget(self) -> None:
        """Let go of the chunks that are held, and of what is known of shards."""
        self._held, self._pieces = -1, []
        self._stored.forget()
        if self._parts is not None:
            self._parts.leave()

    def read_into(self, out: NDArray[Any], start: int) -> None:
        """Fill `out` (m, c) with the rows from `start` on."""
        height = self._height
        stop = start + len(out)
        for row_chunk in range(start // height, -(-stop // height)):
            first, last = max(start, row_chunk * height), min(stop, (row_chunk + 1) * height)
            target = out[first - start : last - start]
            parts = self._parts if row_chunk != self._held and target.flags.c_contiguous else None
            if parts is not None and self._parts_into(parts, target, row_chunk, first):
                self._held = -1  # nor is this one: what is expected goes by the last chunk that was read
            elif not self._plain:
                self._copy_into(target, row_chunk, first)
            elif row_chunk == self._held or not target.flags.c_contiguous or last - first < height:
                target[:] = self._joined(first, last, height)
            else:
                self._held = -1
                self._decode_into(target, row_chunk)

    def view(self, start: int, stop: int) -> NDArray[Any] | None:
        """Return rows as they were decoded, where that is all that is read of them and they lie in one piece."""
        parts = self._parts if start // self._height != self._held else None
        if parts is not None and parts.suits((stop - start) * self._row_bytes):
            return None
        if self._plain:
            return self._joined(start, stop, min(stop - start + self._height, self._most))
        row_chunk, within = divmod(start, self._height)
        if not self._whole or within + stop - start > self._height:
            return None
        self._hold(row_chunk, start)
        return in_c_order(self._pieces[0][within : within + stop - start])

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
        lent = self._bare and into is not None
        stored = self._stored.get(position, Buffer(into) if lent else self._read[column if self._in_place else 0])
        if stored is None:
            return self._filled(position)
        if isinstance(codec, ZarrCodec):
            decoded = codec.decode(stored, self._stored.describe, position)
        else:
            if into is None:
                with self._memory_for(position, nbytes := 0 if self._in_place else codec.nbytes):
                    into = self._decoded[column].take(nbytes)
            decoded = codec.decode(stored, into, self._stored.describe, position)
        return decoded.reshape(self._height, -1)

    def _joined(self, start: int, stop: int, most: int) -> NDArray[np.float64]:
        """Return rows of plain chunks that were decoded one behind the other, in memory for `most` rows."""
        height, rows = self._height, self._rows
        if start // height != self._held:
            rows.begin(start // height * height)
        while (row := rows.stop) < stop:
            count = 1 if row < start else -(-(stop - row) // height)  # what comes before `start` makes room when it is decoded
            self._held = -1  # until all is well, so that an error leaves no mixture
            with self._memory_for((row // height, *self._positions[0]), height * self._row_bytes):
                room = rows.room(count * height, most, start)
            with self._counting(row // height, start):
                for number in range(count):
                    self._decode_into(room[number * height : (number + 1) * height], row // height + number)
            rows.add(count * height)
            self._held = row // height + count - 1
        return rows.rows(start, stop)

    @contextmanager
    def _memory_for(self, position: Position, nbytes: int) -> Iterator[None]:
        """Say for which chunk there is no memory, where there is none."""
        try:
            yield
        except (MemoryError, OSError) as error:
            check_memory(error, self._stored.describe(position), nbytes)
            raise

    def _filled(self, position: Position) -> NDArray[Any]:
        """Return what an absent chunk stands for, if it may be absent, and count it."""
        if not self.rows.may_lack_chunks:
            raise ChunkMissing(self._absence(position))
        self.chunks_missing += 1
        array = self.rows.array
        fill = 0 if array.fill_value is None else array.fill_value  # none is stated (v2): zarr reads zeros
        return np.broadcast_to(np.array(fill, array.dtype), (self._height, math.prod(array.chunks[1:])))

    def _hold(self, row_chunk: int, first: int) -> None:
        if row_chunk == self._held:
            return
        self._held = -1  # nothing is held while a chunk is being replaced, so that an error leaves no mixture
        self._pieces = []  # and its memory is free for the next one
        with self._counting(row_chunk, first):
            self._pieces = [self.chunk((row_chunk, *columns)) for columns in self._positions]
        self._held = row_chunk

    def _decode_into(self, target: NDArray[np.float64], row_chunk: int) -> None:
        """Fill `target` with all rows of a plain chunk."""
        numbers = self.chunk((row_chunk, *self._positions[0]), target.reshape(-1).view(np.uint8))
        if not np.may_share_memory(numbers, target):
            target[...] = numbers

    def _copy_into(self, target: NDArray[Any], row_chunk: int, first: int) -> None:
        """Fill `target` with rows of a chunk that is held, from `first` on."""
        self._hold(row_chunk, first)
        within = first - row_chunk * self._height
        for piece, (to, source) in zip(self._pieces, self._copies, strict=True):
            target[:, to] = piece[within : within + len(target), source]

    def _parts_into(self, parts: Parts, target: NDArray[Any], row_chunk: int, first: int) -> bool:
        """Fill `target` with rows of a chunk that is read in parts, from `first` on, and return whether that can be."""
        position, within = (row_chunk, *self._positions[0]), first - row_chunk * self._height
        assert isinstance(self._codec, ChunkCodec), "others have no parts"
        dtype, count = self._codec.dtype, max(len(target), 1)
        if target.dtype != dtype:
            count = min(max(PROMOTED_BYTES // self._row_bytes, 1), count)
            with self._memory_for(position, nbytes := count * self._row_bytes):
                room = self._part.take(nbytes).view(dtype).reshape(count, -1)
        for start in range(0, len(target), count):
            part = target[start : start + count]
            stored = part if target.dtype == dtype else room[: len(part)]
            into, at = stored.reshape(-1).view(np.uint8), (within + start) * self._row_bytes
            if not parts.fill(position, at, into, last=first + start + len(part) == self._n_rows):
                return False
            if stored is not part:
                part[...] = stored
        return True

    @contextmanager
    def _counting(self, row_chunk: int, first: int) -> Iterator[None]:
        """Count absent chunks where their first row is wanted, so that two who share a chunk do not both."""
        counted = self.chunks_missing
        yield
        if first > row_chunk * self._height:
            self.chunks_missing = counted

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
