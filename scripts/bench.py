"""Compare fits and descents with the ways people write them by hand, in one run: `python scripts/bench.py`.

Every contestant is a process of its own on the same store, and they take turns, so that a machine whose speed drifts is fair to
all. Printed are medians of seconds inside the process (imports excluded), their ratio to streamlr's exact fit, and peak memory.
An epoch is the second of two. "To a gap of 1e-3" is from opening the store to coefficients whose cost is within 1e-3 of the
optimum's, relatively.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

PRELUDE = """
import json, resource, sys, time
import numpy as np
path, began = sys.argv[1], None
def begin():
    global began
    began = time.perf_counter()
def end(coef, seconds=None):
    seconds = time.perf_counter() - began if seconds is None else seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "peak": peak, "coef": np.asarray(coef).ravel()[:3].tolist()}))
"""
CONTESTANTS = {
    "streamlr fit": """
import streamlr
dataset = streamlr.open_dataset(path)
streamlr.fit
begin()
end(streamlr.fit(dataset).coef)
""",
    "streamlr evaluate": """
import streamlr
dataset = streamlr.open_dataset(path)
coef = np.zeros(dataset.n_features)
model = streamlr.fit(streamlr.Dataset(np.eye(dataset.n_features), coef, feature_names=dataset.feature_names))
begin()
streamlr.evaluate(model, dataset)
end(coef)
""",
    "streamlr minibatch epoch": """
import streamlr
dataset = streamlr.open_dataset(path)
model = streamlr.fit(dataset, streamlr.Descent("minibatch", max_epochs=2))
end(model.coef, model.history[1].seconds - model.history[0].seconds)
""",
    "streamlr sgd epoch": """
import streamlr
dataset = streamlr.open_dataset(path)
model = streamlr.fit(dataset, streamlr.Descent("sgd", max_epochs=2))
end(model.coef, model.history[1].seconds - model.history[0].seconds)
""",
    "plain NumPy loop epoch": """
import zarr
group = zarr.open_group(path, mode="r")
n, chunk = group["X"].shape[0], group["X"].chunks[0]
b, rows = np.zeros(group["X"].shape[1]), 0
begin()
for start in range(0, min(n, 4 * chunk), chunk):  # a part of the epoch, whose time is that of any other part
    X, y = group["X"][start : start + chunk], group["y"][start : start + chunk]
    for x, target in zip(X, y):
        b += 0.002 * (target - x @ b) * x
    rows += len(y)
end(b, (time.perf_counter() - began) * n / rows)
""",
    "scikit-learn SGD epoch": """
import zarr
from sklearn.linear_model import SGDRegressor
from sklearn.preprocessing import StandardScaler
group = zarr.open_group(path, mode="r")
n, chunk = group["X"].shape[0], group["X"].chunks[0]
scaler, model = StandardScaler().fit(group["X"][:chunk]), SGDRegressor(penalty=None)
begin()
for start in range(0, n, chunk):
    model.partial_fit(scaler.transform(group["X"][start : start + chunk]), group["y"][start : start + chunk])
end(model.coef_)
""",
    "streamlr, to a gap of 1e-3": """
import streamlr
dataset = streamlr.open_dataset(path)
best = streamlr.fit(dataset).cost.mse
for epochs in range(1, 11):
    begin()
    model = streamlr.fit(dataset, streamlr.Descent("minibatch", max_epochs=epochs))
    if model.cost.mse / best - 1 < 1e-3:
        end(model.coef)
        break
""",
    "scikit-learn, to a gap of 1e-3": """
import streamlr, zarr
from sklearn.linear_model import SGDRegressor
from sklearn.preprocessing import StandardScaler
from streamlr.aggregates.cost import cost_of_moments
moments = streamlr.accumulate(streamlr.open_dataset(path))
best = streamlr.solve(moments).cost.mse
group = zarr.open_group(path, mode="r")
n, chunk = group["X"].shape[0], group["X"].chunks[0]
begin()
scaler, model = StandardScaler().fit(group["X"][:chunk]), SGDRegressor(penalty=None)
spent, gap = time.perf_counter() - began, 1.0
for start in [*range(0, n, chunk)] * 3:
    begin()
    model.partial_fit(scaler.transform(group["X"][start : start + chunk]), group["y"][start : start + chunk])
    spent += time.perf_counter() - began
    coef = model.coef_ / scaler.scale_
    gap = cost_of_moments(moments, coef[:, None], model.intercept_ - scaler.mean_ @ coef).mse / best - 1
    if gap < 1e-3:
        break
end(model.coef_, spent if gap < 1e-3 else float("inf"))
""",
    "da.map_blocks, BLAS at 1": """
import dask, dask.array as da
from threadpoolctl import threadpool_limits
def products(x, y):
    z = np.column_stack([x, y])
    return (z.T @ z)[None]
with threadpool_limits(1, user_api="blas"):
    begin()
    x = da.from_zarr(path, component="X")
    y = da.from_zarr(path, component="y")[:, None].rechunk((x.chunks[0], -1))
    q = x.shape[1] + 1
    sizes = ((1,) * x.numblocks[0], (q,), (q,))
    blocks = da.map_blocks(products, x, y, dtype=float, new_axis=2, chunks=sizes)
    z = blocks.sum(axis=0).compute()
    end(np.linalg.solve(z[:-1, :-1], z[:-1, -1]))
""",
    "hand-tuned loop": """
import itertools, threading
import numcodecs, zarr
from threadpoolctl import threadpool_limits
x, y = (zarr.open_group(path, mode="r")[name] for name in "Xy")
(n, p), chunk, codec = x.shape, x.chunks[0], numcodecs.Zstd()
numbers, lock, total = iter(range(-(-n // chunk))), threading.Lock(), np.zeros((p, p + 1))
def work():
    rows, target, own = np.empty((chunk, p)), np.empty(chunk), np.zeros((p, p + 1))
    while True:
        with lock:
            number = next(numbers, None)
        if number is None:
            break
        for name, out in ((f"X/c/{number}/0", rows), (f"y/c/{number}", target)):
            with open(f"{path}/{name}", "rb") as file:
                codec.decode(file.read(), out=out)
        height = min(chunk, n - number * chunk)
        for a in range(0, height, 4096):
            piece = rows[a : min(a + 4096, height)]
            own[:, :p] += piece.T @ piece
            own[:, p] += piece.T @ target[a : a + len(piece)]
    with lock:
        total[...] += own
with threadpool_limits(1, user_api="blas"):
    begin()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    end(np.linalg.solve(total[:, :p], total[:, p]))
""",
}
REFERENCE = "streamlr fit"


def bench(
    store: Annotated[Path | None, typer.Option(help="A store of make_data.py with zstd; made and removed when absent.")] = None,
    rows: Annotated[int, typer.Option(help="n, of the store that is made")] = 4_000_000,
    features: Annotated[int, typer.Option(help="p, of the store that is made")] = 100,
    repeats: Annotated[int, typer.Option(help="runs of each contestant")] = 5,
    out: Annotated[Path | None, typer.Option(help="write the figures to this JSON file")] = None,
) -> None:
    """Run every contestant `repeats` times in turn, and print the medians."""
    with tempfile.TemporaryDirectory() as folder:
        if store is None:
            store = Path(folder) / "data.zarr"
            maker = Path(__file__).with_name("make_data.py")
            subprocess.run([sys.executable, maker, store, "--rows", str(rows), "--features", str(features)], check=True)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
        for _ in range(repeats):
            for name, code in CONTESTANTS.items():
                command = [sys.executable, "-c", PRELUDE + code, str(store)]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs[name].append(json.loads(printed))
    seconds = {name: statistics.median(run["seconds"] for run in found) for name, found in runs.items()}
    peaks = {name: max(run["peak"] for run in found) for name, found in runs.items()}
    print(f"{platform.machine()}, Python {platform.python_version()}, {repeats} runs each, medians")
    print(f"{'':32}{'seconds':>10}{'ratio':>10}{'peak MB':>10}")
    for name in CONTESTANTS:
        print(f"{name:32}{seconds[name]:>10.2f}{seconds[name] / seconds[REFERENCE]:>10.2f}{peaks[name] / 1e6:>10.0f}")
    if out is not None:
        out.write_text(json.dumps({"seconds": seconds, "peak_bytes": peaks, "runs": runs}, indent=2))


if __name__ == "__main__":
    typer.run(bench)
