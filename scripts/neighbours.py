"""The contestants of bench.py that others wrote, used as their documentation says."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from ours import Result, Timed, opened


def map_blocks(path: Path) -> Timed:
    import dask.array as da
    from threadpoolctl import threadpool_limits

    def products(x: np.ndarray, y: np.ndarray, w: np.ndarray | None = None) -> np.ndarray:
        z = np.column_stack([x, y])
        if w is not None:
            z *= np.sqrt(w)
        return (z.T @ z)[None]

    weighted = "weights" in zarr.open_group(path, mode="r")

    def run() -> Any:
        with threadpool_limits(1, user_api="blas"):
            x = da.from_zarr(str(path), component="X").astype(float)
            y = da.from_zarr(str(path), component="y")
            y = (y[:, None] if y.ndim == 1 else y).rechunk((x.chunks[0], -1))
            p, q = x.shape[1], x.shape[1] + y.shape[1]
            sizes = ((1,) * x.numblocks[0], (q,), (q,))
            w = [da.from_zarr(str(path), component="weights")[:, None].rechunk((x.chunks[0], -1))] if weighted else []
            z = da.map_blocks(products, x, y, *w, dtype=float, new_axis=2, chunks=sizes).sum(axis=0).compute()
            return np.linalg.solve(z[:p, :p], z[:p, p:])

    return run


def numpy_loop(path: Path) -> Timed:
    """Go down the gradient row by row, in Python; a part of an epoch, whose time is that of any other part."""
    group = zarr.open_group(path, mode="r")
    (n, p), chunk = group["X"].shape, group["X"].chunks[0]
    taken = range(0, min(n, max(200_000, chunk)), chunk)

    def run() -> Result:
        b, began, rows = np.zeros(p), time.perf_counter(), 0
        for start in taken:
            X, y = group["X"][start : start + chunk], group["y"][start : start + chunk]
            for x, target in zip(X, y, strict=True):
                b += 2e-3 * (target - x @ b) * x
            rows += len(y)
        return Result(b, (time.perf_counter() - began) * n / rows)

    return run


def scikit_learn_steps(path: Path) -> Iterator[tuple[Any, Any]]:
    """Learn chunk by chunk, epoch after epoch: a scaler of the first chunk, then `partial_fit`; yields coefficients, intercept."""
    from sklearn.linear_model import SGDRegressor
    from sklearn.preprocessing import StandardScaler

    group = zarr.open_group(path, mode="r")
    n, chunk, weights = group["X"].shape[0], group["X"].chunks[0], group.get("weights")
    scaler, model = StandardScaler().fit(group["X"][:chunk]), SGDRegressor(penalty=None)
    while True:
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            w = None if weights is None else weights[rows]
            model.partial_fit(scaler.transform(group["X"][rows]), group["y"][rows], sample_weight=w)
            coef = model.coef_ / scaler.scale_
            yield coef, model.intercept_ - scaler.mean_ @ coef


def scikit_learn_epoch(path: Path) -> Timed:
    import sklearn.linear_model
    import sklearn.preprocessing  # noqa: F401  # imported before the clock starts

    array, steps = zarr.open_group(path, mode="r")["X"], scikit_learn_steps(path)

    def run() -> Result:
        for _ in range(-(-array.shape[0] // array.chunks[0])):
            coef, intercept = next(steps)
        return Result(coef, descended=lambda: (coef, intercept))

    return run


def scikit_learn_to_gap(path: Path) -> Timed:
    import sklearn.linear_model
    import sklearn.preprocessing  # noqa: F401

    import streamlr
    from streamlr.aggregates.cost import cost_of_moments

    moments = streamlr.accumulate(opened(path))
    best, array = streamlr.solve(moments).cost.mse, zarr.open_group(path, mode="r")["X"]

    def run() -> Result:
        spent, steps = 0.0, scikit_learn_steps(path)
        for _ in range(3 * -(-array.shape[0] // array.chunks[0])):
            began = time.perf_counter()
            coef, intercept = next(steps)
            spent += time.perf_counter() - began
            if cost_of_moments(moments, coef[:, None], intercept).mse / best - 1 < 1e-3:
                return Result(coef, spent)
        return Result(coef, math.inf)

    return run


def ridge_in_memory(path: Path) -> Timed:
    from sklearn.linear_model import Ridge

    group = zarr.open_group(path, mode="r")
    return lambda: Ridge(alpha=1e-8).fit(group["X"][:], group["y"][:]).coef_.T


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


def dask_ml(path: Path) -> Timed:
    import dask.array as da
    from dask_ml.linear_model import LinearRegression

    def run() -> Any:
        x, y = (da.from_zarr(str(path), component=name) for name in "Xy")
        return LinearRegression(solver="newton", fit_intercept=True, C=1e12).fit(x, y).coef_

    return run
