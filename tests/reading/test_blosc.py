"""Blocks of Blosc as any writer writes them: all bytes of any part, or what whoever reads whole chunks makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numcodecs
import numpy as np
import pytest
import zarr
from chunk_files import numbered_files
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec
from zarr.storage import MemoryStore

from streamlr.dataset import blosc_blocks
from streamlr.dataset.blosc_blocks import BloscBlocks
from streamlr.dataset.codecs import chunk_codec
from streamlr.errors import ChunkCorrupt

HEADER = 16
NUMBERS = 40_013  # the last block is short
BYTES = 8 * NUMBERS
BLOCK = 2**16  # the least for which Blosc splits blocks of eight bytes each
BLOCKS = -(-BYTES // BLOCK)
CODEC = chunk_codec(
    zarr.create_array(MemoryStore(), shape=(NUMBERS,), chunks=(NUMBERS,), dtype="f8", compressors=[BloscCodec(cname="lz4")])
)
RNG = np.random.default_rng(5)
CONTENTS = [
    RNG.normal(size=NUMBERS).tobytes(),
    np.arange(NUMBERS, dtype=float).tobytes(),
    bytes(BYTES // 2) + RNG.bytes(BYTES - BYTES // 2),
    bytes(BYTES),
]


def compress(data: bytes, **options) -> bytes:
    """Return a file; its blocks have `BLOCK` bytes unless there are `options`."""
    compressor = numcodecs.Blosc(**{"cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 2**12} | options)
    return bytes(compressor.encode(np.frombuffer(data)))


def disordered(file: bytes, order: list[int]) -> bytes:
    """Return a file with its blocks in another order, as several threads may have written them."""
    table = np.frombuffer(file[HEADER : HEADER + 4 * len(order)], "<i4")
    edges = [*table.tolist(), len(file)]
    blocks, at, starts = [], HEADER + 4 * len(order), np.empty_like(table)
    for number in order:
        starts[number] = at
        blocks.append(file[edges[number] : edges[number + 1]])
        at += len(blocks[-1])
    return file[:HEADER] + starts.tobytes() + b"".join(blocks)


def whole(file: bytes) -> bytes | None:
    """Return what the file decodes to as a whole."""
    try:
        return CODEC.decode(file, np.zeros(BYTES, dtype=np.uint8), lambda position: f"chunk {position}", (0,)).tobytes()
    except ChunkCorrupt:
        return None


@contextmanager
def reading(*files: bytes, piece: int = 2**16) -> Iterator[BloscBlocks]:
    """Yield what reads parts of these files, and see afterwards that none is open any more."""
    with pytest.MonkeyPatch.context() as patch, numbered_files(*files) as open_file:
        patch.setattr(blosc_blocks, "PIECE_BYTES", piece)
        parts = BloscBlocks(open_file, BYTES)
        yield parts
        parts.leave()


def pieces(parts: BloscBlocks, chunk: int, cuts: list[int], last: bool = False) -> bytes | None:
    """Return a chunk's bytes from the first of these places to the last, decoded piece by piece; None where all is not well."""
    found = []
    for start, stop in pairwise(cuts):
        into = np.empty(stop - start, dtype=np.uint8)
        if not parts.fill(chunk, start, into, last=last and stop == cuts[-1]):
            assert parts.position is None
            return None
        found.append(into.tobytes())
    return b"".join(found)


CUTS = st.lists(st.integers(0, BYTES), min_size=2, max_size=8, unique=True).map(sorted)
OPTIONS = st.fixed_dictionaries(
    {
        "cname": st.sampled_from(["lz4", "lz4hc", "zstd", "zlib", "blosclz"]),
        "clevel": st.sampled_from([1, 5]),
        "shuffle": st.sampled_from([0, 1, 2]),
        "blocksize": st.sampled_from([0, 2**10, 2**15, 10_000]),
    }
)


@settings(max_examples=200, deadline=None)
@given(content=st.sampled_from(CONTENTS), options=OPTIONS, cuts=CUTS, again=CUTS, piece=st.sampled_from([1, 2**16, 2**23]))
def test_parts_are_those_of_the_whole(content, options, cuts, again, piece):
    file = compress(content, **options)
    assert whole(file) == content
    with reading(file, compress(CONTENTS[0]), piece=piece) as parts:
        if file[2] & 2:  # nothing was gained, and the numbers are as they were
            assert pieces(parts, 0, cuts) is None
        else:
            assert pieces(parts, 0, cuts, last=True) == content[cuts[0] : cuts[-1]]
            assert pieces(parts, 0, again) == content[again[0] : again[-1]]
            assert pieces(parts, 0, [0, BYTES]) == content
        assert pieces(parts, 1, again) == CONTENTS[0][again[0] : again[-1]]


@settings(deadline=None)
@given(data=st.data(), content=st.sampled_from(CONTENTS), cuts=CUTS)
def test_blocks_may_lie_in_any_order(data, content, cuts):
    file = compress(content)
    file = disordered(file, data.draw(st.permutations(range(BLOCKS))))
    assert whole(file) == content
    with reading(file) as parts:
        assert pieces(parts, 0, cuts, last=True) == content[cuts[0] : cuts[-1]]


def test_blocks_that_lie_too_far_apart_are_left_to_who_reads_whole_chunks(monkeypatch):
    block = 2**12
    monkeypatch.setattr(blosc_blocks, "BLOCK_BYTES", block)
    file = compress(CONTENTS[0], cname="zstd", blocksize=block)
    order = [0, *range(2, -(-BYTES // block)), 1]
    with reading(file, disordered(file, order), piece=2 * block) as parts:
        assert pieces(parts, 0, [0, BYTES]) == CONTENTS[0]
        assert pieces(parts, 1, [0, block, 2 * block]) == CONTENTS[0][: 2 * block]
        assert pieces(parts, 1, [block, 3 * block]) is None


@settings(max_examples=500, deadline=None)
@given(
    content=st.sampled_from(CONTENTS),
    options=OPTIONS,
    place=st.one_of(st.integers(0, 200), st.integers(0, BYTES)),
    flip=st.integers(1, 255),
    cuts=CUTS,
)
def test_damaged_bytes_give_what_they_give_to_who_reads_whole_chunks(content, options, place, flip, cuts):
    damaged = bytearray(compress(content, **options))
    damaged[place % len(damaged)] ^= flip
    with reading(bytes(damaged)) as parts:
        found = pieces(parts, 0, sorted({0, *cuts, BYTES}))
        assert found is None or found == whole(bytes(damaged))


@pytest.mark.parametrize("more", [1, 2, 4, 7, 8, 64, -1, -8])
@pytest.mark.parametrize("cname", ["lz4", "zstd"])
def test_blocks_of_another_size_than_they_have_are_not_believed_in_any_part(cname, more):
    damaged = bytearray(compress(CONTENTS[0], cname=cname))
    damaged[8:12] = (int.from_bytes(damaged[8:12], "little") + more).to_bytes(4, "little")
    with reading(bytes(damaged)) as parts:
        assert pieces(parts, 0, [0, 5_000]) is None
        assert pieces(parts, 0, [0, 200_000]) is None
    assert whole(bytes(damaged)) is None


@given(content=st.sampled_from(CONTENTS), cuts=CUTS, part=st.floats(0, 1), extra=st.binary(max_size=9))
def test_a_file_of_another_size_is_left_to_who_reads_whole_chunks(content, cuts, part, extra):
    file = compress(content)
    with reading(file[: int(part * (len(file) - 1))], file + b"\0" + extra) as parts:
        for chunk in (0, 1):
            assert pieces(parts, chunk, cuts) is None


def test_the_rest_of_the_last_chunk_is_seen_to_decode():
    file = bytearray(compress(CONTENTS[0]))
    last = int(np.frombuffer(file[HEADER : HEADER + 4 * BLOCKS], "<i4")[-1])
    file[last : last + 4] = b"\xff" * 4  # more bytes than there are, in its last block
    with reading(bytes(file)) as parts:
        assert pieces(parts, 0, [0, 1000]) == CONTENTS[0][:1000]
        assert pieces(parts, 0, [1000, 2000], last=True) is None
    assert whole(bytes(file)) is None


def test_what_is_unusual_is_left_to_who_reads_whole_chunks(monkeypatch):
    monkeypatch.setattr(blosc_blocks, "BLOCK_BYTES", BLOCK)
    copied = compress(CONTENTS[0], shuffle=0)
    assert copied[2] & 2
    unusual = [compress(CONTENTS[0][:-8]), compress(CONTENTS[1], blocksize=2**14), copied, b"", b"abc"]
    with reading(*unusual, compress(CONTENTS[0])) as parts:
        for number in range(len(unusual)):
            assert pieces(parts, number, [0, 100]) is None
        assert pieces(parts, len(unusual), [0, 100]) == CONTENTS[0][:100]


def test_a_part_that_was_held_is_not_decoded_again(monkeypatch):
    decoded, decompress = [], numcodecs.blosc.decompress
    monkeypatch.setattr(numcodecs.blosc, "decompress", lambda stored, into: decoded.append(len(into)) or decompress(stored, into))
    with reading(compress(CONTENTS[0])) as parts:
        assert pieces(parts, 0, [*range(0, BYTES, 50_000), BYTES]) == CONTENTS[0]
    assert sum(decoded) == BYTES
