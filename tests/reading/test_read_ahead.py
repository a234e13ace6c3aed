"""Requests that are under way while rows are decoded: more than one, never too many, none that nobody wants, none left behind."""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import time
from collections import Counter
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path

import dask
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.abc.store import SuffixByteRequest
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, WrapperStore

import streamlr
from streamlr.aggregates.moments import MomentsOf
from streamlr.dataset import blocks, files_ahead, read_ahead, stored_chunks
from streamlr.dataset.blocks import Block, Span
from streamlr.dataset.buffers import Buffer
from streamlr.dataset.read_ahead import AHEAD_BYTES, ReadAhead, chunks_ahead
from streamlr.dataset.stored_chunks import StoredChunks
from streamlr.errors import ChunkCorrupt, ChunkMissing, DataError, ResourceError

N, P, CHUNK = 9_000, 128, 300  # tiles of 4,096 rows
REQUESTS = 8  # so that not all that there are is asked for at once
LAYOUTS = {
    "plain": {"chunks": (CHUNK, P), "compressors": None},
    "compressed": {"chunks": (CHUNK, P), "compressors": [ZstdCodec()]},
    "decoded by zarr": {"chunks": (CHUNK, P), "compressors": [Crc32cCodec(), ZstdCodec()]},
    "columns": {"chunks": (CHUNK, 40)},
    "sharded": {"chunks": (CHUNK, P), "shards": (5 * CHUNK, P)},
    "sharded columns": {"chunks": (CHUNK, 40), "shards": (5 * CHUNK, 80)},
}


class WatchedStore(WrapperStore):
    """Takes its time for each chunk, and keeps a record of what it was asked for and how much of it at once.

    Chunks of X are not answered before so many of them as `together` were asked for at once, or 10 seconds have gone by.
    """

    def __init__(self, store, together: int = 1) -> None:
        super().__init__(store)
        self.together = together
        self.asked: Counter[tuple[str, str]] = Counter()
        self.under_way: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.ended = 0

    async def get(self, key, prototype, byte_range=None):
        if "c/" not in key:
            return await self._store.get(key, prototype, byte_range)
        name = key[0]
        self.asked[key, str(byte_range)] += 1
        self.under_way[name] += 1
        self.most[name] = max(self.most[name], self.under_way[name])
        try:
            return await self.answer(key, prototype, byte_range)
        finally:
            self.under_way[name] -= 1
            self.ended += 1

    async def answer(self, key, prototype, byte_range):
        await asyncio.sleep(0.002)
        give_up = time.monotonic() + 10
        while key.startswith("X/c/") and not is_index(byte_range) and self.most["X"] < self.together and time.monotonic() < give_up:
            await asyncio.sleep(0.002)
        return await self._store.get(key, prototype, byte_range)

    def settled(self) -> int:
        """Requests under way, after the event loop has come round a few times."""

        async def turns():
            for _ in range(10):
                await asyncio.sleep(0)

        sync(turns())
        return self.under_way.total()

    def chunks(self, name: str) -> list[str]:
        """Keys of the chunks of an array that were asked for, once for each; not those of the indexes of shards."""
        return [key for key, part in self.asked if key.startswith(f"{name}/") and "Suffix" not in part]


def is_index(byte_range) -> bool:
    return isinstance(byte_range, SuffixByteRequest)


class FaultyStore(WatchedStore):
    """Answers for some chunks with less, nothing, or an error."""

    def __init__(self, store, faults: dict[str, str]) -> None:
        super().__init__(store)
        self.faults = faults

    async def answer(self, key, prototype, byte_range):
        fault = self.faults.get(key, "")
        if fault == "never":
            await asyncio.Event().wait()
        if fault == "fail":
            raise OSError("the line is dead")
        if fault == "fail once" and self.asked[key, str(byte_range)] == 1:
            raise OSError("the line is dead")
        found = await super().answer(key, prototype, byte_range)
        data = found.to_bytes()
        data = {"gone": None, "empty": b"", "half": data[: len(data) // 2]}.get(fault, data)
        return None if data is None else prototype.buffer.from_bytes(data)


@pytest.fixture(autouse=True)
def one_worker_and_no_pauses(monkeypatch):
    monkeypatch.setattr(stored_chunks, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(read_ahead, "REQUESTS", REQUESTS)
    with dask.config.set(num_workers=1):
        yield


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, P))
    y = x @ np.arange(1.0, P + 1) + rng.normal(size=N)
    return x, y, streamlr.accumulate(streamlr.Dataset(x, y))


@pytest.fixture(scope="module", params=LAYOUTS)
def memory(request, rows):
    group = zarr.open_group(MemoryStore(), mode="w")
    group.create_array("X", data=rows[0], **LAYOUTS[request.param])
    group.create_array("y", data=rows[1], chunks=(450,))
    return group.store


def opened(store) -> streamlr.Dataset:
    return streamlr.open_dataset(zarr.open_group(store, mode="r+"))


def same(found, expected) -> bool:
    return found.scatter.tobytes() == expected.scatter.tobytes() and found.mean.tobytes() == expected.mean.tobytes()


def read(dataset: streamlr.Dataset, span: Span) -> tuple[list[bytes], str]:
    """The rows of a span, and how the reading ended."""
    found = []
    try:
        for block in dataset.blocks(span, lambda tally: None):
            found.append(block.x.tobytes() + block.y.tobytes())
    except DataError as error:
        return found, f"{type(error).__name__}: {error}".replace(str(dataset.features[0].array.store), "")
    return found, ""


def test_several_requests_are_under_way_and_each_is_made_once(memory, rows):
    store = WatchedStore(memory)
    assert same(streamlr.accumulate(opened(store)), rows[2])
    assert set(store.asked.values()) == {1}
    for name in ("X", "y"):
        assert 1 < store.most[name] <= REQUESTS
    assert store.settled() == 0


def test_evaluation_and_prediction_read_ahead_too(memory, rows, tmp_path):
    model = streamlr.fit(streamlr.Dataset(*rows[:2]))
    store = WatchedStore(memory)
    assert streamlr.evaluate(model, opened(store)).mse == streamlr.evaluate(model, streamlr.Dataset(*rows[:2])).mse
    assert store.most["X"] > 1
    store = WatchedStore(memory)
    streamlr.predict(model, opened(store), tmp_path / "out.zarr")
    assert store.most["X"] > 1
    assert not store.chunks("y")


def test_several_workers_read_the_same_bits(memory, rows):
    store = WatchedStore(memory)
    with dask.config.set(num_workers=3):
        assert same(streamlr.accumulate(opened(store)), rows[2])
    assert store.settled() == 0


@given(st.integers(0, N - 1), st.integers(1, N))
def test_no_chunk_outside_the_span_is_asked_for(start, length):
    span = Span(start, min(start + length, N))
    group = zarr.open_group(MemoryStore(), mode="w")
    group.create_array("X", shape=(N, P), chunks=(CHUNK, P), dtype="f8", fill_value=1.0)
    group.create_array("y", shape=(N,), chunks=(450,), dtype="f8", fill_value=1.0)
    store = FaultyStore(group.store, {})
    store.answer = absent
    dataset = streamlr.open_dataset(zarr.open_group(store, mode="r+"), allow_missing_chunks=True)
    assert read(dataset, span)[1] == ""
    assert set(store.chunks("X")) == {f"X/c/{i}/0" for i in range(span.start // CHUNK, -(-span.stop // CHUNK))}
    assert set(store.chunks("y")) == {f"y/c/{i}" for i in range(span.start // 450, -(-span.stop // 450))}
    assert set(store.asked.values()) == {1}


async def absent(key, prototype, byte_range):
    return None


def test_spans_that_share_a_chunk_read_it_once(memory, rows):
    store = WatchedStore(memory)
    reader = opened(store).reader()
    found = []
    for a, b in ((0, 450), (450, 1_000), (1_000, 1_100), (1_100, 8_900), (8_900, N)):
        found += [block.x.copy() for block in reader.blocks(Span(a, b), lambda tally: None)]
    assert (np.concatenate(found) == rows[0]).all()
    assert set(store.asked.values()) == {1}


@pytest.mark.parametrize("filled", [False, True])
@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, N - 1), max_size=6, unique=True), st.randoms(use_true_random=False))
def test_spans_in_any_order_that_are_expected_ask_for_what_each_would_ask_for_by_itself(memory, rows, filled, edges, shuffling):
    ends = [0, *sorted(edges), N]
    spans = [Span(a, b) for a, b in itertools.pairwise(ends)]
    shuffling.shuffle(spans)
    alone, together = WatchedStore(memory), WatchedStore(memory)
    one, other = opened(alone).reader(), opened(together).reader()
    for span in spans:
        read_span(one, span, filled)
    with other.expecting(spans):
        for span in spans:
            x, y = read_span(other, span, filled)
            assert (x == rows[0][span.start : span.stop]).all()
            assert (y == rows[1][span.start : span.stop]).all()
    asked_alone, asked_together = (
        {key: count for key, count in store.asked.items() if "Suffix" not in key[1]} for store in (alone, together)
    )
    assert asked_together == asked_alone
    assert together.settled() == 0


def test_chunks_that_were_decoded_where_they_stay_are_not_taken_for_held_ones(memory, rows):
    store = WatchedStore(memory)
    reader = opened(store).reader()
    spans = [Span(400, 1_800), Span(0, 400)]  # of y: a part of chunk 0, which is held, and all of others, which are not
    with reader.expecting(spans):
        for span in spans:
            x, y = read_span(reader, span, filled=True)
            assert (x == rows[0][span.start : span.stop]).all()
            assert (y == rows[1][span.start : span.stop]).all()
        assert not any(side._readers[0]._stored._ahead._asked for side in (reader._x, reader._y))
    assert store.settled() == 0


def read_span(reader, span: Span, filled: bool = False) -> tuple[np.ndarray, np.ndarray]:
    if filled:
        m = span.stop - span.start
        block = reader.fill(span, lambda tally: None, Block(0, m, np.empty((m, P)), np.empty((m, 1))))
        return block.x, block.y[:, 0]
    blocks = [block.copy() for block in reader.blocks(span, lambda tally: None)]
    return np.concatenate([block.x for block in blocks]), np.concatenate([block.y[:, 0] for block in blocks])


def test_spans_that_are_expected_are_under_way_before_their_turn(memory):
    store = WatchedStore(memory, together=REQUESTS)
    spans = [Span(start, start + CHUNK) for start in range(0, N, CHUNK)]
    reader = opened(store).reader()
    with reader.expecting(spans):
        read_span(reader, spans[0])
    assert store.most["X"] >= REQUESTS
    assert store.settled() == 0


def test_a_reader_that_is_sent_elsewhere_drops_what_it_asked_for(memory, rows):
    reader = opened(WatchedStore(memory)).features[0].reader()
    reader.expect([Span(0, N)])
    reader.expect([Span(CHUNK, N)])  # while the first index of the shards is still under way
    out = np.empty((N - CHUNK, P))
    reader.read_into(out, CHUNK)
    assert (out == rows[0][CHUNK:]).all()
    reader.expect([Span(0, N)])
    reader.read_into(out, 0)  # not all of it, and then something else that nobody announced
    reader.read_into(out, CHUNK)
    assert (out == rows[0][CHUNK:]).all()


@pytest.mark.parametrize("most", [1, 3])
def test_large_chunks_are_bounded_by_their_bytes(memory, rows, monkeypatch, most):
    dataset = opened(WatchedStore(memory, together=most))
    array = dataset.features[0].array
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", most * array.chunks[0] * array.chunks[1] * 8 + 1)
    assert same(streamlr.accumulate(dataset), rows[2])
    assert array.store.most["X"] == most


@given(st.integers(1, 10**12))
def test_what_is_held_is_bounded(nbytes):
    assert 1 <= chunks_ahead(nbytes) <= REQUESTS
    assert chunks_ahead(nbytes) * nbytes <= max(AHEAD_BYTES, nbytes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_held_is_planned_where_it_is_held(tmp_path, layout):
    sizes = []
    for store in (LocalStore(tmp_path / "s.zarr"), WrapperStore(MemoryStore())):
        group = zarr.open_group(store, mode="w")
        group.create_array("X", shape=(N, P), dtype="f8", **LAYOUTS[layout])
        sizes.append(streamlr.Dataset(group["X"]).reader_bytes(1))
    nbytes = 8 * CHUNK * LAYOUTS[layout]["chunks"][1]
    read_in_place = LAYOUTS[layout].get("compressors", ()) is None  # bare numbers
    assert sizes[1] - sizes[0] == (chunks_ahead(nbytes) + read_in_place) * nbytes


def test_files_are_planned_as_before(tmp_path):
    array = zarr.create_array(str(tmp_path / "a"), shape=(N, P), chunks=(CHUNK, P), dtype="f8")
    rows = streamlr.Dataset(array).features[0]
    assert rows.reader_bytes == 2 * 8 * CHUNK * P


@pytest.mark.parametrize("later", ["", "fail", "never"])
@pytest.mark.parametrize("fault", ["gone", "empty", "half", "fail"])
@pytest.mark.parametrize("at", [0, 14])
def test_errors_come_in_the_order_of_the_chunks(memory, monkeypatch, fault, later, at):
    names = list(dict.fromkeys(key for key in sync(keys_of(memory)) if key.startswith("X/c/")))
    names.sort(key=lambda key: [int(part) for part in key.split("/")[2:]])
    at = min(at, len(names) - 2)
    faults = {names[at]: fault, **dict.fromkeys(names[at + 1 :], later)}

    def outcome():
        store = FaultyStore(memory, faults)
        found = read(opened(store), Span(0, N))
        assert store.settled() == 0
        return found

    ahead = outcome()
    assert "array 'X'" in ahead[1]
    monkeypatch.setattr(ReadAhead, "expect", lambda self, positions: None)
    assert outcome() == ahead


async def keys_of(store):
    return [key async for key in store.list_prefix("X/")]


def test_a_request_that_fails_for_a_moment_is_repeated_when_its_turn_comes(memory, rows):
    whole = WatchedStore(memory)
    streamlr.accumulate(opened(whole))
    store = FaultyStore(memory, {key: "fail once" for key, _ in whole.asked})
    assert same(streamlr.accumulate(opened(store)), rows[2])
    assert set(store.asked.values()) <= {1, 2}
    assert set(store.asked) == set(whole.asked)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ChunkMissing])
def test_nothing_is_left_behind_by_who_reports(memory, error):
    store = WatchedStore(memory)

    def report(tally):
        raise error("stop")

    with pytest.raises(error):
        for _ in opened(store).blocks(Span(0, N), report):
            pass
    assert store.settled() == 0
    asked = store.asked.total()
    sync(asyncio.sleep(0.02))
    assert store.asked.total() == asked < 2 * -(-N // CHUNK) * 4


def test_nothing_is_left_behind_by_who_stops(memory):
    store = WatchedStore(memory)
    with closing(opened(store).blocks(Span(0, N), lambda tally: None)) as blocks:
        assert len(list(islice(blocks, 1))) == 1
    assert store.settled() == 0
    pieces = {"X": 4, "y": 1}
    for name, columns in pieces.items():
        assert len(store.chunks(name)) <= columns * (-(-4_096 // CHUNK) + 1) + REQUESTS


def test_a_pass_does_not_wait_for_requests_that_hang(memory):
    """One chunk is damaged and those behind it never arrive: the pass ends all the same, and takes back what it asked for."""
    names = [f"X/c/{i}/{j}" for i in range(N // CHUNK) for j in range(4)]
    names = [name for name in names if name in sync(keys_of(memory))]
    store = FaultyStore(memory, {names[0]: "half", **dict.fromkeys(names[4:], "never")})
    with pytest.raises(ChunkCorrupt, match="array 'X'"):
        streamlr.accumulate(opened(store))
    assert store.settled() == 0
    assert store.ended == store.asked.total()


def nothing(view, file, offset):
    """What a file gives that is not in memory."""
    return 0


def all_of_it(view, file, offset):
    """What a file gives that is in memory."""
    return os.preadv(file, [view], offset)


@pytest.mark.skipif(not files_ahead.ADVISED, reason="this system takes no advice on files")
class TestFiles:
    """Of files that are waited for, the kernel is told of the next one while one is decoded."""

    @pytest.fixture(autouse=True)
    def waited(self, monkeypatch):
        monkeypatch.setattr(files_ahead, "_in_memory", nothing)

    @pytest.fixture
    def path(self, tmp_path, rows):
        group = zarr.open_group(tmp_path / "s.zarr", mode="w")
        group.create_array("X", data=rows[0], chunks=(CHUNK, P))
        group.create_array("y", data=rows[1], chunks=(450,))
        return tmp_path / "s.zarr"

    @pytest.fixture
    def advised(self, monkeypatch):
        found: list[str] = []
        advise = os.posix_fadvise

        def note(descriptor, *arguments):
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            advise(descriptor, *arguments)

        monkeypatch.setattr(os, "posix_fadvise", note)
        return found

    @pytest.mark.parametrize(("start", "stop"), [(0, N), (0, 1), (301, 4_500), (8_999, N)])
    def test_each_file_of_the_span_once_and_no_other(self, path, advised, start, stop):
        assert read(streamlr.open_dataset(path), Span(start, stop))[1] == ""
        expected = [f"X/c/{i}/0" for i in range(start // CHUNK, -(-stop // CHUNK))]
        expected += [f"y/c/{i}" for i in range(start // 450, -(-stop // 450))]
        assert sorted(advised) == sorted(str(path / key) for key in expected)

    def test_a_pass_tells_of_each_file_once_and_in_time(self, path, advised, monkeypatch):
        """Whatever pieces it reads the rows in: the first file of a tile is told of before the tile ahead of it is computed."""
        monkeypatch.setattr(blocks, "MIN_SPAN_BYTES", 1)
        dataset, late, told, of = streamlr.open_dataset(path), [], [], MomentsOf.of

        def noted(statistic, block):
            coming = str(path / f"X/c/{block.stop // CHUNK + (block.stop % CHUNK > 0)}/0")
            if block.stop < N and coming not in advised:
                late.append(coming)
            told.append(block.stop)
            return of(statistic, block)

        monkeypatch.setattr(MomentsOf, "of", noted)
        with dask.config.set(num_workers=1):
            plan = streamlr.plan(dataset)
            assert plan.n_spans == plan.spans_per_task == 8
            streamlr.accumulate(dataset)
        assert told == [4_096, 8_192, N]
        assert not late
        assert sorted(name for name in advised if "/X/" in name) == sorted(str(path / f"X/c/{i}/0") for i in range(N // CHUNK))

    @pytest.mark.parametrize("large", [False, True])
    def test_small_files_that_come_from_memory_are_not_told_of(self, path, advised, monkeypatch, large):
        """But for the first, before it is known where they come from."""
        monkeypatch.setattr(files_ahead, "_in_memory", all_of_it)
        if large:
            monkeypatch.setattr(files_ahead, "LARGE", 500)
        dataset = streamlr.open_dataset(path)
        assert read(dataset, Span(0, N))[1] == ""
        assert len(advised) == (N // CHUNK + N // 450 if large else 2)

    def test_after_one_that_is_waited_for_some_are_told_of(self, path, advised, monkeypatch):
        monkeypatch.setattr(files_ahead, "_in_memory", all_of_it)
        monkeypatch.setattr(files_ahead, "AHEAD", 3)
        blocks = streamlr.open_dataset(path).blocks(Span(0, N), lambda tally: None, CHUNK)
        for number, _ in enumerate(blocks):
            monkeypatch.setattr(files_ahead, "_in_memory", nothing if number == 9 else all_of_it)
        assert [name for name in advised if "/X/" in name] == [str(path / f"X/c/{i}/0") for i in (0, 11, 12, 13)]

    def test_what_comes_from_memory_in_part_is_read_to_its_end(self, path, monkeypatch):
        monkeypatch.setattr(files_ahead, "_in_memory", lambda view, file, offset: os.preadv(file, [view[: len(view) // 3]], offset))
        found, ended = read(streamlr.open_dataset(path), Span(0, N))
        assert ended == ""
        monkeypatch.setattr(files_ahead, "_in_memory", nothing)
        assert found == read(streamlr.open_dataset(path), Span(0, N))[0]

    def test_no_file_stays_open(self, tmp_path, advised):
        """One for each of many arrays, and each task, would be more than a process may open."""
        group, names = zarr.open_group(tmp_path / "s.zarr", mode="w"), [f"x{j}" for j in range(30)]
        for name in ("y", *names):
            group.create_array(name, data=np.arange(float(N)), chunks=(450,))
        dataset = streamlr.open_dataset(tmp_path / "s.zarr", features=names)
        held = set()
        for _ in dataset.blocks(Span(0, N), lambda _: None, 1_000):
            held |= set(map(os.path.realpath, Path("/proc/self/fd").iterdir()))
        assert len(advised) == 31 * (N // 450)
        assert not any("/s.zarr/" in name for name in held)

    def test_a_file_that_is_gone_is_missed_in_its_turn(self, path, rows):
        (path / "X/c/20/0").unlink()
        found, ended = read(streamlr.open_dataset(path), Span(0, N))
        assert len(found) == 1
        assert ended.startswith("ChunkMissing: chunk 20.0 of array 'X' (rows 6,000 to 6,299)")

    def test_files_behind_one_that_may_be_absent_are_still_told_of(self, path, advised):
        for chunk in (3, 4, 20):
            (path / f"X/c/{chunk}/0").unlink()
        assert read(streamlr.open_dataset(path, allow_missing_chunks=True), Span(0, N))[1] == ""
        there = [i for i in range(N // CHUNK) if i not in (3, 4, 20)]
        assert sorted(name for name in advised if "/X/" in name) == sorted(str(path / f"X/c/{i}/0") for i in there)


def test_too_many_open_files_are_not_the_fault_of_the_store(tmp_path, monkeypatch):
    group = zarr.open_group(tmp_path / "s", mode="w")
    for name in ("X", "y"):
        group.create_array(name, data=np.arange(100.0), chunks=(10,))
    rows = streamlr.open_dataset(tmp_path / "s", features="X").arrays[0]
    stored = StoredChunks(group["X"], "X", None)
    reads = {
        "'X/c/3' of array 'X'": lambda: stored.get((3,), Buffer()),
        "the metadata of array 'X'": rows.check_current,
        str(tmp_path): lambda: streamlr.open_dataset(tmp_path / "s", features="X"),
    }
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for what, read in reads.items():
            with pytest.raises(ResourceError, match=rf"{what}.* cannot be read: .*Too many open files.*ulimit -n"):
                read()
        monkeypatch.setattr(stored_chunks.time, "sleep", lambda _: os.close(taken.pop()))  # another is done with it
        assert stored.get((4,), Buffer()) is not None
    finally:
        for file in taken:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert stored.get((3,), Buffer()) is not None
