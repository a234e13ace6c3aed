"""Frames of zstd as other writers write them: all their numbers or a named error, wherever they were cut."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import numpy as np
import pytest
import zarr
import zstandard
from chunk_files import numbered_files
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from streamlr.dataset import zstd_stream
from streamlr.dataset.codecs import chunk_codec
from streamlr.dataset.zstd_stream import ZstdStream
from streamlr.errors import ChunkCorrupt

SHAPE = (10_000, 5)  # 400,000 bytes: four blocks
BYTES = 8 * SHAPE[0] * SHAPE[1]
CODEC = chunk_codec(zarr.create_array(MemoryStore(), shape=SHAPE, chunks=SHAPE, dtype="f8", compressors=[ZstdCodec()]))
RNG = np.random.default_rng(3)
CONTENTS = [
    RNG.normal(size=SHAPE).tobytes(),  # compressed blocks
    RNG.bytes(BYTES),  # raw blocks
    bytes(BYTES),  # runs
    bytes(BYTES // 2) + RNG.bytes(BYTES // 4) + RNG.normal(size=BYTES // 32).tobytes(),
]
COMPRESSORS = [
    zstandard.ZstdCompressor(level=1, write_checksum=checked, write_content_size=sized)
    for checked in (False, True)
    for sized in (False, True)
]
FRAMES = [(data, compressor.compress(data)) for data in CONTENTS for compressor in COMPRESSORS]
WHICH = st.integers(0, len(FRAMES) - 1)


def decode(frame: bytes) -> bytes:
    return CODEC.decode(frame, np.zeros(BYTES, dtype=np.uint8), lambda position: f"chunk {position}", (0, 0)).tobytes()


@pytest.mark.parametrize("number", range(len(FRAMES)))
def test_a_whole_frame(number):
    data, frame = FRAMES[number]
    assert decode(frame) == data
    assert decode(memoryview(frame)) == data


@given(number=WHICH, part=st.floats(0, 1), missing=st.integers(1, 12), near_end=st.booleans())
def test_a_frame_cut_anywhere_is_refused(number, part, missing, near_end):
    _, frame = FRAMES[number]
    with pytest.raises(ChunkCorrupt, match=r"chunk \(0, 0\)"):
        decode(frame[: -min(missing, len(frame))] if near_end else frame[: int(part * (len(frame) - 1))])


@given(number=WHICH, extra=st.binary(min_size=1, max_size=20))
def test_a_frame_with_more_behind_it_is_refused(number, extra):
    _, frame = FRAMES[number]
    for longer in (frame + extra, frame + frame):
        with pytest.raises(ChunkCorrupt):
            decode(longer)


SKIPPED = b"\x5a\x2a\x4d\x18\x03\x00\x00\x00abc"


@pytest.mark.parametrize("first", COMPRESSORS)
@pytest.mark.parametrize("second", COMPRESSORS)
@pytest.mark.parametrize("data", CONTENTS, ids=range(len(CONTENTS)))
def test_several_frames_are_one_chunk(first, second, data):
    """As of writers that append, or compress in parts; frames that are to be skipped, or empty, may lie between."""
    parts = [
        SKIPPED,
        first.compress(data[:1000]),
        second.compress(b""),
        SKIPPED,
        second.compress(data[1000:]),
        SKIPPED,
    ]
    whole = b"".join(parts)
    assert decode(whole) == data
    with pytest.raises(ChunkCorrupt, match="cut off"):
        decode(whole[:-1])
    for missing in (1, 4):
        with pytest.raises(ChunkCorrupt):
            decode(b"".join(part for place, part in enumerate(parts) if place != missing))


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_thread_decodes_after_what_it_could_not(compressor):
    data, frame = CONTENTS[0], compressor.compress(CONTENTS[0])
    damaged = bytearray(frame)
    damaged[16:48] = b"\xff" * 32  # behind the header of the first block: what its numbers are coded by
    for stored in (compressor.compress(data + data), frame[:-1], bytes(damaged)):
        with pytest.raises(ChunkCorrupt):
            decode(stored)
        assert decode(frame) == data


def test_threads_decode_side_by_side():
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(decode, [frame for _, frame in FRAMES] * 8))
    assert found == [data for data, _ in FRAMES] * 8


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("found", [0, 8, BYTES - 8, BYTES + 8, 2**26])
def test_a_frame_of_another_size_is_refused(compressor, found):
    with pytest.raises(ChunkCorrupt, match=f"{BYTES:,}"):
        decode(compressor.compress(bytes(found)))


@given(number=st.sampled_from([2, 3]), place=st.integers(0), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_where_the_frame_has_a_checksum(number, place, bit):
    data, frame = FRAMES[number]
    damaged = bytearray(frame)
    damaged[place % len(frame)] ^= 1 << bit
    try:
        found = decode(bytes(damaged))
    except ChunkCorrupt:
        return
    assert found == data  # bits of the header that change nothing that is decoded


@given(noise=st.binary(max_size=200))
def test_what_is_no_frame_is_refused(noise):
    for stored in (noise, FRAMES[0][1][:4] + noise):
        with pytest.raises(ChunkCorrupt):
            decode(stored)


@contextmanager
def streaming(*files: bytes) -> Iterator[ZstdStream]:
    """Yield a stream of these files, and see afterwards that none is open any more."""
    with pytest.MonkeyPatch.context() as patch, numbered_files(*files) as open_file:
        patch.setattr(zstd_stream, "READ_BYTES", 5_000)
        patch.setattr(zstd_stream, "SKIPPED_BYTES", 70_000)
        stream = ZstdStream(open_file, lambda number: f"chunk {number}", BYTES)
        yield stream
        stream.leave()


def pieces(stream: ZstdStream, chunk: int, cuts: list[int], last: bool = False) -> bytes | None:
    """Return a chunk's bytes from the first of these places to the last, decoded piece by piece; None where all is not well."""
    found = []
    for start, stop in pairwise(cuts):
        into = np.empty(stop - start, dtype=np.uint8)
        try:
            if not stream.fill(chunk, start, into, last=last and stop == cuts[-1]):
                assert not found, "what was given is believed"
                return None
        except ChunkCorrupt as error:
            if f"chunk {chunk} cannot be decoded" not in str(error):
                raise
            return None
        found.append(into.tobytes())
    return b"".join(found)


CUTS = st.lists(st.integers(0, BYTES), min_size=2, max_size=8, unique=True).map(sorted)
SIZED = [number for number in range(len(FRAMES)) if zstandard.frame_content_size(FRAMES[number][1]) == BYTES]


@given(number=st.sampled_from(SIZED), cuts=CUTS, again=CUTS)
def test_a_stream_has_the_bytes_of_any_pieces(number, cuts, again):
    data, frame = FRAMES[number]
    with streaming(frame, FRAMES[SIZED[0]][1]) as stream:
        assert pieces(stream, 0, cuts) == data[cuts[0] : cuts[-1]]
        assert pieces(stream, 1, again) == FRAMES[SIZED[0]][0][again[0] : again[-1]]
        assert pieces(stream, 0, again) == data[again[0] : again[-1]]
        assert pieces(stream, 0, [0, 10, BYTES]) == data


@settings(max_examples=500)
@given(number=st.sampled_from(SIZED), cuts=CUTS, part=st.floats(0, 1), missing=st.integers(1, 16), near_end=st.booleans())
def test_a_stream_of_a_frame_cut_anywhere_does_not_come_to_its_end(number, cuts, part, missing, near_end):
    _, frame = FRAMES[number]
    with streaming(frame[:-missing] if near_end else frame[: int(part * (len(frame) - 1))]) as stream:
        assert pieces(stream, 0, sorted({0, *cuts, BYTES})) is None


@pytest.mark.parametrize("missing", range(1, 25))
@pytest.mark.parametrize("number", SIZED)
def test_a_stream_of_a_frame_that_lacks_its_last_bytes(number, missing):
    _, frame = FRAMES[number]
    with streaming(frame[:-missing]) as stream:
        assert pieces(stream, 0, [0, BYTES // 2, BYTES]) is None
        assert pieces(stream, 0, [0, BYTES - 1, BYTES]) is None


@given(number=st.sampled_from(SIZED), cuts=CUTS, extra=st.binary(min_size=1, max_size=20))
def test_a_stream_with_more_behind_it_does_not_come_to_its_end(number, cuts, extra):
    _, frame = FRAMES[number]
    for longer in (frame + extra, frame + frame, frame + SKIPPED[:-1]):
        with streaming(longer) as stream:
            assert pieces(stream, 0, sorted({0, *cuts, BYTES})) is None


@pytest.mark.parametrize("place", [-1, -2, -3, -4])
def test_a_stream_meets_its_checksum(place):
    data, frame = next(FRAMES[number] for number in SIZED if zstandard.get_frame_parameters(FRAMES[number][1]).has_checksum)
    damaged = bytearray(frame)
    damaged[place] ^= 1
    with streaming(bytes(damaged), frame) as stream:
        assert pieces(stream, 0, [0, BYTES - 1]) == data[:-1]
        assert pieces(stream, 0, [BYTES - 1, BYTES]) is None
        assert pieces(stream, 1, [0, BYTES - 1, BYTES]) == data


def test_the_last_bytes_that_are_wanted_are_not_believed_before_the_end():
    data, frame = FRAMES[SIZED[0]]
    with streaming(frame, frame[:-1]) as stream:
        assert pieces(stream, 0, [0, 1000], last=True) == data[:1000]
        assert pieces(stream, 1, [0, 1000], last=False) == data[:1000]
        assert pieces(stream, 1, [1000, 2000], last=True) is None


@pytest.mark.parametrize("how", ["another chunk", "an earlier place", "leave"])
def test_a_chunk_of_which_something_was_given_is_not_left_before_its_checksum_is_met(how):
    data, frame = next(FRAMES[number] for number in SIZED if zstandard.get_frame_parameters(FRAMES[number][1]).has_checksum)
    damaged = bytearray(frame)
    damaged[-1] ^= 1
    leave = {
        "another chunk": lambda stream: stream.fill(1, 0, np.empty(9, dtype=np.uint8), last=False),
        "an earlier place": lambda stream: stream.fill(0, 0, np.empty(9, dtype=np.uint8), last=False),
        "leave": lambda stream: stream.leave(),
    }[how]
    for first, fails in ((bytes(damaged), pytest.raises(ChunkCorrupt, match="chunk 0 cannot be decoded")), (frame, nullcontext())):
        with streaming(first, frame) as stream:
            assert pieces(stream, 0, [100, 1000]) == data[100:1000]
            with fails:
                leave(stream)


@pytest.mark.parametrize("times", [2, 3])
def test_a_reading_that_fails_for_a_moment_is_repeated_where_it_was(monkeypatch, times):
    data, frame = FRAMES[SIZED[0]]
    read, failing = os.read, iter([False] * 3 + [True] * times)

    def fail(file: int, size: int) -> bytes:
        if next(failing, False):
            raise OSError(errno.EIO, "as planned")
        return read(file, size)

    with streaming(frame) as stream:
        monkeypatch.setattr(zstd_stream, "PAUSES", (0.0, 0.0))
        monkeypatch.setattr(os, "read", fail)
        assert pieces(stream, 0, [0, 1000, BYTES]) == (data if times == 2 else None)


def test_a_stream_leaves_what_is_unusual_to_others():
    data = CONTENTS[0]
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=24)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(data)
    begins_with_another = SKIPPED + zstandard.ZstdCompressor().compress(data)
    large = zstandard.ZstdCompressor(compression_params=wide).compressobj(size=BYTES)
    frames = [unsized, begins_with_another, zstandard.ZstdCompressor().compress(data[:-8]), b"", b"abc"]
    with streaming(*frames, large.compress(data) + large.flush()) as stream:
        for number in range(len(frames)):
            assert pieces(stream, number, [0, 100]) is None
        assert stream.position is None
