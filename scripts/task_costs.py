"""What a span costs as a task on a cluster of two processes, beside a task that does nothing; prints one JSON object.

A pass has more tasks than spans, since partial results are merged by tasks too: its costs are told by span and by task.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import typer
import zarr

ROWS, FEATURES = 64, 4  # of a chunk, and of the span that is made of it


def nothing(number: int) -> None:
    """Do nothing."""


def main(tasks: Annotated[int, typer.Option(help="tasks of each kind")] = 2_000) -> None:
    """Run that many tasks of each kind, three times in turn, and print the milliseconds of each: the least, and their ratio."""
    import distributed
    from dask.delayed import delayed

    import streamlr
    from streamlr.dataset import blocks

    blocks.SPANS_PER_WORKER, blocks.MIN_SPAN_BYTES = tasks, 1  # a chunk each, where otherwise many chunks make a span
    with tempfile.TemporaryDirectory() as folder:
        group = zarr.open_group(folder, mode="w")
        for name, width in (("X", (FEATURES,)), ("y", ())):
            group.create_array(name, data=np.random.default_rng(0).normal(size=(tasks * ROWS, *width)), chunks=(ROWS, *width))
        dataset = streamlr.open_dataset(folder)
        with (
            distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
            distributed.Client(cluster) as client,
        ):
            plan = streamlr.plan(dataset)
            found: dict[str, list[float]] = {"empty": [], "span": []}
            for _ in range(3):
                found["empty"].append(
                    seconds(lambda: client.gather(client.compute([delayed(nothing)(i) for i in range(plan.n_spans)])))
                )
                found["span"].append(seconds(lambda: streamlr.accumulate(dataset)))
    empty, span = (1000 * min(times) / plan.n_spans for times in found.values())
    task = span * plan.n_spans / plan.n_tasks
    costs = {"empty task, ms": empty, "span, merges included, ms": span, "task, ms": task}
    print(
        json.dumps(
            {"spans": plan.n_spans, "tasks": plan.n_tasks, **costs, "span / empty": span / empty, "task / empty": task / empty}
        )
    )


def seconds(run: Callable[[], Any]) -> float:
    """Return how long something takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    typer.run(main)
