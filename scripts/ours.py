"""The contestants of bench.py that are streamlr's: each opens what it is given, and returns what is timed."""

from __future__ import annotations

import csv
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr


class Result(NamedTuple):
    """What a contestant found, where coefficients are not all of it."""

    numbers: Any
    seconds: float | None = None  # where only a part of the time counts
    descended: Callable[[], tuple[Any, Any]] | None = (
        None  # to coefficients and intercept, whose cost is compared with the optimum's
    )


Timed = Callable[[], Any]  # returns coefficients, or a `Result`


def opened(path: Path) -> Any:
    import streamlr

    weights = "weights" if "weights" in zarr.open_group(path, mode="r") else None
    return streamlr.open_dataset(path, features="X", target="y", weights=weights)


def gap_above_optimum(path: Path, coef: Any, intercept: Any) -> float:
    """How much larger than the optimum's the cost of some coefficients is, relatively."""
    import streamlr
    from streamlr.aggregates.cost import cost_of_moments

    moments = streamlr.accumulate(opened(path))
    k = moments.n_targets
    cost = cost_of_moments(moments, np.reshape(coef, (-1, k)), np.reshape(intercept, k))
    return float(np.mean(cost.mse) / np.mean(streamlr.solve(moments).cost.mse) - 1)


def some_model(dataset: Any) -> Any:
    """A model of the dataset's columns: its predictions are numbers like any other, as hard to compress."""
    import streamlr

    p, k = dataset.n_features, dataset.n_targets
    y = np.random.default_rng(0).normal(size=(p + 1, k))
    return streamlr.fit(streamlr.Dataset(np.eye(p + 1, p), y, feature_names=dataset.feature_names))


def exact_fit(path: Path) -> Timed:
    import streamlr

    dataset, fit = opened(path), streamlr.fit
    return lambda: fit(dataset).coef


def fit_on_workers(path: Path) -> Timed:
    """The exact fit on a cluster of two processes of one thread each, after start-up."""
    import distributed

    import streamlr

    dataset, fit = opened(path), streamlr.fit
    client = distributed.Client(
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=40)
    )
    with tempfile.TemporaryDirectory() as folder:  # a store of several spans, so that both have imported what they need
        group = zarr.open_group(folder, mode="w")
        group.create_array("X", data=np.random.default_rng(0).normal(size=(100_000, 100)), chunks=(5_000, 100))
        group.create_array("y", data=np.ones(100_000), chunks=(100_000,))
        fit(streamlr.open_dataset(folder))

    def run() -> Any:
        with client.as_current():
            return fit(dataset).coef

    return run


def evaluate(path: Path) -> Timed:
    import streamlr

    dataset, function = opened(path), streamlr.evaluate
    model = some_model(dataset)
    return lambda: function(model, dataset).mse


def predict(path: Path) -> Timed:
    import streamlr

    dataset, function = opened(path), streamlr.predict
    model = some_model(dataset)
    folder = tempfile.TemporaryDirectory()  # removed when the process ends
    return lambda: function(model, dataset, Path(folder.name) / "predictions.zarr").rows


def minibatch_epoch(path: Path) -> Timed:
    return epoch_of(path, "minibatch")


def minibatch_epoch_in_streams(path: Path) -> Timed:
    return epoch_of(path, "minibatch", streams=2)


def sgd_epoch(path: Path) -> Timed:
    return epoch_of(path, "sgd")


def epoch_of(path: Path, mode: str, streams: int = 1) -> Timed:
    """The second of two epochs, since the first also starts the threads; the gap is that of a descent of one epoch."""
    import streamlr

    dataset = opened(path)

    def descended() -> tuple[Any, Any]:
        model = streamlr.fit(dataset, streamlr.Descent(mode, max_epochs=1, streams=streams))
        return model.coef_matrix, model.intercept_vector

    def run() -> Result:
        model = streamlr.fit(dataset, streamlr.Descent(mode, max_epochs=2, streams=streams))
        return Result(model.coef, model.history[1].seconds - model.history[0].seconds, descended)

    return run


def to_gap(path: Path) -> Timed:
    import streamlr

    dataset = opened(path)
    best = np.mean(streamlr.fit(dataset).cost.mse)

    def run() -> Result:
        for epochs in range(1, 11):
            began = time.perf_counter()
            model = streamlr.fit(dataset, streamlr.Descent("minibatch", max_epochs=epochs))
            seconds = time.perf_counter() - began
            if np.mean(model.cost.mse) / best - 1 < 1e-3:
                return Result(model.coef, seconds)
        return Result(model.coef, math.inf)

    return run


def ingest(path: Path) -> Timed:
    """Code every column of a table of make_tables.py; where there is text, by a formula."""
    import formulaic  # noqa: F401  # imported before the clock starts
    import pyarrow.csv  # noqa: F401

    from streamlr.dataset.ingest import ingest as function

    with path.open(newline="") as file:
        columns = next(csv.reader(file))
    terms = [f"C({name})" if name.startswith("c") else name for name in columns if name != "y"]
    coded = any(name.startswith("c") for name in columns)
    wanted = {"formula": f"y ~ {' + '.join(terms)}"} if coded else {"target": "y"}
    folder = tempfile.TemporaryDirectory()  # removed when the process ends
    return lambda: function(path, Path(folder.name) / "rows.zarr", **wanted).n_rows
