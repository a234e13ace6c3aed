"""Passes on a Dask cluster of real processes over TCP: the same bits, whoever dies; and an error in time when nobody is left."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore

import streamlr
from streamlr.dataset import blocks
from streamlr.errors import ClusterError, MemoryLimitExceeded, NonFiniteValue, UsageError
from streamlr.inspection import verify
from streamlr.passes import cluster as passes_cluster
from streamlr.passes.workers import _look_around

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # sockets of connections that a test cuts
N, P = 200_000, 100  # ten spans of 16 MB
DASK = [sys.executable, "-m", "dask"]
OPENSSL = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
ENDS = 60  # seconds within which whatever cannot go on has ended


class Cluster:
    """A scheduler and workers, each a process of its own."""

    def __init__(self, folder: Path, *options: Any) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        place = folder / "scheduler.json"
        own = ["--host", "127.0.0.1", "--port", "0", "--scheduler-file", place, "--no-dashboard"]
        self.scheduler = self.start("scheduler", *own, *options)
        deadline = time.monotonic() + 30
        while not (place.exists() and place.read_text().rstrip().endswith("}")):
            assert time.monotonic() < deadline, (folder / "0.log").read_text()
            time.sleep(0.05)
        self.address: str = json.loads(place.read_text())["address"]

    def start(self, kind: str, *arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{len(self.processes)}.log").open("wb")
        command = [*DASK, kind, *map(str, arguments)]
        with log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **options)
        self.processes.append(process)
        return process

    def add_worker(self, *arguments: str, nanny: bool = False, memory: str = "1GB", **options: Any) -> subprocess.Popen[bytes]:
        own = ["--nthreads", "1", "--memory-limit", memory, "--no-dashboard", "--local-directory", self.folder]
        return self.start("worker", self.address, *own, *(() if nanny else ("--no-nanny",)), *arguments, **options)

    def stop(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def a_cluster(folder: Path, workers: int = 0, **options: Any) -> Iterator[tuple[Cluster, Any]]:
    folder.mkdir(exist_ok=True)
    cluster = Cluster(folder)
    try:
        for _ in range(workers):
            cluster.add_worker(**options)
        with warnings.catch_warnings(action="ignore"), distributed.Client(cluster.address, set_as_default=False) as client:
            if workers:
                client.wait_for_workers(workers, timeout=30)
            with client.as_current():
                yield cluster, client
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("shared") / "rows.zarr"
    group = zarr.open_group(path, mode="w")
    X = group.create_array("X", shape=(N, P), chunks=(7_000, P), dtype="f8", compressors=None)
    y = group.create_array("y", shape=(N,), chunks=(20_000,), dtype="f8")
    for start in range(0, N, 7_000):
        rows = rng.normal(size=(min(7_000, N - start), P))
        X[start : start + len(rows)] = rows
        y[start : start + len(rows)] = rows.sum(axis=1) + rng.normal(size=len(rows))
    return path


def results(store: Path, folder: Path) -> list[bytes]:
    dataset = streamlr.open_dataset(store)
    model = streamlr.fit(dataset)
    cost = streamlr.evaluate(model, dataset)
    streamlr.predict(model, dataset, folder / "out.zarr", overwrite=True)
    predicted = zarr.open_group(folder / "out.zarr")["prediction"][:]
    found = [model.coef, model.summary().std_err, cost.mse, cost.mae, predicted]
    for streams in (1, 4):
        found.append(streamlr.fit(dataset, streamlr.Descent("minibatch", max_epochs=1, streams=streams)).coef)
    return [np.asarray(a).tobytes() for a in found]


@pytest.fixture(scope="module")
def expected(store, tmp_path_factory):
    with dask.config.set(num_workers=1):
        return results(store, tmp_path_factory.mktemp("threads"))


@pytest.fixture(scope="module")
def coef(expected):
    return expected[0]


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(passes_cluster, "PATIENCE", 4.0)


def test_a_worker_whose_own_folder_is_gone_sees_no_relative_path(tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    seen = _look_around([("rows.zarr", str(folder / "rows.zarr"), ("",)), (str(tmp_path), str(tmp_path), ("",))], ())
    assert set(seen["places"]) == {"rows.zarr", str(tmp_path)}
    assert seen["places"]["rows.zarr"] == ""


@pytest.mark.parametrize("nanny", [False, True])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_same_bits_on_any_workers(store, expected, tmp_path, workers, nanny):
    with a_cluster(tmp_path / "cluster", workers, nanny=nanny):
        assert results(store, tmp_path) == expected


def living(client: Any, count: int, but: int) -> set[int]:
    """The processes of the workers, once there are so many again; the scheduler may not have noticed yet who is dead."""
    deadline = time.monotonic() + 120
    while len(found := set(client.run(os.getpid, on_error="ignore").values()) - {but}) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_the_same_bits_whichever_worker_dies_and_when(store, coef, tmp_path):
    rng = random.Random(0)
    with a_cluster(tmp_path / "cluster", 2, nanny=True) as (_, client):
        dataset, victim, died_within = streamlr.open_dataset(store), 0, 0
        for _ in range(10):
            victim = rng.choice(sorted(living(client, 2, but=victim)))
            timer = threading.Timer(rng.uniform(0, 0.6), os.kill, (victim, signal.SIGKILL))
            timer.start()
            model = streamlr.fit(dataset)
            died_within += timer.finished.is_set()
            timer.join()
            assert (model.n_rows, model.coef.tobytes()) == (N, coef)
        assert died_within, "some must have died within a pass"


def test_a_worker_that_comes_late_and_one_that_goes(store, coef, tmp_path):
    with a_cluster(tmp_path / "cluster", 1) as (cluster, _):
        first = cluster.processes[1]

        def exchange(event):
            if len(cluster.processes) == 2:
                cluster.add_worker()
                first.kill()

        assert streamlr.fit(streamlr.open_dataset(store), progress=exchange).coef.tobytes() == coef


def test_a_worker_of_another_version_that_comes_late(store, tmp_path):
    """It is found out before there is a result, though it may have done nothing."""
    with a_cluster(tmp_path / "cluster", 1) as (cluster, client):

        def add(event):
            if len(cluster.processes) == 2:
                cluster.add_worker(env=with_another_zarr(tmp_path))
                client.wait_for_workers(2, timeout=30)

        with pytest.raises(ClusterError, match=r"has zarr 9\.9\.9"):
            streamlr.fit(streamlr.open_dataset(store), progress=add)


@pytest.mark.parametrize("streams", [1, 3])
def test_a_descent_has_the_same_bits_whichever_worker_dies_and_when(store, tmp_path, streams):
    dataset, descent = streamlr.open_dataset(store), streamlr.Descent(streams=streams, max_epochs=2)
    expected = streamlr.fit(dataset, descent).coef.tobytes()
    rng, victim, died_within = random.Random(streams), 0, 0
    with a_cluster(tmp_path / "cluster", 2, nanny=True) as (_, client):
        for _ in range(3):
            victim = rng.choice(sorted(living(client, 2, but=victim)))
            timer = threading.Timer(rng.uniform(0, 2), os.kill, (victim, signal.SIGKILL))
            timer.start()
            model = streamlr.fit(dataset, descent)
            died_within += timer.finished.is_set()
            timer.join()
            time.sleep(0.5)  # who asks a worker that has just died, before its scheduler knows, waits for half a minute
            assert (model.n_rows, model.history[-1].rows, model.coef.tobytes()) == (N, 2 * N, expected)
    assert died_within, "some must have died within a descent"


def dies(store: Path, processes: list[Any], *words: str) -> None:
    began = time.monotonic()

    def kill(event):
        for process in processes:
            process.kill()

    with pytest.raises(ClusterError) as caught:
        streamlr.fit(streamlr.open_dataset(store), progress=kill)
    assert time.monotonic() - began < ENDS
    assert caught.value.exit_status == 5
    for word in words:
        assert word in str(caught.value)


def test_every_worker_dies(store, tmp_path):
    with a_cluster(tmp_path / "cluster", 2) as (cluster, _):
        dies(store, cluster.processes[1:], "no worker", f"dask worker {cluster.address}")


def test_the_scheduler_dies(store, tmp_path):
    with a_cluster(tmp_path / "cluster", 2) as (cluster, _):
        dies(store, [cluster.scheduler], "scheduler", cluster.address, "went away")


@pytest.mark.parametrize("which", ["scheduler", "worker"])
def test_one_that_hangs(store, tmp_path, which):
    with a_cluster(tmp_path / "cluster", 1) as (cluster, _):
        process = cluster.processes[which == "worker"]
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(ClusterError, match="is there and has not answered for 4 seconds"):
            streamlr.fit(streamlr.open_dataset(store))
        assert time.monotonic() - began < ENDS
        process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("state", ["frozen", "paused"])
def test_one_of_two_that_can_do_nothing_in_the_middle_of_a_pass(store, tmp_path, state):
    """By a signal; or as Dask pauses a worker whose memory is short."""
    slow = da.ones((400, 3), chunks=(10, 3)).map_blocks(slowly, dtype="f8", meta=np.empty((0, 3)))
    with a_cluster(tmp_path / "cluster", 2) as (cluster, client):
        process, stopped = cluster.processes[1], []

        def stop(event):
            if not stopped:
                stopped.append(event.rows)
                if state == "frozen":
                    process.send_signal(signal.SIGSTOP)
                else:
                    client.run(pause_for_ever, workers=list(client.scheduler_info()["workers"])[:1])

        began = time.monotonic()
        says = {"frozen": "given no sign of life for 4 seconds", "paused": "been paused.* for 4 seconds"}[state]
        with pytest.raises(ClusterError, match=rf"worker tcp://\S+ has {says}") as caught:
            streamlr.accumulate(streamlr.Dataset(slow[:, :2], slow[:, 2]), progress=stop)
        assert any(address in str(caught.value) for address in client.scheduler_info()["workers"])
        assert stopped
        assert stopped[0] < 400
        assert time.monotonic() - began < ENDS
        process.send_signal(signal.SIGCONT)


def slowly(block):
    time.sleep(0.5)
    return block


def pause_for_ever(dask_worker):
    dask_worker.periodic_callbacks["memory_monitor"].stop()  # it would find memory enough
    dask_worker.status = distributed.Status.paused


def test_every_worker_dies_of_a_descent_over_dask_arrays(tmp_path):
    with a_cluster(tmp_path / "cluster", 1) as (cluster, _):
        X = da.random.default_rng(0).normal(size=(100_000, 10), chunks=(1_000, 10))

        def kill(event):
            cluster.processes[1].kill()

        with pytest.raises(ClusterError, match="no worker"):
            streamlr.fit(streamlr.Dataset(X, X[:, 0]), streamlr.Descent(max_epochs=3), progress=kill)


def test_a_cluster_that_adapts_begins_with_nobody(store, coef):
    settings = {"n_workers": 0, "threads_per_worker": 1, "dashboard_address": None, "memory_limit": "1GB"}
    with warnings.catch_warnings(action="ignore"), distributed.LocalCluster(**settings) as cluster:
        cluster.adapt(minimum=0, maximum=1)
        with distributed.Client(cluster):
            assert streamlr.fit(streamlr.open_dataset(store)).coef.tobytes() == coef


def test_workers_that_never_come(store, tmp_path):
    with a_cluster(tmp_path / "cluster") as (cluster, _), pytest.raises(ClusterError, match="no worker") as caught:
        streamlr.fit(streamlr.open_dataset(store))
    assert cluster.address in str(caught.value)


def test_a_task_that_kills_its_worker_is_explained(tmp_path):
    def kill(block):
        os.kill(os.getpid(), signal.SIGKILL)

    rows = da.ones((100, 2), chunks=(50, 2)).map_blocks(kill, dtype="f8", meta=np.empty((0, 2)))
    with (
        a_cluster(tmp_path / "cluster", 1, nanny=True),
        pytest.raises(ClusterError, match=r"4 workers died.*tcp://.*memory") as caught,
    ):
        streamlr.fit(streamlr.Dataset(rows, da.ones(100, chunks=50)))
    assert caught.value.exit_status == 5


def test_a_worker_with_too_little_memory_is_named_before_it_dies(store, tmp_path):
    with a_cluster(tmp_path / "cluster", 1, memory="240MB") as (_, client):
        (worker,) = client.scheduler_info()["workers"]
        with pytest.raises(MemoryLimitExceeded, match=r"240\.0 MB of worker") as caught:
            streamlr.fit(streamlr.open_dataset(store))
        assert worker in str(caught.value)


def test_a_worker_that_does_not_see_the_store(store, tmp_path, monkeypatch):
    monkeypatch.chdir(store.parent)
    with a_cluster(tmp_path / "cluster", 1, cwd="/") as (_, client):
        (worker,) = client.scheduler_info()["workers"]
        with pytest.raises(ClusterError, match=r"does not see /proc/self/cwd/rows\.zarr; .*share") as caught:
            streamlr.fit(streamlr.open_dataset("/proc/self/cwd/rows.zarr"))  # each process has a folder of its own there
        assert worker in str(caught.value)


def test_a_worker_that_sees_another_copy(store, tmp_path, monkeypatch):
    """Of the same sizes, in a folder of the same name."""
    copy = shutil.copytree(store, tmp_path / "rows.zarr")
    zarr.open_group(copy, mode="r+")["y"][5] = 17.0
    monkeypatch.chdir(store.parent)
    with a_cluster(tmp_path / "cluster", 1, cwd=tmp_path) as (_, client):
        (worker,) = client.scheduler_info()["workers"]
        with pytest.raises(ClusterError, match=r"sees another copy of /proc/self/cwd/rows\.zarr; .*share") as caught:
            streamlr.fit(streamlr.open_dataset("/proc/self/cwd/rows.zarr"))
        assert worker in str(caught.value)


NARROW_CLIENT = """
import resource, sys
import dask.array as da, distributed, streamlr, streamlr.errors
if __name__ == "__main__":
    dataset = streamlr.Dataset(da.ones((100, 9_000), chunks=(50, 9_000)), da.ones(100, chunks=50))
    with distributed.Client(sys.argv[1]):
        resource.setrlimit(resource.RLIMIT_DATA, (2 * 10**9, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        try:
            streamlr.fit(dataset)
        except streamlr.errors.MemoryLimitExceeded as error:
            print(error)
"""


def test_the_client_must_have_room_for_the_solution(tmp_path):
    """A process of its own, which a limit that the kernel keeps does not hold up for good."""
    with a_cluster(tmp_path / "cluster", 1, memory="0") as (cluster, _):  # workers without a limit
        command = [sys.executable, "-c", NARROW_CLIENT, cluster.address]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert re.search(r"to solve for 9,000 columns.*RLIMIT_DATA, of the client", done.stdout), done.stderr


def with_another_zarr(tmp_path: Path) -> dict[str, str]:
    """The environment of a worker that has another zarr beside it, as an upgrade that reached only some machines would be."""
    other = tmp_path / "packages" / "zarr-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: zarr\nVersion: 9.9.9\n")
    return {**os.environ, "PYTHONPATH": str(other.parent)}


def test_a_worker_with_another_version(store, tmp_path):
    with (
        a_cluster(tmp_path / "cluster", 1, env=with_another_zarr(tmp_path)),
        pytest.raises(ClusterError, match=rf"tcp://.* has zarr 9\.9\.9, and here is {zarr.__version__}.*install"),
    ):
        streamlr.fit(streamlr.open_dataset(store))


@pytest.fixture(scope="module")
def standing(tmp_path_factory):
    """A cluster for several tests, which is Dask's default only in those that ask for it."""
    folder = tmp_path_factory.mktemp("standing")
    with a_cluster(folder, 2) as (cluster, _), distributed.Client(cluster.address, set_as_default=False) as client:
        yield client


def watch_streams() -> None:
    """On a worker: note how many streams are inside together, whenever one comes in."""
    from streamlr.passes import progress, streams

    @contextmanager
    def noted(key):
        with progress.share_of_pass(key) as share:
            streams.most_inside = max(streams.most_inside, sum(state.tasks for state in progress._elsewhere.values()))
            yield share

    streams.most_inside, streams.share_of_pass = 0, noted


def most_streams_inside() -> int:
    """On a worker: stop noting, and tell."""
    from streamlr.passes import progress, streams

    streams.share_of_pass = progress.share_of_pass
    return streams.__dict__.pop("most_inside")


def running_tasks() -> int:
    from streamlr.passes import progress

    return sum(state.tasks for state in progress._elsewhere.values())


class TestOnOneCluster:
    @pytest.fixture
    def cluster(self, standing):
        with standing.as_current():
            yield standing

    def test_numpy_rows_are_sent(self, cluster):
        rng = np.random.default_rng(0)
        x, weights = rng.normal(size=(30_000, 3)), rng.uniform(size=30_000)
        y = np.column_stack([x.sum(axis=1), x[:, 0]])
        dataset = streamlr.Dataset(x, y, weights)
        found = streamlr.fit(dataset).coef.tobytes()
        with dask.config.set(scheduler="threads"):
            assert found == streamlr.fit(dataset).coef.tobytes()

    def test_many_numpy_rows_are_refused(self, cluster):
        with pytest.raises(UsageError, match=r"160\.0 MB.*100\.0 MB.*zarr"):
            streamlr.fit(streamlr.Dataset(np.zeros((10_000_000, 1)), np.zeros(10_000_000)))

    def test_a_store_in_memory_is_refused(self, cluster):
        group = zarr.open_group(MemoryStore(), mode="w")
        group.create_array("X", data=np.ones((10, 1)))
        group.create_array("y", data=np.ones(10))
        with pytest.raises(UsageError, match=r"'X' is in this process's memory.*disk"):
            streamlr.fit(streamlr.open_dataset(group))

    def test_dask_arrays_of_20_gb_are_used_where_they_lie(self, cluster):
        """Each block is made on the worker that needs it; workers have 1 GB."""
        n, p, block = 25_000_000, 100, 50_000

        def rows(block_info=None):
            start = block_info[None]["array-location"][0][0]
            return np.broadcast_to(np.random.default_rng(start).normal(size=(2_500, p)), (20, 2_500, p)).reshape(-1, p)

        X = da.map_blocks(rows, chunks=((block,) * (n // block), (p,)), dtype="f8", meta=np.empty((0, p)))
        assert X.nbytes == 20_000_000_000
        moments = streamlr.accumulate(streamlr.Dataset(X, X[:, 0] * 2))
        assert moments.n == n
        np.testing.assert_allclose(streamlr.solve(moments).coef[:2], [2, 0], atol=1e-9)

    def test_an_error_of_a_row_comes_back_as_it_is(self, cluster, store, tmp_path):
        copy = shutil.copytree(store, tmp_path / "rows.zarr")
        zarr.open_group(copy, mode="r+")["y"][123_456] = np.nan
        with pytest.raises(NonFiniteValue, match="row 123,456, column 'y'"):
            streamlr.fit(streamlr.open_dataset(copy))

    def test_progress_is_heard(self, cluster, store):
        events: list[streamlr.Event] = []
        streamlr.fit(streamlr.open_dataset(store), progress=events.append)
        assert len(events) > 5
        assert (events[-1].task, events[-1].rows) == ("moments", N)
        assert all(a.rows < b.rows for a, b in pairwise(events))

    def test_what_hears_of_it_may_stop_it(self, cluster, store):
        def stop(event):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            streamlr.fit(streamlr.open_dataset(store), progress=stop)
        assert streamlr.fit(streamlr.open_dataset(store)).n_rows == N

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_predictions_that_are_stopped_leave_nothing(self, cluster, store, tmp_path, overwrite):
        """Neither in the folder nor on the workers, whose tasks hear of it."""
        dataset = streamlr.open_dataset(store)
        model = streamlr.fit(dataset)
        if overwrite:
            streamlr.predict(model, dataset, tmp_path / "out.zarr")
        before = sorted(path.name for path in tmp_path.iterdir())

        def stop(event):
            raise KeyboardInterrupt

        for _ in range(5):
            with pytest.raises(KeyboardInterrupt):
                streamlr.predict(model, dataset, tmp_path / "out.zarr", overwrite=overwrite, progress=stop)
            assert not any(cluster.run(running_tasks).values())
        time.sleep(1)
        assert sorted(path.name for path in tmp_path.iterdir()) == before

    def test_verify_tells_of_its_progress(self, cluster, store):
        events: list[streamlr.Event] = []
        assert verify(store, progress=events.append).n_chunks == 29 + 10
        assert len(events) > 5
        assert (events[-1].task, events[-1].rows, events[-1].rows_total) == ("verify", 2 * N, 2 * N)

    def test_many_small_tasks_tell_of_their_rows_rarely(self, cluster, tmp_path, monkeypatch):
        """Telling costs as much as such a task."""
        monkeypatch.setattr(blocks, "SPANS_PER_WORKER", 300)
        monkeypatch.setattr(blocks, "MIN_SPAN_BYTES", 1)
        group = zarr.open_group(tmp_path / "rows.zarr", mode="w")
        group.create_array("X", data=np.arange(6_000.0)[:, None], chunks=(10, 1))
        group.create_array("y", data=np.ones(6_000), chunks=(10,))
        dataset, events = streamlr.open_dataset(tmp_path / "rows.zarr"), []
        assert streamlr.plan(dataset).n_spans == 600
        began = time.monotonic()
        streamlr.fit(dataset, progress=events.append)
        assert events[-1].rows == 6_000
        assert len(events) <= 2 * (12 + 2 * (time.monotonic() - began))  # workers: ten times in half a second, then twice a second

    def test_the_scheduler_keeps_one_topic(self, cluster, store):
        for _ in range(3):
            streamlr.fit(streamlr.open_dataset(store))
        assert len([topic for topic in cluster.get_events() if str(topic).startswith("streamlr")]) == 1

    def test_streams_over_dask_arrays(self, cluster):
        """Made on the workers, and kept there: the same bits as on threads."""
        X = da.random.default_rng(0).normal(size=(20_000, 5), chunks=(1_000, 5))
        y, descent = X.sum(axis=1) + 1, streamlr.Descent(streams=3, max_epochs=2)
        with dask.config.set(scheduler="threads"):
            expected = streamlr.fit(streamlr.Dataset(X, y), descent).coef.tobytes()
        assert streamlr.fit(streamlr.Dataset(X, y), descent).coef.tobytes() == expected
        kept = cluster.persist([X, y])
        assert streamlr.fit(streamlr.Dataset(*kept), descent).coef.tobytes() == expected

    def test_streams_over_dask_arrays_hold_memory_one_at_a_time(self, cluster):
        """Each waits for blocks, for which it makes room: not for another stream."""
        X = da.random.default_rng(0).normal(size=(20_000, 5), chunks=(1_000, 5))
        cluster.run(watch_streams)
        try:
            streamlr.fit(streamlr.Dataset(X, X[:, 0] * 0 + 1), streamlr.Descent(streams=8, max_epochs=1))
        finally:
            found = cluster.run(most_streams_inside).values()
        assert max(found) == 1

    def test_epochs_are_tasks_with_numbers(self, cluster, store):
        with distributed.get_task_stream(cluster) as stream:
            streamlr.fit(streamlr.open_dataset(store), streamlr.Descent(streams=2, max_epochs=2))
        assert {"epoch 1", "epoch 2"} <= {task["key"].split("-")[0] for task in stream.data}

    def test_tasks_are_named_after_what_they_do(self, cluster, store):
        with distributed.get_task_stream(cluster) as stream:
            streamlr.fit(streamlr.open_dataset(store))
        assert {"moments", "merge"} <= {task["key"].split("-")[0] for task in stream.data}

    def test_the_plan_is_of_the_cluster(self, cluster, store):
        plan = streamlr.plan(streamlr.open_dataset(store))
        assert (plan.tasks_at_once, plan.tasks_per_process) == (2, 1)
        assert "800.0 MB" in str(plan)
        assert "of worker tcp://" in str(plan)


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "streamlr.cli", *map(str, arguments)], check=False, capture_output=True, text=True, timeout=120
    )


def deaf_processes(session: int) -> int:
    """How many processes of a session do not hear Ctrl-C."""
    count = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            if os.getsid(int(status.parent.name)) == session:
                text = status.read_text()
                deaf = [int(text.split(f"{name}:")[1].split()[0], 16) for name in ("SigBlk", "SigIgn")]
                count += any(mask >> (signal.SIGINT - 1) & 1 for mask in deaf)
    return count


class TestCommandLine:
    def test_workers_and_schedulers(self, store, tmp_path, coef):
        expected = np.frombuffer(coef).tolist()
        done = run("fit", store, "--workers", 2, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["coef"] == expected
        with a_cluster(tmp_path / "cluster", 1) as (cluster, _):
            done = run("fit", store, "--scheduler", cluster.address, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["coef"] == expected

    @pytest.mark.skipif(sys.platform != "linux", reason="processes are looked at in /proc")
    def test_ctrl_c_ends_all_of_it_without_a_word_of_python(self, store, tmp_path):
        """As a terminal sends it: to the command and to the workers that it started."""
        command = ["fit", str(store), "--workers", "2", "--solver", "minibatch", "--max-epochs", "1000", "--tol", "0"]
        command += ["--checkpoint", str(tmp_path / "kept.json"), "--checkpoint-every", "1000"]
        process = subprocess.Popen(
            [sys.executable, "-m", "streamlr.cli", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "kept.json").exists():  # stopped in the start, it would end with a complaint of Dask's
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert deaf_processes(process.pid) >= 2  # the workers
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
            process.wait()
        assert (process.returncode, out) == (130, "")
        assert err.splitlines()[-1].startswith("error: interrupted")
        assert "Traceback" not in err

    @pytest.mark.parametrize("seconds", [0.6, 1.2, 2.0])
    def test_ctrl_c_while_workers_start(self, store, seconds):
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "streamlr.cli",
                "fit",
                str(store),
                "--workers",
                "2",
                "--solver",
                "minibatch",
                "--max-epochs",
                "1000",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        time.sleep(seconds)  # from its beginning: imports, then a cluster that starts, then a pass
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
        if process.returncode != -signal.SIGINT:  # before a word of ours was read
            assert (process.returncode, out) == (130, "")
            assert [line for line in err.splitlines() if not line.startswith("warning:")] == [
                "error: interrupted; nothing was left half-written"
            ]

    @pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which makes the certificates, is not installed")
    def test_certificates(self, store, tmp_path, coef):
        """A scheduler and a worker that know each other by them; nobody else is let in, and no key is told of."""
        folder = tmp_path / "certificates"
        folder.mkdir()
        for name in ("ours", "theirs"):
            subprocess.run(
                [*OPENSSL, "-subj", "/CN=localhost", "-keyout", f"{name}.key", "-out", f"{name}.pem"],
                check=True,
                capture_output=True,
                cwd=folder,
            )
        ours, key = folder / "ours.pem", folder / "ours.key"
        files = ["--tls-ca-file", ours, "--tls-cert", ours, "--tls-key", key]
        cluster = Cluster(tmp_path, "--protocol", "tls", *files)
        try:
            assert cluster.address.startswith("tls://")
            cluster.add_worker(*map(str, files))
            mine = ["--tls-ca", ours, "--tls-cert", ours, "--tls-key", key]
            done = run("fit", store, "--scheduler", cluster.address, *mine, "--json")
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["coef"] == np.frombuffer(coef).tolist()
            began = time.monotonic()
            stranger = ["--tls-ca", ours, "--tls-cert", folder / "theirs.pem", "--tls-key", folder / "theirs.key"]
            for options in (stranger, []):
                done = run("fit", store, "--scheduler", cluster.address, *options)
                assert (done.returncode, done.stdout) == (5, "")
                assert "check address, port and certificates" in done.stderr
                assert "Traceback" not in done.stderr
            assert time.monotonic() - began < 2 * ENDS
        finally:
            cluster.stop()

    def test_a_scheduler_that_does_not_answer(self, store):
        began = time.monotonic()
        done = run("fit", store, "--scheduler", "tcp://127.0.0.1:1")
        assert time.monotonic() - began < ENDS
        assert (done.returncode, done.stdout) == (5, "")
        assert "no scheduler answers at tcp://127.0.0.1:1" in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--workers", "2", "--threads", "2"], "--threads and --workers are different ways to run"),
            (["--tls-ca", "ca.pem"], "--tls-key are for the scheduler"),
            (["--workers", "0"], "--workers"),
        ],
    )
    def test_options_that_do_not_go_together(self, store, options, words):
        done = run("fit", store, *options)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
