"""A pass: every chunk read once, few and small tasks, memory as planned, progress, and a prompt end."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing.pool import ThreadPool

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from strategies import same_bits
from threadpoolctl import threadpool_info, threadpool_limits
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore, WrapperStore

import streamlr
from streamlr.aggregates.cost import ResidualsOf
from streamlr.aggregates.moments import MomentsOf
from streamlr.dataset import blocks, read_ahead
from streamlr.dataset.blocks import TILE_BYTES, Block, Span
from streamlr.dataset.stored_chunks import StoredChunks
from streamlr.errors import Cancelled, DataError, MemoryLimitExceeded, OutputExists, UsageError
from streamlr.passes import planning
from streamlr.passes.memory import one_blas_thread
from streamlr.passes.planning import plan_pass
from streamlr.passes.progress import find_pass, running_pass, share_of_pass
from streamlr.passes.reduce import reduce
from streamlr.passes.runs import PIECES, Runs
from streamlr.passes.schedulers import options_for
from streamlr.passes.stream import sampling_bytes
from streamlr.passes.tasks import Source, span_tasks
from streamlr.passes.write import _plan as predictions_plan
from streamlr.passes.write import write

N, P = 80_000, 100  # 64 MB: four spans


class CountingStore(WrapperStore):
    """Remembers which chunks were asked for, and which bytes of them."""

    def __init__(self, store) -> None:
        super().__init__(store)
        self.reads = Counter()

    async def get(self, key, prototype, byte_range=None):
        if "/c/" in key:
            self.reads[key, str(byte_range)] += 1
        return await self._store.get(key, prototype, byte_range)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, P))
    return x, x @ np.arange(1.0, P + 1) + rng.normal(size=N)


@pytest.fixture(scope="module")
def model(rows):
    return streamlr.fit(streamlr.Dataset(*rows))


def counted(rows, x_chunks, y_chunks, **x_options) -> tuple[CountingStore, streamlr.Dataset]:
    group = zarr.open_group(MemoryStore(), mode="w")
    group.create_array("X", data=rows[0], chunks=x_chunks, **({"compressors": None} | x_options))
    group.create_array("y", data=rows[1], chunks=y_chunks, compressors=None)
    store = CountingStore(group.store)
    return store, streamlr.open_dataset(zarr.open_group(store, mode="r+"))


def make_arrays(path, x, y, chunk, y_chunk):
    group = zarr.open_group(path, mode="w")
    group.create_array("X", data=x, chunks=(chunk, P))
    group.create_array("y", data=y, chunks=(y_chunk,))
    return path


def expected_keys(*layouts: tuple[str, tuple[int, ...], tuple[int, ...]]) -> set[str]:
    keys = set()
    for name, shape, chunks in layouts:
        grid = [range(-(-length // size)) for length, size in zip(shape, chunks, strict=True)]
        keys |= {
            f"{name}/c/{i}" if len(grid) == 1 else f"{name}/c/{i}/{j}" for i in grid[0] for j in (grid[1] if grid[1:] else [0])
        }
    return keys


@pytest.fixture
def four_workers():
    """Each of which gets a span of rows that are asked for ahead."""
    with dask.config.set(num_workers=4):
        yield


@pytest.fixture
def spans_of_one_tile(monkeypatch):
    """As where columns are many, of which a test has too few: 8,192 rows each."""
    monkeypatch.setattr(planning, "OPEN_BYTES", 0)
    monkeypatch.setattr(blocks, "MIN_SPAN_BYTES", 1)
    monkeypatch.setattr(blocks, "WAITING_SPAN_BYTES", 1)
    monkeypatch.setattr(blocks, "SPANS_PER_WORKER", 32)


def test_what_leaves_few_numbers_of_a_tile_is_planned_by_its_own_tile():
    """A tile for the moments of 5,000 columns takes 1.3 GB, one for their cost or predictions 5 MB."""
    group = zarr.open_group(MemoryStore(), mode="w")
    x = group.create_array("X", shape=(1_000_000, 5_000), chunks=(100, 5_000), dtype="f8")  # 4 MB
    dataset = streamlr.Dataset(x, np.zeros(1_000_000))
    cost = ResidualsOf(np.ones((5_000, 1)), np.zeros(1))
    assert plan_pass(dataset, cost, task="cost", memory="1TB")[0].task_bytes < 100e6
    assert predictions_plan(dataset, "prediction", 100, 1, "1TB")[0].task_bytes < 100e6
    assert sampling_bytes(dataset) < 100e6
    assert streamlr.plan(dataset, memory_limit="1TB").task_bytes > 4e9


def test_a_target_is_planned_as_a_feature_is_for_moments():
    """Residuals are made of many targets, but not where moments are."""
    few, many = np.zeros((40_000, 3)), np.zeros((40_000, 300))
    plans = [streamlr.plan(streamlr.Dataset(*arrays), memory_limit="1TB") for arrays in ((few, many), (many, few))]
    assert plans[0].task_bytes == plans[1].task_bytes


class TestReadings:
    """Each chunk is read once a pass."""

    @pytest.mark.parametrize(
        ("x_chunks", "y_chunks"),
        [
            ((1000, P), (1000,)),
            ((1000, P), (700,)),
            ((1000, 30), (1000,)),
            ((1000, P), (N,)),
            ((3000, P), (1000,)),
            ((999, P), (333,)),
        ],
    )
    @pytest.mark.usefixtures("four_workers")
    def test_fit_evaluate_and_predict(self, rows, model, tmp_path, x_chunks, y_chunks):
        store, dataset = counted(rows, x_chunks, y_chunks)
        assert streamlr.plan(dataset).n_spans > 2
        if y_chunks == (N,):  # one chunk for all: whoever needs a part of it must read it
            store, dataset = counted((rows[0][:20_000], rows[1][:20_000]), x_chunks, (20_000,))
        n = dataset.n_rows
        y_keys = expected_keys(("y", (n,), y_chunks if y_chunks != (N,) else (n,)))
        for run in (lambda: streamlr.accumulate(dataset), lambda: streamlr.evaluate(model, dataset)):
            store.reads.clear()
            run()
            assert {key for key, _ in store.reads} == expected_keys(("X", (n, P), x_chunks)) | y_keys
            assert set(store.reads.values()) == {1}
        store.reads.clear()
        streamlr.predict(model, dataset, tmp_path / "out.zarr")
        assert {key for key, _ in store.reads} == expected_keys(("X", (n, P), x_chunks))
        assert set(store.reads.values()) == {1}

    def test_edges_that_are_shared_by_nobody_cost_little(self, rows):
        store, dataset = counted(rows, (1009, P), (997,))
        streamlr.accumulate(dataset)
        n_spans = streamlr.plan(dataset).n_spans
        twice = {key for (key, _), times in store.reads.items() if times > 1}
        assert all(key.startswith("y/") for key in twice), "the array with the most bytes is decoded once"
        assert len(twice) <= n_spans

    @pytest.mark.parametrize("workers", [1, 2, 3])
    def test_neighbouring_spans_of_whole_tiles_share_the_chunk_at_their_edge(self, rows, spans_of_one_tile, workers):
        store, dataset = counted(rows, (1009, P), (997,))
        expected = streamlr.accumulate(streamlr.Dataset(*rows)).scatter.tobytes()
        with dask.config.set(num_workers=workers):
            plan = streamlr.plan(dataset)
            runs = -(-plan.n_spans // plan.spans_per_task)
            assert (plan.n_spans, runs) == (10, 2)
            assert streamlr.accumulate(dataset).scatter.tobytes() == expected
        twice = Counter(key.split("/")[0] for (key, _), times in store.reads.items() if times > 1)
        taken_over = (workers - 1) * 4  # parts of runs: 4, 2 and 1 spans, and as many again if one thread is slow
        assert max(twice.values()) <= runs - 1 + taken_over
        assert set(store.reads.values()) <= {1, 2}

    @pytest.mark.parametrize("workers", [1, 2, 4])
    @pytest.mark.parametrize(("chunk", "y_chunk"), [(1000, 1000), (1024, 1024), (600, 400)])
    def test_rows_are_kept_only_where_threads_meet(self, rows, model, monkeypatch, tmp_path, chunk, y_chunk, workers):
        """A thread that reads on has the tiles at the edges of its spans whole; there is no need to copy their rows."""
        monkeypatch.setattr(blocks, "MIN_SPAN_BYTES", 1)
        dataset = streamlr.open_dataset(make_arrays(tmp_path / "s", *rows, chunk, y_chunk))
        kept, read, copy, get = [], [], Block.copy, StoredChunks.get
        monkeypatch.setattr(Block, "copy", lambda block: kept.append(block.start) or copy(block))
        monkeypatch.setattr(
            StoredChunks, "get", lambda self, position, *rest: read.append((self.label, position)) or get(self, position, *rest)
        )
        with dask.config.set(num_workers=workers):
            plan = streamlr.plan(dataset)
            runs = -(-plan.n_spans // plan.spans_per_task)
            for run in (lambda: streamlr.accumulate(dataset), lambda: streamlr.evaluate(model, dataset)):
                read.clear()
                kept.clear()
                run()
                # where runs end, on either side and once more when they meet; and where parts of them do that are taken over
                assert len(kept) <= (4 * (runs - 1) if workers == 1 else 2 * plan.n_spans)
                assert len(read) == len(set(read)) == -(-N // chunk) + -(-N // y_chunk)

    @pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
    def test_an_absent_chunk_at_an_edge_is_counted_once(self, rows, spans_of_one_tile, scheduler):
        group = zarr.open_group(MemoryStore(), mode="w")
        x = group.create_array("X", shape=(N, P), dtype="f8", chunks=(1000, P), compressors=None)
        x[:4000], x[5000:] = rows[0][:4000], rows[0][5000:]
        group.create_array("y", data=rows[1], chunks=(N,))
        with dask.config.set(scheduler=scheduler):
            assert streamlr.fit(streamlr.open_dataset(group, allow_missing_chunks=True)).chunks_missing == 1

    def test_codecs_that_are_left_to_zarr(self, rows):
        store, dataset = counted(rows, (1000, P), (1000,), compressors=[Crc32cCodec(), ZstdCodec(level=-5)])
        streamlr.accumulate(dataset)
        assert set(store.reads.values()) == {1}

    def test_shards(self, rows):
        store, dataset = counted(rows, (500, P), (1000,), shards=(4000, P), compressors=[ZstdCodec(level=-5)])
        streamlr.accumulate(dataset)
        assert set(store.reads.values()) == {1}
        per_shard = Counter(key for key, _ in store.reads if key.startswith("X/"))
        assert set(per_shard.values()) == {8 + 1}, "eight inner chunks and one index"

    def test_columns_that_are_not_wanted_are_not_read(self, rows):
        group = zarr.open_group(MemoryStore(), mode="w")
        group.create_array("X", data=rows[0], chunks=(4000, 10), compressors=None)
        group.create_array("y", data=rows[1], chunks=(4000,))
        store = CountingStore(group.store)
        streamlr.accumulate(streamlr.open_dataset(zarr.open_group(store, mode="r+"), features=["x3", "x55", "x57"]))
        assert {key.rsplit("/", 1)[1] for key, _ in store.reads if key.startswith("X/")} == {"0", "5"}
        assert set(store.reads.values()) == {1}

    def test_a_refused_plan_reads_nothing(self, rows, model, tmp_path):
        store, dataset = counted(rows, (1000, P), (1000,))
        for run in (
            lambda: streamlr.fit(dataset, memory_limit="10MB"),
            lambda: streamlr.evaluate(model, dataset, memory_limit="10MB"),
            lambda: streamlr.predict(model, dataset, tmp_path / "out.zarr", memory_limit="10MB"),
        ):
            with pytest.raises(MemoryLimitExceeded, match=r"needs \d.* [kMG]B.*limit is 10\.0 MB \(as asked\).*raise memory_limit"):
                run()
        assert not store.reads
        assert not list(tmp_path.iterdir())


class TestTasks:
    """Few, and small."""

    def test_a_million_chunks_are_few_tasks(self):
        arrays = [zarr.create_array(MemoryStore(), shape=(10**8, *w), chunks=(100, *w), dtype="f8") for w in ((10,), ())]
        dataset = streamlr.Dataset(*arrays)
        for statistic in (MomentsOf(dataset.feature_names, ("y",)), ResidualsOf(np.zeros((10, 1)), np.zeros(1))):
            began = time.perf_counter()
            plan, cut = plan_pass(dataset, statistic, task="t", memory=None)
            assert time.perf_counter() - began < 0.5
            assert plan.n_tasks <= 10_000
            assert sum(span.stop - span.start for span in cut) == 10**8

    def test_arguments_are_paths_and_integers(self, tmp_path):
        group = zarr.open_group(tmp_path / "s.zarr", mode="w")
        group.create_array("X", data=np.ones((5000, 50)), chunks=(10, 50))
        group.create_array("y", data=np.ones(5000), chunks=(10,))
        dataset = streamlr.open_dataset(tmp_path / "s.zarr")
        tasks = span_tasks(dataset, [Span(0, 2500), Span(2500, 5000)], "t", "key", len)
        graph = dict(tasks[1].__dask_graph__())
        assert len(pickle.dumps(graph[tasks[1].key])) < 2_000
        assert len(graph[tasks[1].key].dependencies) == 1, "what is common comes as one"
        for node in graph.values():
            value = getattr(node, "value", node)
            assert not isinstance(value, np.ndarray)
            if not hasattr(node, "func"):
                assert len(pickle.dumps(value)) < 10_000

    def test_spans_share_a_reader_that_stays_in_its_process(self, rows):
        source = Source(streamlr.Dataset(rows[0][:300], rows[1][:300]))
        for start in (0, 100, 200):
            with running_pass("t", 300, 1, None) as key, share_of_pass(key) as share:
                assert sum(len(block.x) for block in source.blocks(Span(start, start + 100), share, 30, [])) == 100
            assert len(source._idle) == 1
        assert not pickle.loads(pickle.dumps(source))._idle

    def test_runs_of_spans_stay_in_their_process(self, rows):
        """Elsewhere nobody would know who has begun which: each task reads its own span."""
        cut = [Span(0, 100), Span(100, 200), Span(200, 300)]
        source = Source(streamlr.Dataset(rows[0][:300], rows[1][:300]), Runs(cut, 2))
        copy = pickle.loads(pickle.dumps(source))
        with running_pass("t", 300, 1, None) as key, share_of_pass(key) as share:
            for reading, starts in ((source, [[0, 100], [200], []]), (copy, [[0], [100], [200]])):
                assert [[block.start for block in reading.blocks(span, share, 100, [])] for span in cut] == starts

    @given(st.integers(0, 40), st.sampled_from([1, 2, 8]), st.data())
    def test_runs_hand_out_every_span_once(self, n_spans, length, data):
        """Whoever is faster."""
        cut = [Span(row, row + 1) for row in range(n_spans)]
        runs = Runs(cut, length)
        readers: list[list[Span]] = [[] for _ in range(3)]
        takes = [runs.take() for _ in readers]
        while sum(map(len, readers)) < n_spans:
            number = data.draw(st.integers(0, 2))
            span = next(takes[number], None)
            if span is None:
                takes[number] = runs.take()
            else:
                readers[number].append(span)
        assert sorted((span for spans in readers for span in spans), key=lambda span: span.start) == cut
        assert not any(list(take) for take in [*takes, runs.take()])

    @given(st.integers(1, 2_000), st.sampled_from([1, 2, 8, 32]), st.sampled_from([1, 4]), st.sampled_from([1, 2, 8]))
    def test_pieces_of_spans_are_whole_tiles_and_runs_whole_spans(self, n_rows, tiles, tile, count):
        height = tiles * tile
        cut = [Span(start, min(start + height, n_rows)) for start in range(0, n_rows, height)]
        runs = Runs.of_spans(cut, count, tile)
        for first in range(0, len(cut), count):
            pieces, spans = list(runs.take()), cut[first : first + count]
            assert (pieces[0].start, pieces[-1].stop) == (spans[0].start, spans[-1].stop)
            assert all(one.stop == other.start and one.stop % tile == 0 for one, other in pairwise(pieces))
            assert len(pieces) <= PIECES * len(spans) + 2 * PIECES
        assert not list(runs.take())

    @pytest.mark.parametrize("workers", [1, 2, 3])
    @pytest.mark.parametrize("chunk", [997, 65_536])
    def test_spans_of_several_tiles_have_the_same_bits(self, rows, tmp_path, monkeypatch, spans_of_one_tile, workers, chunk):
        monkeypatch.setattr(blocks, "SPANS_PER_WORKER", 1)
        group = zarr.open_group(tmp_path / "s.zarr", mode="w")
        group.create_array("X", data=rows[0], chunks=(chunk, P))
        group.create_array("y", data=rows[1], chunks=(chunk,))
        dataset = streamlr.open_dataset(tmp_path / "s.zarr")
        with dask.config.set(num_workers=workers):
            assert streamlr.plan(dataset).n_spans < 4
            assert same_bits(streamlr.accumulate(dataset), streamlr.accumulate(streamlr.Dataset(*rows)))

    def test_a_run_is_divided_when_all_are_begun(self):
        runs = Runs([Span(row, row + 1) for row in range(12)], 4)
        takes = [runs.take() for _ in range(3)]
        assert [next(take).start for take in takes] == [0, 4, 8]
        assert [span.start for span in takes[0]] == [1, 2, 3]
        assert [span.start for span in runs.take()] == [6, 7]
        assert [[span.start for span in take] for take in takes] == [[], [5], [9, 10, 11]]

    def test_datasets_pickle(self, tmp_path, rows):
        group = zarr.open_group(tmp_path / "s.zarr", mode="w")
        group.create_array("X", data=rows[0][:3000], chunks=(1000, P), shards=(2000, P))
        group.create_array("y", data=rows[1][:3000])
        x, y = rows[0][:3000], rows[1][:3000]
        opened = streamlr.open_dataset(tmp_path / "s.zarr")
        for dataset in (opened, opened.split(0.3)[0], streamlr.Dataset(x, y), streamlr.Dataset(group["X"], y)):
            again = pickle.loads(pickle.dumps(dataset))
            assert again.fingerprint == dataset.fingerprint
            assert streamlr.fit(again).coef.tobytes() == streamlr.fit(dataset).coef.tobytes()

    def test_lazy_datasets_pickle(self, rows):
        lazy = streamlr.Dataset(da.from_array(rows[0][:3000], chunks=(1000, P)), rows[1][:3000])
        again = pickle.loads(pickle.dumps(lazy))
        assert streamlr.fit(again).coef.tobytes() == streamlr.fit(lazy).coef.tobytes()

    def test_unknown_chunk_sizes(self):
        x = da.from_array(np.arange(20.0).reshape(10, 2), chunks=(5, 2))
        with pytest.raises(UsageError, match=r"unknown size.*compute_chunk_sizes"):
            streamlr.Dataset(x[x[:, 0] > 3], np.ones(10))

    def test_workers_are_those_that_dask_is_given(self, rows):
        dataset = streamlr.Dataset(*rows)
        for settings, workers in (({"num_workers": 3}, 3), ({"scheduler": "synchronous"}, 1)):
            with dask.config.set(settings):
                assert streamlr.plan(dataset).tasks_at_once == workers
        with dask.config.set(scheduler="processes", num_workers=3):
            assert streamlr.plan(dataset).tasks_at_once == 3
        for setting in ("pool", "scheduler"):
            with ThreadPoolExecutor(3) as pool, dask.config.set({setting: pool}):
                assert streamlr.plan(dataset).tasks_at_once == 3
        with ThreadPool(3) as pool, dask.config.set(pool=pool):
            assert streamlr.plan(dataset).tasks_at_once == 3
            assert streamlr.fit(dataset).n_rows == N
        with dask.config.set(scheduler=partial(dask.threaded.get, num_workers=3)):
            assert streamlr.fit(dataset).n_rows == N

    def test_processes_of_the_callers_run_as_many_tasks_as_planned(self, rows):
        def times(_):
            began = time.time()
            time.sleep(0.2)
            return began, time.time()

        context = dask.multiprocessing.get_context()
        with ProcessPoolExecutor(3, context) as pool, dask.config.set(scheduler="processes", pool=pool, chunksize=1):
            assert streamlr.plan(streamlr.Dataset(*rows)).tasks_at_once == 3
            assert streamlr.fit(streamlr.Dataset(*rows)).n_rows == N
            tasks = sorted(dask.compute(*[dask.delayed(times)(i) for i in range(4)], **options_for(1)))
        assert all(ended <= begins for (_, ended), (begins, _) in pairwise(tasks))

    @pytest.mark.parametrize("setting", ["pool", "scheduler"])
    def test_a_pool_of_the_callers_runs_as_many_tasks_as_planned(self, rows, monkeypatch, setting):
        dataset = streamlr.Dataset(*rows)
        expected = streamlr.fit(dataset).coef
        running, seen, moments_of = [], set(), MomentsOf.of

        def noted(statistic, block):
            running.append(block)
            seen.add(len(running))
            assert threading.current_thread().name.startswith("callers")
            time.sleep(0.05)
            running.pop()
            return moments_of(statistic, block)

        monkeypatch.setattr(MomentsOf, "of", noted)
        monkeypatch.setattr(blocks, "MIN_SPAN_BYTES", 1)  # more spans than tasks at once
        with ThreadPoolExecutor(8, "callers") as pool, dask.config.set({setting: pool}):
            plan = streamlr.plan(dataset)
            limit = plan.base_bytes + plan.result_bytes + 5 * plan.task_bytes // 2
            plan = streamlr.plan(dataset, memory_limit=limit)
            assert plan.tasks_at_once == 2 < plan.n_spans
            found = streamlr.fit(dataset, memory_limit=limit).coef
        assert found.tobytes() == expected.tobytes()
        assert seen == {1, 2}

    def test_an_executor_of_the_callers_does_not_wait_for_itself(self):
        """In a process of its own, where `distributed` is not imported yet, and which can be stopped."""
        program = """
from concurrent.futures import ThreadPoolExecutor
import dask, dask.array as da, numpy as np, streamlr
x = da.from_array(np.random.default_rng(0).standard_normal((4_000, 3)), chunks=(500, 3))
with ThreadPoolExecutor(2) as pool, dask.config.set(scheduler=pool):
    model = streamlr.fit(streamlr.Dataset(x, x.sum(axis=1)), streamlr.Descent("minibatch", streams=4, max_epochs=2))
assert model.n_rows == 4_000
"""
        subprocess.run([sys.executable, "-c", program], timeout=100, check=True)

    def test_what_ends_a_process_ends_it_in_a_pool_of_the_callers(self):
        """A thread of `multiprocessing` dies of what is no `Exception`, and nobody would hear of its task."""
        program = """
from multiprocessing.pool import ThreadPool
import dask, dask.array as da, numpy as np, streamlr
x = da.ones((4_000, 3), chunks=(500, 3))
with ThreadPool(2) as pool, dask.config.set(pool=pool):
    streamlr.fit(streamlr.Dataset(x.map_blocks(lambda block: exit(7), meta=x._meta), np.ones(4_000)))
"""
        assert subprocess.run([sys.executable, "-c", program], timeout=100).returncode == 7


@pytest.mark.usefixtures("four_workers")
def test_where_memory_allows_fewer_tasks_than_workers_each_has_as_many_spans(rows):
    """Three of four tasks fit: spans for four would keep the others waiting for the last."""
    dataset = counted(rows, (1000, P), (1000,))[1]
    all_of_them = streamlr.plan(dataset)
    assert (all_of_them.tasks_at_once, all_of_them.n_spans % 4) == (4, 0)
    for fitting in (3, 2, 1):
        least = all_of_them.base_bytes + all_of_them.result_bytes + fitting * all_of_them.task_bytes
        plan = streamlr.plan(dataset, memory_limit=least + 3 * all_of_them.task_bytes // 4)
        assert plan.tasks_at_once == fitting
        assert plan.n_spans % fitting == 0
        assert plan.fits


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


class Spy(MomentsOf):
    """Moments that look at the number of BLAS threads on the way."""

    seen: list[int]

    def of(self, block):
        self.seen.extend(blas_threads())
        if self.fail_at == block.start:
            raise ArithmeticError("as planned")
        return super().of(block)


def seen_by_a_pass() -> list[int]:
    with one_blas_thread():
        return blas_threads()


def spy_on(dataset, fail_at=None) -> Spy:
    spy = Spy(dataset.feature_names, dataset.target_names)
    object.__setattr__(spy, "seen", [])
    object.__setattr__(spy, "fail_at", fail_at)
    return spy


class TestBlasThreads:
    """One while a pass runs; afterwards as many as before."""

    def test_during_and_after(self, rows):
        dataset, before = streamlr.Dataset(*rows), blas_threads()
        spy = spy_on(dataset)
        reduce(dataset, spy, task="t")
        assert spy.seen
        assert set(spy.seen) == {1}
        assert blas_threads() == before

    def test_after_an_error(self, rows):
        dataset, before = streamlr.Dataset(*rows), blas_threads()
        with pytest.raises(ArithmeticError, match="as planned"):
            reduce(dataset, spy_on(dataset, fail_at=dataset.tile_rows), task="t")
        assert blas_threads() == before

    def test_two_passes_at_once(self, rows):
        dataset, before = streamlr.Dataset(*rows), blas_threads()
        spies = [spy_on(dataset) for _ in range(3)]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda spy: reduce(dataset, spy, task="t").value.scatter.tobytes(), spies))
        assert len(set(found)) == 1
        assert {count for spy in spies for count in spy.seen} == {1}
        assert blas_threads() == before

    def test_another_thread_may_be_the_last(self):
        before = blas_threads()
        entered, leave = threading.Event(), threading.Event()

        def hold():
            with one_blas_thread():
                entered.set()
                leave.wait(10)

        with one_blas_thread():
            other = threading.Thread(target=hold)
            other.start()
            entered.wait(10)
        assert set(blas_threads()) == {1}
        leave.set()
        other.join()
        assert blas_threads() == before

    def test_a_limit_of_another_thread_is_no_obstacle(self):
        """And it is free again afterwards."""
        before = blas_threads()
        with threadpool_limits(limits=2, user_api="blas"), ThreadPoolExecutor(1) as pool:
            assert set(pool.submit(seen_by_a_pass).result()) == {1}
        with ThreadPoolExecutor(1) as pool:
            pool.submit(threadpool_limits, limits=1, user_api="blas").result()
            assert set(blas_threads()) == {1}
        with threadpool_limits(limits=before[0], user_api="blas"):
            pass
        threadpool_limits(limits=before[0], user_api="blas")
        assert blas_threads() == before

    def test_the_last_holder_gives_back(self):
        before = blas_threads()
        with one_blas_thread():
            with one_blas_thread():
                assert set(blas_threads()) == {1}
            assert set(blas_threads()) == {1}
        assert blas_threads() == before


class TestProgress:
    @pytest.mark.parametrize("lazy", [False, True])
    def test_events_rise_to_the_total(self, rows, tmp_path, model, lazy):
        dataset = counted(rows, (1000, P), (700,))[1]
        if lazy:
            dataset = streamlr.Dataset(da.from_array(rows[0], chunks=(7000, 60)), rows[1])
        for task, run in (
            ("moments", lambda see: streamlr.fit(dataset, progress=see)),
            ("cost", lambda see: streamlr.evaluate(model, dataset, progress=see)),
            ("prediction", lambda see: streamlr.predict(model, dataset, tmp_path / "out.zarr", progress=see)),
        ):
            events = []
            run(events.append)
            assert {event.task for event in events} == {task}
            for field in ("rows", "bytes", "seconds"):
                values = [getattr(event, field) for event in events]
                assert values == sorted(values)
            assert events[-1].rows == events[-1].rows_total == N
            assert events[-1].bytes == events[-1].bytes_total > N * P * 8 - 1
            assert len(events) >= N // dataset.tile_rows

    def test_a_callback_that_fails_ends_the_pass(self, rows):
        def fail(event):
            raise LookupError("the bar is closed")

        before = threading.active_count()
        with pytest.raises(LookupError, match="the bar is closed"):
            streamlr.fit(streamlr.Dataset(*rows), progress=fail)
        assert threading.active_count() <= before + 4

    def test_no_task_works_on_after_an_error(self, rows, tmp_path, model, monkeypatch):
        """What is cancelled neither reads nor writes any more by the time the caller hears of it."""
        monkeypatch.setattr(read_ahead, "REQUESTS", 8)  # under way at once, of all 80
        store, dataset = counted(rows, (1000, P), (1000,))

        def fail(event):
            raise LookupError("enough")

        with pytest.raises(LookupError):
            streamlr.predict(model, dataset, tmp_path / "out.zarr", progress=fail)
        reads = store.reads.total()
        assert reads < 40
        assert not list(tmp_path.iterdir())
        time.sleep(0.2)
        assert store.reads.total() == reads
        assert not list(tmp_path.iterdir())

    def test_a_task_that_starts_too_late_is_told(self):
        with running_pass("t", 10, 8, None) as key:
            assert find_pass(key) is not None
        with pytest.raises(Cancelled):
            find_pass(key)
        assert find_pass("another process's key") is None


class TestPredictions:
    def test_rows_are_predicted_in_tiles_of_what_comes_out_too(self, tmp_path):
        heights = []

        def zeros(block):
            heights.append(len(block.x))
            return np.zeros((len(block.x), 20))

        write(streamlr.Dataset(np.ones((400_000, 2))), zeros, tmp_path / "p.zarr", name="prediction", n_columns=20)
        assert sum(heights) == 400_000
        assert max(heights) * 20 * 8 <= TILE_BYTES

    @pytest.mark.parametrize("chunks", [(1000, P), (999, 7), (N, P), (30_000, P)])
    def test_same_bits_in_chunks_of_x(self, rows, model, tmp_path, chunks):
        dataset = counted(rows, chunks, (1000,))[1]
        tally = streamlr.predict(model, dataset, tmp_path / "out.zarr")
        assert tally.rows == N
        found = zarr.open_group(tmp_path / "out.zarr", mode="r")["prediction"]
        assert found[:].tobytes() == model.predict(rows[0]).tobytes()
        assert found.chunks == (chunks[0],)
        assert isinstance(found.metadata.codecs[-1], Crc32cCodec)
        assert len(list((tmp_path / "out.zarr/prediction/c").iterdir())) == -(-N // chunks[0])

    def test_no_target_is_needed(self, rows, model, tmp_path):
        array = zarr.create_array(MemoryStore(), data=rows[0][:5000], chunks=(700, P), shards=(2100, P))
        streamlr.predict(model, streamlr.open_dataset(array), tmp_path / "out.zarr")
        found = zarr.open_group(tmp_path / "out.zarr", mode="r")["prediction"]
        assert found[:].tobytes() == model.predict(rows[0][:5000]).tobytes()

    @pytest.mark.parametrize(
        "chunks", [((100, 1, 2899, 2000), (P,)), (((700,) * 7 + (100,)), (40, 60)), ((0, 4999, 1), (P,)), ((5000,), (P,))], ids=str
    )
    def test_dask_arrays_of_any_chunks(self, rows, model, tmp_path, chunks):
        x = rows[0][:5000]
        streamlr.predict(model, streamlr.Dataset(da.from_array(x, chunks=chunks)), tmp_path / "out.zarr")
        found = zarr.open_group(tmp_path / "out.zarr", mode="r")["prediction"]
        assert found[:].tobytes() == model.predict(x).tobytes()
        assert found.chunks == (max(chunks[0]),)

    def test_several_targets(self, rows, tmp_path):
        y = np.column_stack([rows[1], -rows[1], rows[0][:, 0] ** 2])[:5000]
        dataset = counted((rows[0][:5000], y), (600, P), (500, 2))[1]
        model = streamlr.fit(dataset)
        streamlr.predict(model, dataset, tmp_path / "out.zarr")
        found = zarr.open_group(tmp_path / "out.zarr", mode="r")["prediction"]
        assert found[:].tobytes() == model.predict(rows[0][:5000]).tobytes()
        assert found.shape == (5000, 3)

    def test_rows_that_lack_a_value_keep_their_place(self, rows, model, tmp_path):
        x = rows[0][:5000].copy()
        x[[0, 1234, 4999], [3, 50, 99]] = np.nan
        zarr.create_array(str(tmp_path / "x.zarr"), data=x, chunks=(700, P))
        with pytest.raises(DataError, match="row 0, column 'x3'"):
            streamlr.predict(model, streamlr.open_dataset(tmp_path / "x.zarr"), tmp_path / "out.zarr")
        tally = streamlr.predict(model, streamlr.open_dataset(tmp_path / "x.zarr", missing="drop"), tmp_path / "out.zarr")
        assert (tally.rows, tally.dropped, tally.dropped_by_column) == (5000, 3, {"x3": 1, "x50": 1, "x99": 1})
        found = zarr.open_group(tmp_path / "out.zarr", mode="r")["prediction"][:]
        assert np.flatnonzero(np.isnan(found)).tolist() == [0, 1234, 4999]
        np.testing.assert_array_equal(found, model.predict(x))

    def test_what_is_there_stays_there(self, rows, model, tmp_path):
        dataset = streamlr.Dataset(rows[0][:100])
        (tmp_path / "out.zarr").mkdir()
        (tmp_path / "out.zarr/mine").write_text("mine")
        with pytest.raises(OutputExists, match=r"out\.zarr already exists"):
            streamlr.predict(model, dataset, tmp_path / "out.zarr")
        with pytest.raises(OutputExists, match="a folder with other files"):
            streamlr.predict(model, dataset, tmp_path / "out.zarr", overwrite=True)
        assert (tmp_path / "out.zarr/mine").read_text() == "mine"
        (tmp_path / "out.zarr/mine").unlink()
        zarr.open_group(tmp_path / "out.zarr", mode="w")
        streamlr.predict(model, dataset, tmp_path / "out.zarr", overwrite=True)
        assert zarr.open_group(tmp_path / "out.zarr", mode="r")["prediction"].shape == (100,)

    def test_a_part_of_a_split_is_refused(self, rows, model, tmp_path):
        part = streamlr.Dataset(*rows).split(0.5)[0]
        with pytest.raises(UsageError, match="whole dataset"):
            streamlr.predict(model, part, tmp_path / "out.zarr")

    def test_a_function_of_any_width(self, rows, tmp_path):
        dataset = streamlr.Dataset(rows[0][:3000])
        write(dataset, lambda block: block.x[:, :2] + 1, tmp_path / "out.zarr", name="two", n_columns=2)
        np.testing.assert_array_equal(zarr.open_group(tmp_path / "out.zarr", mode="r")["two"][:], rows[0][:3000, :2] + 1)


MEASURE = """
import sys, re, pathlib, numpy as np, streamlr
from streamlr.aggregates.cost import ResidualsOf
from streamlr.passes.planning import plan_pass
if sys.argv[2] == "dask":
    import dask.array as da
    dataset = streamlr.Dataset(*(da.from_zarr(sys.argv[1], component=name) for name in ("X", "y")))
else:
    dataset = streamlr.open_dataset(sys.argv[1], missing=sys.argv[2])
planned = streamlr.plan(dataset)
if sys.argv[3] == "evaluate":
    x = np.random.default_rng(0).normal(size=(2 * dataset.n_features, dataset.n_features))
    model = streamlr.fit(streamlr.Dataset(x, x[:, 0], feature_names=dataset.feature_names))
    statistic = ResidualsOf(model.coef_matrix, model.intercept_vector)
    planned = plan_pass(dataset, statistic, task="cost", memory=None)[0]
    streamlr.evaluate(model, dataset)
else:
    model = streamlr.fit(dataset)
if sys.argv[3] == "predict":
    streamlr.predict(model, dataset, sys.argv[1] + ".out")
# not ru_maxrss, which a new process inherits from the one that started it
peak = int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
print(planned.peak_bytes, planned.base_bytes, peak)
"""


def measure(path, missing="error", action="fit") -> tuple[int, int, int]:
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path), missing, action], capture_output=True, text=True, check=True)
    planned, base, peak = map(int, run.stdout.split())
    return planned, base, peak


def make_store(path, n, p, chunk, **options):
    rng = np.random.default_rng(0)
    group = zarr.open_group(path, mode="w")
    x = group.create_array("X", shape=(n, p), chunks=(chunk, p), dtype="f8", **options)
    y = group.create_array("y", shape=(n,), chunks=(chunk,), dtype="f8")
    for start in range(0, n, chunk):
        rows = rng.normal(size=(min(chunk, n - start), p))
        x[start : start + chunk] = rows
        y[start : start + chunk] = rows.sum(axis=1) + 1
    return path


linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")


@linux
class TestMemory:
    """What is planned is kept, in a process of its own."""

    @pytest.mark.parametrize(("n", "p", "chunk"), [(1_000_000, 10, 65_536), (150_000, 100, 32_768), (24_000, 500, 4_096)])
    @pytest.mark.parametrize("compressors", [None, [ZstdCodec(level=-5)]], ids=["none", "zstd"])
    @pytest.mark.parametrize("action", ["fit", "evaluate"])
    def test_the_peak_is_at_most_the_planned(self, tmp_path, n, p, chunk, compressors, action):
        path = make_store(tmp_path / "s.zarr", n, p, chunk, compressors=compressors)
        planned, base, peak = measure(path, action=action)
        assert peak <= planned
        assert planned <= max(3 * peak, peak + 2 * base), "a plan that is far too careful refuses what would run"

    def test_predictions_and_rows_to_drop_too(self, tmp_path):
        path = make_store(tmp_path / "s.zarr", 24_000, 500, 4_096, compressors=[ZstdCodec(level=-5)])
        group = zarr.open_group(path, mode="r+")
        for row in range(0, 24_000, 1_000):
            group["X"][row, 7] = np.nan
        planned, _, peak = measure(path, "drop", "predict")
        assert peak <= planned

    def test_dask_arrays_that_read_zarr_too(self, tmp_path):
        path = make_store(tmp_path / "s.zarr", 150_000, 100, 32_768, compressors=[ZstdCodec(level=-5)])
        planned, _, peak = measure(path, "dask")
        assert peak <= planned

    def test_the_peak_does_not_grow_with_the_rows(self, tmp_path):
        peaks = [measure(make_store(tmp_path / f"{n}", n, 50, 16_384, compressors=None))[2] for n in (200_000, 800_000)]
        assert peaks[1] - peaks[0] < 40_000_000  # the rows themselves grow by 240 MB


SLOW = """
import asyncio, sys, numpy as np, zarr, streamlr
from zarr.storage import MemoryStore, WrapperStore

class SlowStore(WrapperStore):
    async def get(self, key, prototype, byte_range=None):
        if "c/" in key:
            await asyncio.sleep(0.1)
        return await self._store.get(key, prototype, byte_range)

group = zarr.open_group(MemoryStore(), mode="w")
group.create_array("X", data=np.random.default_rng(0).normal(size=(60_000, 60)), chunks=(300, 60), compressors=None)
group.create_array("y", data=np.arange(60_000.0), chunks=(60_000,))
model = streamlr.fit(streamlr.open_dataset(group))
dataset = streamlr.open_dataset(zarr.open_group(SlowStore(group.store), mode="r+"))
see = lambda event: print("event", flush=True)
if sys.argv[1] == "fit":
    streamlr.fit(dataset, progress=see)
else:
    streamlr.predict(model, dataset, sys.argv[1], progress=see)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another thing there")
@pytest.mark.parametrize("action", ["fit", "predict"])
def test_ctrl_c_ends_within_two_seconds_and_leaves_nothing(tmp_path, action):
    """The store would take ten seconds on two threads, five on four."""
    target = "fit" if action == "fit" else str(tmp_path / "out.zarr")
    process = subprocess.Popen([sys.executable, "-c", SLOW, target], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
    assert not list(tmp_path.iterdir())
