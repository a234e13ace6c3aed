"""Rows in a seeded order, read ahead by threads: each once an epoch, checked, in planned memory, and with a prompt end."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, GzipCodec, ZstdCodec
from zarr.storage import MemoryStore, WrapperStore

import streamlr
from streamlr.dataset import stored_chunks
from streamlr.dataset.checked import DatasetReader
from streamlr.descent.automatic import walk_of
from streamlr.descent.objective import Objective
from streamlr.descent.scaling import Coordinates, plain_coordinates
from streamlr.descent.schedules import Constant
from streamlr.descent.seen import Seen
from streamlr.descent.sequential import stepped
from streamlr.descent.steps import Iterate, Walk
from streamlr.descent.updates import Plain
from streamlr.errors import (
    ChunkCorrupt,
    ChunkMissing,
    DataError,
    MemoryLimitExceeded,
    NonFiniteValue,
    RowCountMismatch,
    StoreChanged,
)
from streamlr.passes import order, progress
from streamlr.passes.order import BUFFER_UNITS, Order, unit_spans
from streamlr.passes.shuffle import START, Position
from streamlr.passes.stream import RowStream, plan_stream, side_by_side

N, P = 20_000, 6
Array = NDArray[np.float64]


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Many units and windows of few rows, so that little data show what much would."""
    monkeypatch.setattr(stored_chunks, "PAUSES", (0.0, 0.0))
    for name, value in (("UNIT_BYTES", 20_000), ("STRETCH_BYTES", 10_000), ("BUFFER_BYTES", 200_000)):
        monkeypatch.setattr(order, name, value)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    readers = left_over(before)
    assert not readers


def left_over(before: set[threading.Thread]) -> list[threading.Thread]:
    """Threads of ours that are still there after a while."""
    until = time.monotonic() + 5
    while True:
        readers = [thread for thread in set(threading.enumerate()) - before if "_read" in thread.name]
        if not readers or time.monotonic() > until:
            return readers
        time.sleep(0.01)


@pytest.fixture(scope="module")
def rows() -> tuple[Array, Array, Array]:
    """Features whose first column is the number of the row, a target, weights."""
    rng = np.random.default_rng(0)
    x = np.column_stack([np.arange(N, dtype=float), rng.normal(size=(N, P - 1))])
    return x, x[:, 1:] @ np.arange(1.0, P) + rng.normal(size=N), rng.uniform(0, 2, N)


def stream_of(dataset: streamlr.Dataset, readers: int = 2, progress=None, prepare=side_by_side, keep=False, **order) -> RowStream:
    return RowStream(
        dataset,
        Order(**{"batch_rows": 7, "seed": 0} | order),
        prepare,
        readers=readers,
        task="t",
        progress=progress,
        keep=keep,
    )


def epoch_of(dataset: streamlr.Dataset, readers: int = 2, number: int = 0, start: Position = START, **order) -> Array:
    stretches = [found.copy() for found, _ in stream_of(dataset, readers, **order).epoch(number, start)]
    return np.concatenate(stretches) if stretches else np.empty((0, 0))


def zarr_dataset(path, x, y, *, x_options=None, y_options=None, zarr_format=3, **options) -> streamlr.Dataset:
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    group.create_array("X", data=x, **({"chunks": (500, x.shape[1])} | (x_options or {})))
    group.create_array("y", data=y, **({"chunks": (500,)} | (y_options or {})))
    return streamlr.open_dataset(path, **options)


LAYOUTS = {
    "plain": {},
    "v2": {"zarr_format": 2},
    "misaligned": {"y_options": {"chunks": (333,)}},
    "one chunk of y": {"y_options": {"chunks": (N,)}},
    "one chunk": {"x_options": {"chunks": (N, P)}, "y_options": {"chunks": (N,)}},
    "longer than the array": {"x_options": {"chunks": (N + 11, P)}},
    "small": {"x_options": {"chunks": (97, P)}, "y_options": {"chunks": (61,)}},
    "columns": {"x_options": {"chunks": (700, 4)}},
    "uncompressed": {"x_options": {"compressors": None}},
    "gzip": {"x_options": {"compressors": GzipCodec()}},
    "checksums": {"x_options": {"compressors": [ZstdCodec(), Crc32cCodec()]}},
    "shards": {"x_options": {"chunks": (100, P), "shards": (1_000, P)}, "y_options": {"chunks": (50,), "shards": (1_500,)}},
}


def lazy_dataset(x, y, x_chunks, y_chunks) -> streamlr.Dataset:
    return streamlr.Dataset(da.from_array(x, chunks=x_chunks), da.from_array(y, chunks=y_chunks))


class TestRows:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shuffle", [False, True])
    def test_every_row_once(self, rows, tmp_path, layout, shuffle):
        x, y, _ = rows
        dataset = zarr_dataset(tmp_path / "s.zarr", x, y, **LAYOUTS[layout])
        found = epoch_of(dataset, shuffle=shuffle)
        order = found[:, 0].astype(int)
        assert (order == np.arange(N)).all() != shuffle
        np.testing.assert_array_equal(np.sort(order), np.arange(N))
        np.testing.assert_array_equal(found, np.column_stack([x, y])[order])
        for readers in (1, 5):
            assert epoch_of(dataset, readers, shuffle=shuffle).tobytes() == found.tobytes()

    @pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", ">f8", "i1", "u4", "i8", "?"])
    @pytest.mark.parametrize("chunks", [(500, P), (333, 4)], ids=str)
    def test_numbers_of_any_kind(self, rows, tmp_path, dtype, chunks):
        x, y, _ = rows
        x = (100 * x % 100).astype(dtype)
        dataset = zarr_dataset(tmp_path / "s.zarr", x, y, x_options={"chunks": chunks})
        whole = np.column_stack([x, y])  # promoted
        assert epoch_of(dataset, shuffle=False).tobytes() == whole.tobytes()
        found = epoch_of(dataset)
        np.testing.assert_array_equal(found[np.argsort(found[:, P])], whole[np.argsort(y)])

    @pytest.mark.parametrize("chunks", [(1_000, P), (333, 4), ((1, 0, 9_999, 10_000), P), (N, P)], ids=str)
    @pytest.mark.parametrize("y_chunks", [1_000, 777, N])
    def test_dask_arrays(self, rows, chunks, y_chunks):
        x, y, _ = rows
        dataset = lazy_dataset(x, y, chunks, y_chunks)
        found = epoch_of(dataset)
        np.testing.assert_array_equal(found[np.argsort(found[:, 0])], np.column_stack([x, y]))
        assert epoch_of(dataset, 1).tobytes() == found.tobytes()
        np.testing.assert_array_equal(epoch_of(dataset, shuffle=False), np.column_stack([x, y]))

    def test_arrays_of_all_kinds(self, rows, tmp_path):
        """X in zarr, y in a Dask array and weights in memory."""
        x, y, w = rows
        array = zarr.create_array(str(tmp_path / "x.zarr"), data=x, chunks=(700, P))
        found = epoch_of(streamlr.Dataset(array, da.from_array(y, chunks=900), w))
        np.testing.assert_array_equal(found[np.argsort(found[:, 0])], np.column_stack(rows))

    def test_weights_and_several_targets_in_memory(self, rows):
        x, y, w = rows
        found = epoch_of(streamlr.Dataset(x, np.column_stack([y, -y]), w))
        np.testing.assert_array_equal(found[np.argsort(found[:, 0])], np.column_stack([x, y, -y, w]))

    @pytest.mark.parametrize("kind", ["zarr", "numpy", "dask"])
    def test_parts_of_a_split(self, rows, tmp_path, kind):
        x, y, _ = rows
        dataset = {
            "zarr": lambda: zarr_dataset(tmp_path / "s.zarr", x, y),
            "numpy": lambda: streamlr.Dataset(x, y),
            "dask": lambda: lazy_dataset(x, y, (700, P), 900),
        }[kind]()
        parts = dataset.split(0.3, seed=4)
        orders = [epoch_of(part)[:, 0] for part in parts]
        assert [len(order) for order in orders] == [part.n_rows for part in parts]
        np.testing.assert_array_equal(np.sort(np.concatenate(orders)), np.arange(N))

    def test_rows_that_lack_a_value_are_left_out(self, rows, tmp_path):
        x, y, _ = (array.copy() for array in rows)
        x[[0, 777, N - 1], [1, 2, 3]] = np.nan
        y[500:1_500] = np.nan
        found = epoch_of(zarr_dataset(tmp_path / "s.zarr", x, y, missing="drop"))
        kept = ~np.isnan(np.column_stack([x, y])).any(axis=1)
        np.testing.assert_array_equal(np.sort(found[:, 0]), np.flatnonzero(kept))

    def test_the_order_depends_on_seed_and_epoch(self, rows):
        dataset = streamlr.Dataset(*rows[:2])
        orders = {epoch_of(dataset, number=number, seed=seed).tobytes() for number in (0, 1, 2) for seed in (0, 1)}
        assert len(orders) == 6
        assert epoch_of(dataset, number=0, shuffle=False).tobytes() == epoch_of(dataset, number=1, shuffle=False).tobytes()

    @pytest.mark.parametrize("layout", ["plain", "small", "shards"])
    def test_rows_come_from_all_over(self, rows, tmp_path, layout):
        """Sorted rows in a store: each tenth of an epoch has rows from several units, far apart, in no order."""
        dataset = zarr_dataset(tmp_path / "s.zarr", *rows[:2], **LAYOUTS[layout])
        for part in np.array_split(epoch_of(dataset)[:, 0], 10):
            assert len(np.unique(part // 500)) >= BUFFER_UNITS
            assert np.ptp(part) > N / 3
            assert (np.diff(part) > 0).mean() == pytest.approx(0.5, abs=0.05)

    @pytest.mark.parametrize("shuffle", [False, True])
    @pytest.mark.parametrize("missing", ["error", "drop"])
    def test_an_epoch_goes_on_from_any_place(self, rows, tmp_path, shuffle, missing):
        x = rows[0].copy()
        if missing == "drop":
            x[::5, 2] = np.nan
        dataset = zarr_dataset(tmp_path / "s.zarr", x, rows[1], missing=missing, **LAYOUTS["small"])
        stretches = [(found.copy(), position) for found, position in stream_of(dataset, shuffle=shuffle).epoch(3)]
        for at in (0, 1, len(stretches) // 3, len(stretches) // 2, len(stretches) - 2, len(stretches) - 1):
            rest = epoch_of(dataset, 3, 3, stretches[at][1], shuffle=shuffle)
            expected = np.concatenate([found for found, _ in stretches[at + 1 :]] or [np.empty((0, 0))])
            assert rest.tobytes() == expected.tobytes()

    @pytest.mark.parametrize("p", [1, 300])
    def test_any_width(self, p):
        x = np.random.default_rng(0).normal(size=(500, p))
        x[:, 0] = np.arange(500)
        found = epoch_of(streamlr.Dataset(x, x[:, 0]))
        np.testing.assert_array_equal(found[np.argsort(found[:, 0]), :p], x)

    def test_what_overflows_on_the_way_is_no_warning(self, rows):
        tiny = Coordinates(np.zeros(P), np.full(P, 1e-300), np.zeros(1), np.full(1, 1e-300), True, 1.0)
        for found, _ in stream_of(streamlr.Dataset(rows[0] * 1e100, rows[1]), prepare=tiny.prepare).epoch(0):
            assert not np.isfinite(found.z[:, 0]).all() or (found.z[:, 0] == 0).any()


def descended(walk: Walk, stream: RowStream) -> Iterate:
    here, seen = walk.start(), Seen.nothing(1)
    for stretch, _ in stream.epoch(0):
        here, seen = stepped(walk, stretch, here, seen)
    return here


class TestDoubt:
    """Nobody looks for what is not finite in a stretch that steps are taken over: what they meet tells."""

    @pytest.mark.parametrize("batch", [1, 16])
    @pytest.mark.parametrize("shuffle", [False, True])
    @pytest.mark.parametrize(("column", "value"), [("x2", np.nan), ("x5", -np.inf), ("y", np.inf)])
    def test_what_is_not_finite_is_named_wherever_it_stands(self, rows, batch, shuffle, column, value):
        options = streamlr.Descent("minibatch", batch_size=batch)
        sample = np.column_stack(rows[:2])
        walk = walk_of(sample, options, n_features=P, n_targets=1, weighted=False, fit_intercept=True, ridge=0.0, n_rows=N)
        for row in (0, 4_999, N - 1):
            spoilt = sample.copy()
            spoilt[row, int(column[1:] or P)] = value
            dataset = streamlr.Dataset(spoilt[:, :P], spoilt[:, P])
            stream = stream_of(dataset, prepare=walk.objective.coordinates.prepare, batch_rows=batch, shuffle=shuffle)
            with pytest.raises(NonFiniteValue, match=f"row {row:,}, column '{column}' is {value}"):
                descended(walk, stream)

    @pytest.mark.parametrize("batch", [1, 16])
    @pytest.mark.parametrize("column", ["x0", "y"])
    def test_of_one_column_too_which_zero_may_hide(self, batch, column):
        """In the only batch, after whose step there is no other to show it."""
        objective = Objective(plain_coordinates(None, 1, 1, intercept=False), batch, 0.0)
        walk = Walk(objective, None, Plain(), Constant(1e-300), None, False)
        x, y = np.ones((batch, 1)), np.ones(batch)
        (x[:, 0] if column == "x0" else y)[-1] = np.nan
        stream = stream_of(streamlr.Dataset(x, y), prepare=objective.coordinates.prepare, batch_rows=batch, shuffle=False)
        with pytest.raises(NonFiniteValue, match=f"row {batch - 1}, column '{column}' is nan"):
            descended(walk, stream)

    def test_what_diverges_is_not_blamed_on_rows(self, rows):
        walk = Walk(Objective(plain_coordinates(None, P, 1, intercept=True), 16, 0.0), None, Plain(), Constant(1e9), None, False)
        stream = stream_of(streamlr.Dataset(*rows[:2]), prepare=walk.objective.coordinates.prepare, batch_rows=16)
        assert not np.isfinite(descended(walk, stream).b).any()


class TestSample:
    def test_all_rows_when_there_are_few(self, rows, tmp_path):
        x, y, _ = rows
        dataset = zarr_dataset(tmp_path / "s.zarr", x, y)
        found = stream_of(dataset).sample(N, 1_000)
        np.testing.assert_array_equal(found[np.argsort(found[:, 0])], np.column_stack([x, y]))

    def test_from_all_over_and_of_the_size_that_was_asked_for(self, rows, tmp_path):
        dataset = zarr_dataset(tmp_path / "s.zarr", *rows[:2])
        found = stream_of(dataset).sample(1_000, 16)[:, 0]
        assert len(found) == 1_000
        assert len(np.unique(found)) == len(found)
        counts = np.histogram(found, bins=8, range=(0, N))[0]
        assert counts.min() > 50, "of 125 expected, as rows are sorted"

    def test_decided_by_the_seed(self, rows, tmp_path):
        dataset = zarr_dataset(tmp_path / "s.zarr", *rows[:2], **LAYOUTS["misaligned"])
        given = ((1, 0), (2, 0), (5, 0), (2, 1))
        samples = [stream_of(dataset, readers, seed=seed).sample(500, 8).tobytes() for readers, seed in given]
        assert samples[0] == samples[1] == samples[2] != samples[3]

    def test_a_small_part_of_a_split_is_sampled_as_well_as_the_whole(self, rows, tmp_path):
        part = zarr_dataset(tmp_path / "s.zarr", *rows[:2]).split(0.05, seed=0)[1]
        assert len(stream_of(part).sample(2_000, 1_000)) == part.n_rows
        assert len(stream_of(part).sample(500, 1_000)) == 500

    def test_rows_that_are_left_out_make_a_sample_no_smaller(self, rows, tmp_path):
        y = np.where(np.arange(N) % 20 == 7, rows[1], np.nan)
        dataset = zarr_dataset(tmp_path / "s.zarr", rows[0], y, missing="drop")
        assert len(stream_of(dataset).sample(2_000, 1_000)) == N // 20
        found = stream_of(dataset).sample(500, 1_000)[:, 0]
        assert len(np.unique(found)) == len(found) == 500
        assert np.histogram(found, bins=4, range=(0, N))[0].min() > 90, "of 125 expected"

    def test_of_rows_that_are_all_left_out(self, rows, tmp_path):
        x = np.full((1_000, P), np.nan)
        dataset = zarr_dataset(tmp_path / "s.zarr", x, rows[1][:1_000], missing="drop")
        assert stream_of(dataset).sample(500, 8).shape == (0, P + 1)
        assert epoch_of(dataset).size == 0


class CountingStore(WrapperStore):
    """Remembers which chunks were asked for, and which bytes of them."""

    def __init__(self, store) -> None:
        super().__init__(store)
        self.reads = Counter()

    async def get(self, key, prototype, byte_range=None):
        if "/c/" in key:
            self.reads[key, str(byte_range)] += 1
        return await self._store.get(key, prototype, byte_range)


class TestReadings:
    @pytest.mark.parametrize(
        ("x_options", "y_options"),
        [
            ({}, {}),
            ({"chunks": (20, P)}, {"chunks": (30,)}),
            ({"chunks": (500, 4)}, {"chunks": (250,)}),
            ({"chunks": (300, P)}, {"chunks": (200,)}),
            ({"chunks": (1_000, P)}, {"chunks": (100,)}),
            ({"chunks": (N, P)}, {"chunks": (N,)}),
            ({"chunks": (500, P)}, {"chunks": (N,)}),
        ],
        ids=str,
    )
    def test_each_chunk_once_an_epoch(self, rows, x_options, y_options):
        options = {"compressors": None}
        group = zarr.open_group(MemoryStore(), mode="w")
        group.create_array("X", data=rows[0], **({"chunks": (500, P)} | options | x_options))
        group.create_array("y", data=rows[1], **({"chunks": (500,)} | options | y_options))
        store = CountingStore(group.store)
        dataset = streamlr.open_dataset(zarr.open_group(store, mode="r+"))
        stream = stream_of(dataset, readers=1 if y_options.get("chunks") == (N,) else 2)
        for number in range(2):
            store.reads.clear()
            assert sum(len(found) for found, _ in stream.epoch(number)) == N
            assert set(store.reads.values()) == {1}
            assert {key for key, _ in store.reads if key.startswith("y/")} == {
                f"y/c/{i}" for i in range(-(-N // y_options.get("chunks", (500,))[0]))
            }

    def test_a_sample_reads_few_units(self, rows):
        group = zarr.open_group(MemoryStore(), mode="w")
        for name, values in (("X", rows[0]), ("y", rows[1])):
            group.create_array(name, data=values, chunks=(500, *values.shape[1:]), compressors=None)
        store = CountingStore(group.store)
        dataset = streamlr.open_dataset(zarr.open_group(store, mode="r+"))
        stream_of(dataset).sample(1_000, 4)
        assert store.reads.total() == 8
        assert set(store.reads.values()) == {1}

    @pytest.mark.parametrize("workers", [1, 3])
    def test_as_many_readers_as_planned(self, rows, tmp_path, monkeypatch, workers):
        dataset = zarr_dataset(tmp_path / "s.zarr", *rows[:2])
        started = []
        start = threading.Thread.start

        def counted(thread):
            started.append(thread.name)
            start(thread)

        with dask.config.set(num_workers=workers):
            plan = plan_stream(dataset, Order(7, 0), task="t", sample_bytes=0, passes=1, memory=None)
        assert plan.tasks_at_once == workers
        monkeypatch.setattr(threading.Thread, "start", counted)
        epoch_of(dataset, plan.tasks_at_once)
        assert len([name for name in started if "_read" in name]) == workers

    def test_a_million_chunks_cost_nothing_to_think_of(self):
        arrays = [zarr.create_array(MemoryStore(), shape=(6 * 10**9, *w), chunks=(6_000, *w), dtype="f8") for w in ((100,), ())]
        dataset, order = streamlr.Dataset(*arrays), Order(256, 0)
        began = time.perf_counter()
        units = order.units(dataset, 5)
        assert order.window_units(dataset) * 6_000 >= 4 * 6_000
        assert len(units) == 10**6
        assert (units[0], units[1]) != (unit_spans(dataset)[0], unit_spans(dataset)[1])
        assert time.perf_counter() - began < 0.5
        assert unit_spans(dataset)[10**6 - 1].stop == 6 * 10**9


class TestEvents:
    def test_they_rise_to_the_total(self, rows, tmp_path):
        dataset, events = zarr_dataset(tmp_path / "s.zarr", *rows[:2]), []
        stream = stream_of(dataset, progress=events.append)
        positions = [position for _, position in stream.epoch(0)]
        for field in ("rows", "bytes", "seconds"):
            values = [getattr(event, field) for event in events]
            assert values == sorted(values)
        assert {(event.task, event.rows_total) for event in events} == {("t", N)}
        assert events[-1].rows == N
        events.clear()
        assert list(stream.epoch(0, positions[-3]))
        assert events[-1].rows == N, "an epoch that goes on ends with the same number"

    def test_a_callback_that_fails_ends_the_epoch(self, rows, tmp_path):
        def fail(event):
            if event.rows > N // 2:
                raise LookupError("the bar is closed")

        with pytest.raises(LookupError, match="the bar is closed"):
            list(stream_of(zarr_dataset(tmp_path / "s.zarr", *rows[:2]), progress=fail).epoch(0))


class TestEnds:
    @pytest.mark.parametrize("after", [1, 20])
    def test_a_consumer_that_stops(self, rows, tmp_path, after):
        dataset, before = zarr_dataset(tmp_path / "s.zarr", *rows[:2]), set(threading.enumerate())
        stretches = stream_of(dataset, 3).epoch(0)
        for _ in range(after):
            next(stretches)
        stretches.close()
        assert not left_over(before)

    def test_a_reader_that_is_late_spoils_no_later_epoch(self, rows, monkeypatch):
        """One that still reads when its epoch is closed goes on writing, into memory that no other epoch may have by then."""
        stream, fill, calls = stream_of(streamlr.Dataset(*rows[:2]), keep=True), DatasetReader.fill, Counter()
        begun, go_on, over = (threading.Event() for _ in range(3))

        def late(reader, span, report, room):
            name = threading.current_thread().name
            calls[name] += 1
            if name.endswith("-1") and calls[name] == 8:  # for the second window
                begun.set()
                go_on.wait(10)
                try:
                    return fill(reader, span, lambda tally: None, room)
                finally:
                    over.set()
            return fill(reader, span, report, room)

        assert sum(len(part) for part, _ in stream.epoch(0)) == N
        assert stream._kept, "memory that the next epoch uses"
        monkeypatch.setattr(DatasetReader, "fill", late)
        monkeypatch.setattr(progress, "PATIENCE", 0.05)
        epoch = stream.epoch(1)
        next(epoch)
        assert begun.wait(10)
        epoch.close()
        epoch = stream.epoch(2)
        found = [next(epoch)[0].copy()]
        time.sleep(0.2)  # the second window is filled meanwhile
        go_on.set()
        assert over.wait(10)
        found += [part.copy() for part, _ in epoch]
        np.testing.assert_array_equal(np.sort(np.concatenate(found)[:, 0]), np.arange(N))

    def test_kept_windows_keep_no_reader(self, rows, tmp_path):
        """Whose memory the readers of the next epoch take again."""
        stream = stream_of(zarr_dataset(tmp_path / "s.zarr", *rows[:2]), keep=True)
        gc.collect()
        gc.disable()
        try:
            assert sum(len(part) for part, _ in stream.epoch(0)) == N
            assert not [one for one in gc.get_objects() if isinstance(one, DatasetReader) and one.dataset is stream.dataset]
        finally:
            gc.enable()
        assert stream._kept

    def test_a_consumer_that_never_begins(self, rows):
        stretches = stream_of(streamlr.Dataset(*rows[:2])).epoch(0)
        del stretches

    def test_a_reader_that_fails(self, rows):
        """The error comes with its traceback, and while somebody holds it no thread is left."""
        calls = []

        def prepare(rows):
            calls.append(len(rows.x))
            if len(calls) > 30:
                raise ArithmeticError("as planned")
            return side_by_side(rows)

        before = set(threading.enumerate())
        with pytest.raises(ArithmeticError, match="as planned") as caught:
            list(stream_of(streamlr.Dataset(*rows[:2]), prepare=prepare).epoch(0))
        assert any(entry.name == "prepare" for entry in caught.traceback)
        assert not left_over(before)

    def test_a_descent_that_diverges(self, rows):
        before = set(threading.enumerate())
        options = streamlr.Descent("minibatch", learning_rate=1e3, scale=None)
        with pytest.raises(streamlr.errors.Diverged) as caught:
            streamlr.fit(streamlr.Dataset(*rows[:2]), options)
        assert caught.traceback
        assert not left_over(before)

    def test_a_descent_whose_time_is_up(self, rows):
        before = set(threading.enumerate())
        model = streamlr.fit(streamlr.Dataset(*rows[:2]), streamlr.Descent("sgd", max_seconds=0.0))
        assert "max_seconds" in model.stopped
        assert not left_over(before)


def fit(dataset: streamlr.Dataset, mode: str = "minibatch", **options) -> streamlr.FittedModel:
    return streamlr.fit(dataset, streamlr.Descent(mode, **options))


class TestFaults:
    """The error of an exact fit, from a descent too, and soon."""

    @pytest.fixture
    def store(self, rows, tmp_path):
        zarr_dataset(tmp_path / "s.zarr", *rows[:2], y_options={"compressors": [ZstdCodec(), Crc32cCodec()]})
        return tmp_path / "s.zarr"

    def at_epoch(self, number: int, act):
        """A callback that acts in the middle of an epoch."""
        seen = {"epochs": 0, "rows": 0, "done": False}

        def see(event):
            if event.task == "minibatch" and not event.note:
                seen["epochs"] += event.rows < seen["rows"]
                seen["rows"] = event.rows
                if seen["epochs"] == number and event.rows > N // 2 and not seen["done"]:
                    seen["done"] = True
                    act()

        return see

    @pytest.mark.parametrize("mode", ["normal", "minibatch", "sgd", "gd"])
    def test_nan(self, store, mode):
        zarr.open_group(store, mode="r+")["X"][12_345, 2] = np.nan
        with pytest.raises(NonFiniteValue, match="row 12,345, column 'x2' is nan"):
            streamlr.fit(streamlr.open_dataset(store), mode)

    @pytest.mark.parametrize("mode", ["normal", "minibatch", "sgd", "gd"])
    def test_missing_and_truncated_chunks(self, store, mode):
        file = store / "y/c/17"
        stored = file.read_bytes()
        file.write_bytes(stored[:-3])
        with pytest.raises(ChunkCorrupt, match=r"array 'y' \(rows 8,500 to 8,999\)"):
            streamlr.fit(streamlr.open_dataset(store), mode)
        file.unlink()
        with pytest.raises(ChunkMissing, match=r"array 'y' \(rows 8,500 to 8,999\)"):
            streamlr.fit(streamlr.open_dataset(store), mode)

    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_a_chunk_lost_in_an_epoch(self, store, number):
        def lose():
            shutil.rmtree(store / "X/c")

        options = streamlr.Descent("minibatch", max_epochs=4, tol=0.0)
        with pytest.raises(ChunkMissing, match="array 'X'"):
            streamlr.fit(streamlr.open_dataset(store), options, progress=self.at_epoch(number, lose))

    @pytest.mark.parametrize("number", [0, 1, 2])
    @pytest.mark.parametrize("validation", [0.0, 0.2])
    def test_a_chunk_rewritten_in_an_epoch(self, store, number, validation):
        def rewrite():
            group = zarr.open_group(store, mode="r+")
            group["y"][4_000:4_100] += 1.0

        options = streamlr.Descent("minibatch", max_epochs=4, tol=0.0, validation=validation)
        with pytest.raises(StoreChanged, match="changed since it was opened"):
            streamlr.fit(streamlr.open_dataset(store), options, progress=self.at_epoch(number, rewrite))

    def test_a_chunk_rewritten_between_epochs(self, store):
        stream = stream_of(streamlr.open_dataset(store))
        assert sum(len(found) for found, _ in stream.epoch(0)) == N
        zarr.open_group(store, mode="r+")["y"][:10] += 1.0
        with pytest.raises(StoreChanged):
            list(stream.epoch(1))

    def test_a_dataset_that_changed_since_it_was_opened(self, store):
        dataset = streamlr.open_dataset(store)
        streamlr.accumulate(dataset)
        zarr.open_group(store, mode="r+")["y"][:10] += 1.0
        with pytest.raises(StoreChanged):
            fit(dataset)

    def test_fewer_rows_than_promised(self, rows):
        whole = da.from_array(rows[0], chunks=(1_000, P))
        x = da.map_blocks(lambda block: block[:-1], whole, chunks=whole.chunks, dtype="f8")
        with pytest.raises((RowCountMismatch, DataError), match="'X'"):
            fit(streamlr.Dataset(x, rows[1]))

    def test_a_block_that_cannot_be_computed(self, rows):
        def fail(block, block_info=None):
            if block_info[0]["chunk-location"][0] == 7:
                raise KeyError("as planned")
            return block

        x = da.map_blocks(fail, da.from_array(rows[0], chunks=(1_000, P)), dtype="f8")
        with pytest.raises(DataError, match=r"Dask array\(s\) X could not be computed \(KeyError: 'as planned'\)"):
            fit(streamlr.Dataset(x, rows[1]))


PLAIN_REFUSAL = r"needs \d.*limit is .* \(as asked\).*211\.8 MB of it are 2 x 131,072 rows that are shuffled together.*buffer_rows"
WINDOWS = 2 * 131_072 * 101 * 8
KEEPS = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}  # of glibc: nothing below 32 MiB goes back
RUN = r"""
import json, re, sys, dask, streamlr
store, mode, epochs, threads, limit = sys.argv[1:]
dask.config.set(num_workers=int(threads))
dataset = streamlr.open_dataset(store)
options = streamlr.Descent(mode, max_epochs=int(epochs), tol=0.0)
limit = None if limit == "none" else int(limit)
planned = streamlr.plan(dataset, options, memory_limit=limit)

def memory(what):
    return int(re.search(what + r":\s+(\d+)", open("/proc/self/status").read())[1]) * 1024

before = memory("VmRSS")
model = streamlr.fit(dataset, options, memory_limit=limit)
peak = memory("VmHWM")
least = planned.base_bytes + planned.result_bytes + planned.task_bytes
facts = {"planned": planned.peak_bytes, "least": least, "at_once": planned.tasks_at_once, "before": before, "peak": peak}
print(json.dumps(facts | {"bits": model.coef.tobytes().hex() + model.intercept.hex() + model.cost.mse.hex()}))
"""


def run(*arguments: object, **options: object) -> dict:
    done = subprocess.run([sys.executable, "-c", RUN, *map(str, arguments)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """260 MB in chunks of 26 MB."""
    path, rng = tmp_path_factory.mktemp("large") / "s.zarr", np.random.default_rng(0)
    group = zarr.open_group(path, mode="w")
    x = group.create_array("X", shape=(327_680, 100), chunks=(32_768, 100), dtype="f8", compressors=[ZstdCodec(level=-5)])
    y = group.create_array("y", shape=(327_680,), chunks=(32_768,), dtype="f8")
    for start in range(0, 327_680, 32_768):
        block = rng.integers(-8, 8, size=(32_768, 100)).astype(np.float64)
        x[start : start + 32_768], y[start : start + 32_768] = block, block.sum(axis=1) + rng.normal(size=32_768)
    return path


@pytest.fixture(scope="module")
def free(large):
    return run(large, "minibatch", 1, 2, "none")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
class TestMemory:
    """What is planned is kept, in a process of its own, and the order does not depend on it."""

    def test_as_planned_however_many_epochs(self, large, free):
        longer = run(large, "minibatch", 3, 2, "none")
        for facts in (free, longer):
            assert facts["at_once"] == 2
            assert facts["peak"] <= facts["planned"]
            assert facts["planned"] < 3 * facts["peak"]
        assert longer["peak"] - free["peak"] < 25_000_000
        assert longer["bits"] != free["bits"]

    def test_what_the_sample_took_goes_back_before_windows_come(self, large, free):
        kept = run(large, "minibatch", 1, 2, "none", env=os.environ | KEEPS)  # else it is the allocator's luck
        assert kept["bits"] == free["bits"]
        assert kept["peak"] - kept["before"] < WINDOWS + 45_000_000  # the sample, and what is made of it: 26 MB each

    def test_same_bits_in_the_least_memory(self, large, free):
        limit = free["least"] + 5_000_000
        held = run(large, "minibatch", 1, 2, limit)
        assert (held["at_once"], held["bits"]) == (1, free["bits"])
        assert held["peak"] <= limit
        with pytest.raises(MemoryLimitExceeded, match=PLAIN_REFUSAL):
            streamlr.plan(streamlr.open_dataset(large), "minibatch", memory_limit=free["least"] - 60_000_000)

    def test_same_bits_under_rlimit_data(self, large, free):
        limit = 720_000_000
        held = run(large, "minibatch", 1, 1, "none", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
        assert held["bits"] == free["bits"]

    def test_single_rows_too(self, large):
        one, two = run(large, "sgd", 1, 1, "none"), run(large, "sgd", 1, 2, "none")
        assert one["bits"] == two["bits"]
        assert two["peak"] <= two["planned"]

    def test_few_columns_and_large_chunks(self, tmp_path):
        x = np.arange(2_000_000.0)[:, None] % 17
        zarr_dataset(tmp_path / "s.zarr", x, x[:, 0], x_options={"chunks": (500_000, 1)}, y_options={"chunks": (500_000,)})
        facts = run(tmp_path / "s.zarr", "sgd", 1, 2, "none")
        assert facts["peak"] <= facts["planned"]


class TestSameBits:
    @pytest.mark.parametrize("mode", ["minibatch", "sgd"])
    def test_on_any_number_of_threads(self, rows, tmp_path, mode):
        zarr_dataset(tmp_path / "s.zarr", *rows[:2], **LAYOUTS["misaligned"])

        def bits(threads: int, **options) -> bytes:
            with dask.config.set(num_workers=threads):
                model = fit(streamlr.open_dataset(tmp_path / "s.zarr"), mode, max_epochs=2, **options)
            return model.coef.tobytes() + np.float64([model.intercept, model.cost.mse]).tobytes()

        assert bits(1) == bits(2) == bits(5)
        assert bits(2, seed=1) not in (bits(2), bits(2, seed=2))


SLOW = """
import asyncio, sys, numpy as np, zarr, streamlr
from zarr.storage import MemoryStore, WrapperStore

class SlowStore(WrapperStore):
    async def get(self, key, prototype, byte_range=None):
        if "c/" in key:
            await asyncio.sleep(0.02)
        return await self._store.get(key, prototype, byte_range)

group = zarr.open_group(MemoryStore(), mode="w")
rows = np.random.default_rng(0).normal(size=(600_000, 60))
group.create_array("X", data=rows, chunks=(2_000, 60), compressors=None)
group.create_array("y", data=rows.sum(axis=1), chunks=(600_000,))
store = SlowStore(group.store) if sys.argv[2] == "slow" else group.store
dataset = streamlr.open_dataset(zarr.open_group(store, mode="r+"))
seen = []

def see(event):
    if event.task == sys.argv[1] and not seen:
        seen.append(event)
        print("event", flush=True)

streamlr.fit(dataset, streamlr.Descent(sys.argv[1], max_epochs=1000, tol=0.0), progress=see)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another thing there")
@pytest.mark.parametrize(("mode", "speed"), [("minibatch", "slow"), ("minibatch", "fast"), ("sgd", "fast")])
def test_ctrl_c_ends_within_two_seconds(mode, speed):
    """While it waits for rows, and while it works on them."""
    process = subprocess.Popen([sys.executable, "-c", SLOW, mode, speed], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "event\n"
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        process.wait(timeout=20)
        assert time.monotonic() - began < 2
    finally:
        process.kill()
        errors = process.communicate()[1]
    assert process.returncode in (-signal.SIGINT, 130)
    assert "KeyboardInterrupt" in errors
    assert "Fatal" not in errors
