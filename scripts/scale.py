"""Simulate data far beyond this machine: `python scripts/scale.py` prints one JSON object of what was measured and what follows.

No row is read from anywhere: columns are made where a task asks for them. What is measured is what a cluster adds to arithmetic:
planning, scheduling, arguments and merges. Reading is not; what follows for a cluster says which rates it assumes.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

WIDTHS = (100, 1_000, 4_096)
CHUNKS, CHUNK_ROWS = 1_000_000, 1_000_000  # 1e12 rows
DATA_BYTES, WORKERS, CORES = 100 * 10**12, 100, 16  # what follows is for these
LINK_BYTES = 10**9  # a second into each of their machines, at which they read and merge: assumed, not measured


@dataclass(frozen=True)
class MadeRows:
    """Rows that are made when they are read: cell (i, j) is a cheap function of i and j."""

    label: str
    n_rows: int
    n_columns: int
    chunk_rows: int

    dtype = np.dtype(np.float64)
    reader_bytes = 0

    @property
    def decoded_rows(self) -> int:
        """Those of a chunk."""
        return self.chunk_rows

    @property
    def row_bytes(self) -> int:
        """Those of its cells."""
        return 8 * self.n_columns

    def reader(self) -> MadeReader:
        """Return what makes them."""
        return MadeReader(self.n_columns)

    def fingerprint(self, *, complete: bool = False) -> str:
        """Return what they depend on."""
        return f"{self.label} {self.n_rows} {self.n_columns}"


class MadeReader:
    """Makes rows."""

    chunks_missing = 0

    def __init__(self, n_columns: int) -> None:
        self.factors = np.arange(1, n_columns + 1) * 0.6180339887498949

    def expect(self, spans: Any) -> None:
        """Do nothing: there is nothing to fetch."""

    def forget(self) -> None:
        """Do nothing: nothing is held."""

    def read_into(self, out: NDArray[np.float64], start: int) -> None:
        """Make the rows from `start` on."""
        np.multiply.outer(np.arange(start, start + len(out)) % 1_000_003, self.factors, out=out)
        np.mod(out, 1.0, out=out)

    def view(self, start: int, stop: int) -> None:
        """Return None: rows lie nowhere."""


def made(rows: int, width: int, chunk_rows: int) -> Any:
    """Return a dataset of so many rows and columns."""
    import streamlr

    names = [f"x{number}" for number in range(width)]
    features, target = MadeRows("X", rows, width, chunk_rows), MadeRows("y", rows, 1, chunk_rows)
    return streamlr.Dataset.of_rows([features], [target], None, names, ["y"])


def planned(width: int) -> dict[str, Any]:
    """Plan a pass over 1e6 chunks of 1e6 rows, and say what its merges move at most: every partial result, once."""
    from streamlr.aggregates.moments import MomentsOf
    from streamlr.passes.planning import draft_pass

    dataset = made(CHUNKS * CHUNK_ROWS, width, CHUNK_ROWS)
    statistic = MomentsOf(dataset.feature_names, dataset.target_names)
    began = time.perf_counter()
    plan, cut = draft_pass(dataset, statistic, task="moments", memory=2**60)
    seconds = time.perf_counter() - began
    return {
        "rows": plan.n_rows,
        "chunks": CHUNKS,
        "logical bytes": plan.bytes_read,
        "planning, s": seconds,
        "spans": plan.n_spans,
        "tasks": plan.n_tasks,
        "bytes of a span as an argument": len(pickle.dumps(cut[-1])),
        "bytes of a result": statistic.nbytes,
        "merge traffic, bytes": (plan.n_tasks - 1) * statistic.nbytes,
    }


def product_rate(width: int) -> float:
    """Return the bytes of rows a second that one core makes the scatter of, a tile at a time."""
    from threadpoolctl import threadpool_limits

    from streamlr.dataset.blocks import tile_rows

    tile = np.random.default_rng(0).normal(size=(min(tile_rows(width + 1), 4_096), width + 1))
    with threadpool_limits(1):
        times = []
        for _ in range(3):
            began = time.perf_counter()
            tile.T @ tile
            times.append(time.perf_counter() - began)
    return tile.nbytes / min(times)


@contextmanager
def a_cluster(folder: Path) -> Iterator[Any]:
    """Start a scheduler and two workers of one thread, each a process of its own, and yield a client."""
    import distributed

    place, dask = folder / "scheduler.json", [sys.executable, "-m", "dask"]
    own = ["--scheduler-file", str(place), "--no-dashboard"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    started = [subprocess.Popen([*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", *own], **quiet)]
    try:
        while not (place.exists() and place.read_text().rstrip().endswith("}")):
            time.sleep(0.1)
        started += [subprocess.Popen([*dask, "worker", *own, "--nthreads", "1", "--no-nanny"], **quiet) for _ in range(2)]
        with distributed.Client(scheduler_file=str(place)) as client:
            client.wait_for_workers(2)
            yield client
    finally:
        for process in started:
            process.terminate()
            process.wait()


def scheduled(spans: int) -> dict[str, Any]:
    """Run a pass of so many spans, and as many tasks that do nothing, under a scheduler that counts its own seconds."""
    from cloudpickle import dumps
    from dask.delayed import delayed

    import streamlr
    from streamlr.aggregates.moments import MomentsOf
    from streamlr.aggregates.tree import Tree
    from streamlr.dataset import blocks
    from streamlr.passes.reduce import read_span
    from streamlr.passes.tasks import span_tasks

    blocks.SPANS_PER_WORKER, blocks.MIN_SPAN_BYTES, blocks.MAX_SPANS = spans, 1, spans  # a chunk each, and not many
    dataset = made(64 * spans, 4, 64)
    with tempfile.TemporaryDirectory() as folder, a_cluster(Path(folder)) as client:
        plan = streamlr.plan(dataset)
        streamlr.accumulate(made(6_400, 4, 64))  # workers have imported what they need
        empty, _ = timed(client, lambda: client.gather(client.compute([delayed(nothing)(i) for i in range(spans)])))
        seconds, moments = timed(client, lambda: streamlr.accumulate(dataset))
        statistic = MomentsOf(dataset.feature_names, dataset.target_names)
        cut = [blocks.Span(64 * i, 64 * i + 64) for i in range(spans)]
        tree = Tree(dataset.stored_rows, plan.tile_rows)
        parts = span_tasks(dataset, cut, "moments", "key", read_span, tree, statistic, False)
        graph = {key: task for part in parts for key, task in part.dask.items()}
    assert moments.n == dataset.n_rows
    return {
        "spans": plan.n_spans,
        "tasks": plan.n_tasks,
        "bytes of a span's task": len(dumps(graph)) / spans,
        "pass, s": seconds["wall"],
        "pass, ms per task": 1000 * seconds["wall"] / plan.n_tasks,
        "scheduler, ms of processor per task": 1000 * seconds["scheduler"] / plan.n_tasks,
        "empty tasks, ms each": 1000 * empty["wall"] / spans,
        "scheduler, ms of processor per empty task": 1000 * empty["scheduler"] / spans,
    }


def timed(client: Any, call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Return the seconds that a call took, by the clock and of the scheduler's processor, and what it returned."""
    began, busy = time.perf_counter(), client.run_on_scheduler(time.process_time)
    result = call()
    wall = time.perf_counter() - began
    return {"wall": wall, "scheduler": client.run_on_scheduler(time.process_time) - busy}, result


def nothing(number: int) -> None:
    """Do nothing."""


def main(spans: Annotated[int, typer.Option(help="spans that are really scheduled")] = 10_000) -> None:
    """Plan for 1e12 rows, schedule so many spans, and tell what follows for 100 TB on 100 workers."""
    on_cluster = scheduled(spans)
    plans, follows = {}, {}
    for width in WIDTHS:
        plans[f"p = {width}"] = plan = planned(width)
        rate = product_rate(width)
        arithmetic, reading = DATA_BYTES / (rate * WORKERS * CORES), DATA_BYTES / (WORKERS * LINK_BYTES)
        merging = plan["merge traffic, bytes"] / (WORKERS * LINK_BYTES)
        scheduling = plan["tasks"] * on_cluster["scheduler, ms of processor per task"] / 1000
        follows[f"p = {width}"] = {
            "product, measured, GB/s of rows per core": rate / 1e9,
            "product, s": arithmetic,
            "reading, s": reading,
            "merging, s": merging,
            "scheduling, s of one processor": scheduling,
            "merging and scheduling, share": (merging + scheduling) / (max(arithmetic, reading) + merging + scheduling),
        }
    assumed = {"bytes": DATA_BYTES, "workers": WORKERS, "cores of each": CORES, "bytes a second into each": LINK_BYTES}
    print(
        json.dumps({"planned": plans, "scheduled": on_cluster, "100 TB on 100 workers": {"assumed": assumed, **follows}}, indent=1)
    )


if __name__ == "__main__":
    typer.run(main)
