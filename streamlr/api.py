"""The public functions: a few lines each, joining the floors."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import Any

from streamlr.aggregates.cost import Cost, ResidualsOf
from streamlr.aggregates.moments import Moments, MomentsOf
from streamlr.dataset.blocks import Block, Plan
from streamlr.dataset.dataset import Dataset, check_dataset, check_target
from streamlr.dataset.tally import Tally, warn_rounded
from streamlr.descent.options import Descent
from streamlr.direct.normal import check_penalty, describe_aliases, solve_bytes, solve_normal
from streamlr.direct.routes import Direct
from streamlr.errors import PrecisionWarning, RankWarning, UsageError
from streamlr.model import FittedModel
from streamlr.passes.memory import one_blas_thread
from streamlr.passes.planning import plan_pass
from streamlr.passes.progress import Callback, shown
from streamlr.passes.reduce import Reduced, reduce
from streamlr.passes.write import write
from streamlr.solvers import Solver, solver_named
from streamlr.training import Training

FEW_DIGITS = 4  # of a coefficient, below which a caller should hear of it
Progress = bool | Callback


def fit(
    dataset: Dataset,
    solver: Solver = "auto",
    *,
    fit_intercept: bool = True,
    ridge: float = 0.0,
    memory_limit: int | str | None = None,
    progress: Progress = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> FittedModel:
    r"""Fit a linear model to all rows: exactly, in one pass over them, or by gradient descent.

    .. math:: \min_{b_0, b} \frac1W \sum w_i (y_i - b_0 - x_i'b)^2 + \lambda |b|^2

    Parameters
    ----------
    dataset : Dataset
        Rows with a target.
    solver : "auto", "normal" or Direct; "gd", "minibatch", "sgd" or Descent
        "normal" and `Direct("normal")` solve the normal equations; "auto" chooses that. The others go down the gradient of the
        cost, by all rows, by batches or by single rows.
    fit_intercept : bool
        Fit b0, which is never penalised.
    ridge : float
        lambda, on the columns as given: scikit-learn's alpha divided by the sum of weights.
    memory_limit : int, str or None
        Bytes, or a text such as "2GB"; None for four fifths of what this process may use.
    progress : bool or callable
        Show a bar on standard error, or call this with an `Event` at every tile.
    checkpoint : path or None
        Of a descent: a file that keeps its state. Where it exists, the descent goes on from there, to the same bits as if it had
        never stopped.

    Returns
    -------
    FittedModel

    Raises
    ------
    UsageError
        An option is not one of those allowed, there is no target, or the checkpoint is of other data or options.
    MemoryLimitExceeded
        The plan does not fit; no row was read.
    DataError
        A row, a chunk or a count is not as promised.
    NumericalError
        The rank is short and `Direct(rank="error")` was asked for, or a coefficient leaves the range of float64.
    Diverged
        A descent went up; the error has the best coefficients before that.

    Warns
    -----
    RankWarning
        Columns depend on others.
    PrecisionWarning
        A column holds integers beyond 2**53, which float64 rounds; or columns are so nearly dependent that few digits are right.

    Examples
    --------
    >>> import streamlr
    >>> model = streamlr.fit(streamlr.Dataset([[0.0], [1.0], [2.0]], [1.0, 3.0, 5.0]))
    >>> model.coef, model.intercept, model.rank
    (array([2.]), 1.0, 1)

    References
    ----------
    Chan, Golub and LeVeque (1983) for the moments, van der Sluis (1969) for the scaling of the equations.
    """
    chosen, ridge = solver_named(solver), check_penalty(ridge)
    check_target(dataset)
    if isinstance(chosen, Descent):
        with shown(progress) as callback:
            return Training(dataset, chosen, bool(fit_intercept), ridge, memory_limit, callback).run(checkpoint)
    if checkpoint is not None:
        raise UsageError("checkpoint keeps the state of a descent, and an exact fit has none: leave it out, or choose 'minibatch'")
    reduced = _moments(dataset, chosen.precision, memory_limit, progress)
    warn_rounded(reduced.tally, stacklevel=2)
    model = _solved(reduced.value, chosen, bool(fit_intercept), ridge)
    return replace(
        model,
        dropped_by_column=reduced.tally.dropped_by_column,
        chunks_missing=reduced.tally.chunks_missing,
        fingerprint=dataset.fingerprint,
        coding=dataset.coding,
    )


def accumulate(
    dataset: Dataset, *, precision: str = "double", memory_limit: int | str | None = None, progress: Progress = False
) -> Moments:
    """Return the moments of all rows: what an exact fit needs, and all that it needs.

    Moments of different rows with the same columns add up: `solve(m1 + m2)` fits both.

    Parameters
    ----------
    dataset : Dataset
        Rows with a target.
    precision : "double" or "single"
        As for `Direct`.
    memory_limit, progress
        As for `fit`.

    Raises
    ------
    UsageError, MemoryLimitExceeded, DataError
        As for `fit`.

    Examples
    --------
    >>> import streamlr
    >>> first = streamlr.accumulate(streamlr.Dataset([[0.0], [1.0]], [1.0, 3.0]))
    >>> second = streamlr.accumulate(streamlr.Dataset([[2.0], [3.0]], [5.0, 7.0]))
    >>> streamlr.solve(first + second).coef
    array([2.])
    """
    check_target(dataset)
    reduced = _moments(dataset, Direct(precision=precision).precision, memory_limit, progress)
    warn_rounded(reduced.tally, stacklevel=2)
    return reduced.value


def solve(moments: Moments, solver: Solver = "auto", *, fit_intercept: bool = True, ridge: float = 0.0) -> FittedModel:
    """Fit a linear model to the rows that moments were made of, reading none.

    Parameters
    ----------
    moments : Moments
        From `accumulate`.
    solver, fit_intercept, ridge
        As for `fit`.

    Raises
    ------
    UsageError, NoRows, NumericalError
        As for `fit`.

    Examples
    --------
    >>> import streamlr
    >>> m = streamlr.accumulate(streamlr.Dataset([[0.0], [1.0], [2.0]], [1.0, 3.0, 5.0]))
    >>> streamlr.solve(m, ridge=1.0).coef.round(3)
    array([0.8])
    """
    if not isinstance(moments, Moments):
        raise UsageError(f"the moments are a {type(moments).__name__}; give what `accumulate` returns")
    chosen = solver_named(solver)
    if isinstance(chosen, Descent):
        raise UsageError("solve() is for direct solvers, which need nothing but moments; descend with fit(dataset, solver)")
    if (chosen.precision, moments.precision) == ("single", "double"):
        raise UsageError("precision is 'single', and the moments are there in double: give it to `accumulate`, or to `fit`")
    return _solved(moments, chosen, bool(fit_intercept), check_penalty(ridge))


def evaluate(model: FittedModel, dataset: Dataset, *, memory_limit: int | str | None = None, progress: Progress = False) -> Cost:
    """Return the cost of a model on any rows, in one pass.

    Parameters
    ----------
    model : FittedModel
        The model.
    dataset : Dataset
        Rows with the model's features and a target.
    memory_limit, progress
        As for `fit`.

    Raises
    ------
    UsageError
        The features or the targets are not the model's.
    MemoryLimitExceeded, DataError
        As for `fit`.

    Examples
    --------
    >>> import streamlr
    >>> ds = streamlr.Dataset([[0.0], [1.0], [2.0]], [1.0, 3.0, 5.0])
    >>> streamlr.evaluate(streamlr.fit(ds), ds).r2
    1.0
    """
    _check_model(model)
    check_target(dataset)
    model.check_features(dataset.feature_names)
    model.check_targets(dataset.target_names)
    statistic = ResidualsOf(model.coef_matrix, model.intercept_vector)
    with shown(progress) as callback:
        reduced = reduce(dataset, statistic, task="cost", memory_limit=memory_limit, progress=callback)
    warn_rounded(reduced.tally, stacklevel=2)
    return replace(reduced.value.cost(), n_dropped=reduced.tally.dropped, chunks_missing=reduced.tally.chunks_missing)


def predict(
    model: FittedModel,
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    memory_limit: int | str | None = None,
    progress: Progress = False,
) -> Tally:
    """Write the prediction of every row to an array `prediction` of a new zarr group, in bounded memory.

    Parameters
    ----------
    model : FittedModel
        The model.
    dataset : Dataset
        Rows with the model's features; no target is needed. With `missing="drop"` a row that lacks a value gets NaN.
    path : path
        The group to write; it appears when it is complete.
    overwrite : bool
        Replace what is there.
    memory_limit, progress
        As for `fit`.

    Returns
    -------
    Tally
        Rows written, and how many of them lack a value.

    Raises
    ------
    OutputExists, UsageError, MemoryLimitExceeded, DataError
        As for `fit`; nothing is left at `path` then.

    Examples
    --------
    >>> import pathlib, tempfile, streamlr, zarr
    >>> ds = streamlr.Dataset([[0.0], [1.0], [2.0]], [1.0, 3.0, 5.0])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tally = streamlr.predict(streamlr.fit(ds), ds, pathlib.Path(folder) / "out.zarr")
    ...     zarr.open_group(pathlib.Path(folder) / "out.zarr")["prediction"][:]
    array([1., 3., 5.])
    """
    _check_model(model)
    check_dataset(dataset)
    model.check_features(dataset.feature_names)

    def function(block: Block) -> Any:
        return model.predict_block(block.x)

    with shown(progress) as callback:
        return write(
            dataset.without_targets(),
            function,
            path,
            name="prediction",
            n_columns=len(model.target_names),
            overwrite=overwrite,
            memory_limit=memory_limit,
            progress=callback,
        )


def plan(dataset: Dataset, solver: Solver = "auto", *, memory_limit: int | str | None = None) -> Plan:
    """Say what a fit would do, before it does: tasks, bytes and memory; no row is read.

    Parameters
    ----------
    dataset, solver, memory_limit
        As for `fit`.

    Raises
    ------
    MemoryLimitExceeded
        The fit would not run within the limit; the message has the numbers.

    Examples
    --------
    >>> import numpy as np, streamlr
    >>> streamlr.plan(streamlr.Dataset(np.zeros((1000, 3)), np.zeros(1000))).passes
    1
    """
    check_dataset(dataset)
    if isinstance(chosen := solver_named(solver), Descent):
        return Training(dataset, chosen, memory_limit=memory_limit).plan()
    statistic = MomentsOf(dataset.feature_names, dataset.target_names)
    bytes_needed = solve_bytes(dataset.n_features, dataset.n_targets)
    return plan_pass(dataset, statistic, task="normal", memory=memory_limit, solution_bytes=bytes_needed)[0]


def _moments(dataset: Dataset, precision: str, memory_limit: int | str | None, progress: Progress) -> Reduced[Moments]:
    if precision == "single":
        _check_single(dataset)
    statistic = MomentsOf(dataset.feature_names, dataset.target_names, precision)
    needed = solve_bytes(dataset.n_features, dataset.n_targets)
    with shown(progress) as callback:
        reduced = reduce(dataset, statistic, task="moments", memory_limit=memory_limit, solution_bytes=needed, progress=callback)
    return replace(reduced, value=replace(reduced.value, n_dropped=reduced.tally.dropped))


def _check_single(dataset: Dataset) -> None:
    for rows in dataset.features:
        if rows.dtype.itemsize > (4 if rows.dtype.kind == "f" else 2):
            raise UsageError(
                f"precision is 'single', which would round the {rows.dtype} numbers of {rows.label!r}; allowed are features stored "
                "as float32, float16 or integers of 16 bits: leave precision at 'double'"
            )


def _solved(moments: Moments, direct: Direct, fit_intercept: bool, ridge: float) -> FittedModel:
    with one_blas_thread():  # so that the solution has the same bits however many threads BLAS is given
        solution = solve_normal(moments, direct, fit_intercept=fit_intercept, ridge=ridge)
        model = FittedModel.of_solution(moments, solution, fit_intercept=fit_intercept, ridge=ridge)
    if solution.aliased:
        warnings.warn(f"{describe_aliases(solution.aliased)} (rank {solution.rank})", RankWarning, stacklevel=3)
    if solution.digits < FEW_DIGITS:
        warnings.warn(
            f"the columns are nearly dependent (condition {solution.condition:.2g}): about {solution.digits:.0f} digits of their "
            "coefficients are right; leave some of them out, or use ridge",
            PrecisionWarning,
            stacklevel=3,
        )
    return model


def _check_model(model: FittedModel) -> None:
    if not isinstance(model, FittedModel):
        raise UsageError(f"the model is a {type(model).__name__}; give what `fit` or `load_model` returns, before the data")
