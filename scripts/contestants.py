"""The contestants of bench.py, each a process of its own: `python scripts/contestants.py NAME STORE` prints one JSON object.

A contestant is given the path of a store of make_data.py, imports and opens what it needs, and returns what is timed.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

THREADS = 2
PIECE_BYTES = 2**21  # of rows that are multiplied at once
Timed = Callable[[], Any]  # returns coefficients; or (coefficients, seconds) where only a part of it counts
CONTESTANTS: dict[str, Callable[[Path], Timed]] = {}


def contestant(name: str) -> Callable[[Callable[[Path], Timed]], Callable[[Path], Timed]]:
    """Register a contestant."""

    def register(function: Callable[[Path], Timed]) -> Callable[[Path], Timed]:
        CONTESTANTS[name] = function
        return function

    return register


# streamlr


def opened(path: Path) -> Any:
    import streamlr

    weights = "weights" if "weights" in zarr.open_group(path, mode="r") else None
    return streamlr.open_dataset(path, features="X", target="y", weights=weights)


def some_model(dataset: Any) -> Any:
    """A model of the dataset's columns: what it predicts is of no interest."""
    import streamlr

    p, k = dataset.n_features, dataset.n_targets
    return streamlr.fit(streamlr.Dataset(np.eye(p + 1, p), np.zeros((p + 1, k)), feature_names=dataset.feature_names))


@contestant("streamlr fit")
def exact_fit(path: Path) -> Timed:
    import streamlr

    dataset, fit = opened(path), streamlr.fit
    return lambda: fit(dataset).coef


@contestant("streamlr evaluate")
def evaluate(path: Path) -> Timed:
    import streamlr

    dataset, function = opened(path), streamlr.evaluate
    model = some_model(dataset)
    return lambda: function(model, dataset).mse


@contestant("streamlr predict")
def predict(path: Path) -> Timed:
    import streamlr

    dataset, function = opened(path), streamlr.predict
    model = some_model(dataset)
    folder = tempfile.TemporaryDirectory()  # removed when the process ends
    return lambda: function(model, dataset, Path(folder.name) / "predictions.zarr").rows


def epoch_of(path: Path, mode: str) -> Timed:
    """The second of two epochs: the first also pays for starting the threads."""
    import streamlr

    dataset, solver = opened(path), streamlr.Descent(mode, max_epochs=2)

    def run() -> Any:
        model = streamlr.fit(dataset, solver)
        return model.coef, model.history[1].seconds - model.history[0].seconds

    return run


@contestant("streamlr minibatch epoch")
def minibatch_epoch(path: Path) -> Timed:
    return epoch_of(path, "minibatch")


@contestant("streamlr sgd epoch")
def sgd_epoch(path: Path) -> Timed:
    return epoch_of(path, "sgd")


@contestant("streamlr, to a gap of 1e-3")
def streamlr_to_gap(path: Path) -> Timed:
    import streamlr

    dataset = opened(path)
    best = np.mean(streamlr.fit(dataset).cost.mse)

    def run() -> Any:
        for epochs in range(1, 11):
            began = time.perf_counter()
            model = streamlr.fit(dataset, streamlr.Descent("minibatch", max_epochs=epochs))
            seconds = time.perf_counter() - began
            if np.mean(model.cost.mse) / best - 1 < 1e-3:
                return model.coef, seconds
        return model.coef, float("inf")

    return run


# the limits of the machine


def decoded(path: Path, of: Callable[[int], int]) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray | None]]:
    """Decode the chunks of a store, each into memory that is used again: number, X, y and weights. `of` gives the next number."""
    import numcodecs

    group = zarr.open_group(path, mode="r")
    names = [name for name in ("X", "y", "weights") if name in group]
    arrays = [group[name] for name in names]
    buffers = [np.empty(array.chunks, dtype=array.dtype) for array in arrays]
    compressors = arrays[0].compressors
    kind = type(compressors[0]).__name__ if compressors else "none"
    codec = {"ZstdCodec": numcodecs.Zstd, "BloscCodec": numcodecs.Blosc, "GzipCodec": numcodecs.GZip, "none": lambda: None}[kind]()
    n, chunk = arrays[0].shape[0], arrays[0].chunks[0]
    count = -(-n // chunk)
    while (number := of(count)) < count:
        for name, array, out in zip(names, arrays, buffers, strict=True):
            stored = chunk_bytes(path / name / "c", array, number)
            if codec is None:
                out.reshape(-1).view(np.uint8)[...] = np.frombuffer(stored, dtype=np.uint8)
            else:
                codec.decode(stored, out=out)
        height = min(chunk, n - number * chunk)
        yield number, buffers[0][:height], buffers[1][:height], buffers[2][:height] if len(buffers) > 2 else None


def chunk_bytes(folder: Path, array: zarr.Array[Any], number: int) -> bytes:
    """Read the stored bytes of a chunk, out of its shard where there are shards."""
    tail = ("0",) * (array.ndim - 1)
    if array.shards is None:
        return folder.joinpath(str(number), *tail).read_bytes()
    inner = array.shards[0] // array.chunks[0]
    with open(folder.joinpath(str(number // inner), *tail), "rb") as file:
        file.seek(-(16 * inner + 4), 2)  # the index, and its checksum
        offset, length = np.frombuffer(file.read(16 * inner), dtype="<u8").reshape(-1, 2)[number % inner].tolist()
        file.seek(offset)
        return file.read(length)


def on_threads(work: Callable[[Callable[[int], int]], None]) -> None:
    """Run `work` on as many threads as there are cores, BLAS at one each; they share a counter of chunks."""
    from threadpoolctl import threadpool_limits

    numbers, lock = itertools.count(), threading.Lock()

    def following(_: int) -> int:
        with lock:
            return next(numbers)

    with threadpool_limits(1, user_api="blas"):
        threads = [threading.Thread(target=work, args=(following,)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@contestant("hand-tuned loop")
def hand_tuned(path: Path) -> Timed:
    group = zarr.open_group(path, mode="r")
    p, k = group["X"].shape[1], 1 if group["y"].ndim == 1 else group["y"].shape[1]
    total, lock = np.zeros((p, p + k)), threading.Lock()
    step = max(PIECE_BYTES // (8 * p), 4096)

    def work(following: Callable[[int], int]) -> None:
        own = np.zeros((p, p + k))
        for _, x, y, w in decoded(path, following):
            for a in range(0, len(x), step):
                rows, target = x[a : a + step].astype(np.float64, copy=False), y[a : a + step].reshape(-1, k)
                if w is not None:
                    root = np.sqrt(w[a : a + step])[:, None]
                    rows, target = rows * root, target * root
                own[:, :p] += rows.T @ rows
                own[:, p:] += rows.T @ target
        with lock:
            total[...] += own

    def run() -> Any:
        on_threads(work)
        return np.linalg.solve(total[:, :p], total[:, p:])

    return run


@contestant("read and decode alone")
def decode_alone(path: Path) -> Timed:
    def work(following: Callable[[int], int]) -> None:
        for _ in decoded(path, following):
            pass

    def run() -> Any:
        on_threads(work)
        return 0.0

    return run


@contestant("product alone")
def product_alone(path: Path) -> Timed:
    group = zarr.open_group(path, mode="r")
    (n, p), chunk = group["X"].shape, group["X"].chunks[0]
    step = min(max(PIECE_BYTES // (8 * p), 4096), n)
    rows = np.ascontiguousarray(group["X"][:step], dtype=np.float64)

    def work(following: Callable[[int], int]) -> None:
        while following(0) < -(-n // step):
            rows.T @ rows

    def run() -> Any:
        on_threads(work)
        return float(chunk)

    return run


# the neighbours


@contestant("da.map_blocks, BLAS at 1")
def map_blocks(path: Path) -> Timed:
    import dask.array as da
    from threadpoolctl import threadpool_limits

    def products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        z = np.column_stack([x, y])
        return (z.T @ z)[None]

    def run() -> Any:
        with threadpool_limits(1, user_api="blas"):
            x = da.from_zarr(str(path), component="X").astype(float)
            y = da.from_zarr(str(path), component="y")
            y = (y[:, None] if y.ndim == 1 else y).rechunk((x.chunks[0], -1))
            p, q = x.shape[1], x.shape[1] + y.shape[1]
            sizes = ((1,) * x.numblocks[0], (q,), (q,))
            z = da.map_blocks(products, x, y, dtype=float, new_axis=2, chunks=sizes).sum(axis=0).compute()
            return np.linalg.solve(z[:p, :p], z[:p, p:])

    return run


@contestant("plain NumPy loop epoch")
def numpy_loop(path: Path) -> Timed:
    group = zarr.open_group(path, mode="r")
    (n, p), chunk = group["X"].shape, group["X"].chunks[0]
    taken = range(0, min(n, max(200_000, chunk)), chunk)  # a part of the epoch, whose time is that of any other part

    def run() -> Any:
        b, began, rows = np.zeros(p), time.perf_counter(), 0
        for start in taken:
            X, y = group["X"][start : start + chunk], group["y"][start : start + chunk]
            for x, target in zip(X, y, strict=True):
                b += 2e-3 * (target - x @ b) * x
            rows += len(y)
        return b, (time.perf_counter() - began) * n / rows

    return run


def scikit_learn_epochs(path: Path) -> Iterator[tuple[Any, Any]]:
    """Learn chunk by chunk, as its documentation says: a scaler of the first chunk, then `partial_fit`."""
    from sklearn.linear_model import SGDRegressor
    from sklearn.preprocessing import StandardScaler

    group = zarr.open_group(path, mode="r")
    n, chunk = group["X"].shape[0], group["X"].chunks[0]
    scaler, model = StandardScaler().fit(group["X"][:chunk]), SGDRegressor(penalty=None)
    while True:
        for start in range(0, n, chunk):
            model.partial_fit(scaler.transform(group["X"][start : start + chunk]), group["y"][start : start + chunk])
            yield scaler, model


@contestant("scikit-learn SGD epoch")
def scikit_learn_epoch(path: Path) -> Timed:
    import sklearn.linear_model
    import sklearn.preprocessing  # noqa: F401  # imported before the clock starts

    array = zarr.open_group(path, mode="r")["X"]
    steps = scikit_learn_epochs(path)

    def run() -> Any:
        for _ in range(-(-array.shape[0] // array.chunks[0])):
            _, model = next(steps)
        return model.coef_

    return run


@contestant("scikit-learn, to a gap of 1e-3")
def scikit_learn_to_gap(path: Path) -> Timed:
    import sklearn.linear_model
    import sklearn.preprocessing  # noqa: F401

    import streamlr
    from streamlr.aggregates.cost import cost_of_moments

    moments = streamlr.accumulate(opened(path))
    best, array = streamlr.solve(moments).cost.mse, zarr.open_group(path, mode="r")["X"]

    def run() -> Any:
        spent, steps = 0.0, scikit_learn_epochs(path)
        for _ in range(3 * -(-array.shape[0] // array.chunks[0])):
            began = time.perf_counter()
            scaler, model = next(steps)
            spent += time.perf_counter() - began
            coef = model.coef_ / scaler.scale_
            cost = cost_of_moments(moments, coef[:, None], model.intercept_ - scaler.mean_ @ coef)
            if cost.mse / best - 1 < 1e-3:
                return coef, spent
        return coef, float("inf")

    return run


@contestant("scikit-learn Ridge in memory")
def ridge_in_memory(path: Path) -> Timed:
    from sklearn.linear_model import Ridge

    group = zarr.open_group(path, mode="r")
    return lambda: Ridge(alpha=1e-8).fit(group["X"][:], group["y"][:]).coef_.T


@contestant("oneDAL incremental")
def onedal(path: Path) -> Timed:
    from sklearnex.linear_model import IncrementalLinearRegression

    group = zarr.open_group(path, mode="r")
    n, chunk = group["X"].shape[0], group["X"].chunks[0]

    def run() -> Any:
        model = IncrementalLinearRegression()
        for start in range(0, n, chunk):
            model.partial_fit(group["X"][start : start + chunk], group["y"][start : start + chunk])
        return np.asarray(model.coef_).T

    return run


@contestant("dask-ml newton")
def dask_ml(path: Path) -> Timed:
    import dask.array as da
    from dask_ml.linear_model import LinearRegression

    def run() -> Any:
        x, y = (da.from_zarr(str(path), component=name) for name in "Xy")
        return LinearRegression(solver="newton", fit_intercept=True, C=1e12).fit(x, y).coef_

    return run


def main(name: str, path: str) -> None:
    """Run one contestant and print seconds, peak memory in bytes, and the first of its numbers."""
    timed = CONTESTANTS[name](Path(path))
    began = time.perf_counter()
    found = timed()
    seconds = time.perf_counter() - began
    if isinstance(found, tuple):
        found, seconds = found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "peak": peak, "coef": np.asarray(found, dtype=float).ravel()[:3].tolist()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
