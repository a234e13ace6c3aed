"""FittedModel: coefficients and where they come from; predict, save, load."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from streamlr.aggregates.cost import Cost, make_cost, predictions
from streamlr.aggregates.moments import Moments
from streamlr.dataset.dask_rows import DaskRows
from streamlr.dataset.dataset import Dataset, default_names
from streamlr.dataset.rows import check_dtype, plain_array
from streamlr.dataset.tables.coding import MODEL_FORMAT, MODEL_VERSION
from streamlr.dataset.tally import Tally
from streamlr.descent.stopping import Record
from streamlr.direct.inference import Summary, standard_errors, summarise
from streamlr.direct.routes import Solution
from streamlr.errors import UsageError
from streamlr.files import to_json, write_json

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class FittedModel:
    """A linear model that was fitted, as a value.

    Attributes
    ----------
    coef : (p,) float64, or (p, k) with several targets
        Coefficients, in units of the target per unit of the feature.
    intercept : float, or (k,) with several targets
        b0; 0 where none was fitted.
    feature_names, target_names : tuple of str
        Names of the columns.
    n_rows : int
        Rows that were fitted.
    rank : int or None
        Feature columns that do not depend on others; None after a descent, which does not ask.
    condition : float or None
        Condition number of the equilibrated columns; None after a descent.
    digits : float or None
        Decimal digits of the coefficients that this leaves correct, estimated; None after a descent.
    route : str
        "cholesky", or "eigen" where the rank is short; "gd", "minibatch" or "sgd" after a descent.
    aliased : mapping
        For each dependent column, the combination of others that it equals; empty for a constant, and after a descent.
    cost : Cost
        On the rows that were fitted.
    fit_intercept, ridge : bool, float
        What was asked for.
    std_err : (p,) or (p, k) float64
        Standard errors of `coef`; NaN under ridge, after a descent, and for columns that share a coefficient, were dropped or are
        constant.
    intercept_std_err : float or (k,)
        Standard error of the intercept; NaN under ridge, without an intercept, and where columns share a coefficient.
    df_resid : int or None
        Rows that count, less the parameters; None after a descent.
    n_dropped : int
        Rows left out because a value was missing.
    dropped_by_column : mapping of str to int
        Which columns lacked a value, and in how many rows.
    chunks_missing : int
        Absent chunks that were read as fill values because the caller allowed it.
    fingerprint : str or None
        Of the rows; None where the model comes from moments alone.
    coding : mapping
        How tables become columns (formula, levels), where they did.
    history : tuple of Record
        Of a descent: one an epoch, and more with `log_every`.
    stopped : str
        Why a descent ended; empty for a direct solution.
    validation : Cost or None
        On the rows that a descent held out.
    """

    coef: Array
    intercept: float | Array
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]
    n_rows: int
    rank: int | None
    condition: float | None
    digits: float | None
    route: str
    aliased: Mapping[str, Mapping[str, float]]
    cost: Cost
    fit_intercept: bool
    ridge: float
    std_err: Array
    intercept_std_err: float | Array
    df_resid: int | None
    n_dropped: int = 0
    dropped_by_column: Mapping[str, int] = field(default_factory=dict)
    chunks_missing: int = 0
    fingerprint: str | None = None
    coding: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Record, ...] = ()
    stopped: str = ""
    validation: Cost | None = None

    def __repr__(self) -> str:
        size = f"{self.n_rows:,} rows x {self.n_features} features"
        return f"<streamlr.FittedModel {self.route} of {', '.join(self.target_names)}: {size}, {self.cost}>"

    @classmethod
    def of_solution(cls, moments: Moments, solution: Solution, *, fit_intercept: bool, ridge: float) -> FittedModel:
        """Return the model that a solution of these moments is, with its cost and standard errors."""
        squares, unresolved = moments.cost_sums(solution.coef, solution.intercept)
        errors = standard_errors(moments, solution, np.where(unresolved, np.nan, squares), fit_intercept=fit_intercept)
        one = moments.n_targets == 1
        return cls(
            coef=solution.coef[:, 0] if one else solution.coef,
            intercept=float(solution.intercept[0]) if one else solution.intercept,
            feature_names=moments.feature_names,
            target_names=moments.target_names,
            n_rows=moments.n,
            rank=solution.rank,
            condition=solution.condition,
            digits=solution.digits,
            route=solution.route,
            aliased=solution.aliased,
            cost=make_cost(squares, None, moments.spread_of_targets),
            fit_intercept=fit_intercept,
            ridge=ridge,
            std_err=errors.coef[:, 0] if one else errors.coef,
            intercept_std_err=float(errors.intercept[0]) if one else errors.intercept,
            df_resid=errors.df_resid,
            n_dropped=moments.n_dropped,
        )

    @classmethod
    def of_descent(cls, dataset: Dataset, coef: Array, intercept: Array, cost: Cost, tally: Tally, **facts: Any) -> FittedModel:
        """Return the model of coefficients (p, k) and intercepts (k,) that a descent ended with, and of a pass for their cost."""
        one = len(intercept) == 1
        unknown = np.full_like(coef, np.nan)
        return cls(
            coef=coef[:, 0] if one else coef,
            intercept=float(intercept[0]) if one else intercept,
            feature_names=dataset.feature_names,
            target_names=dataset.target_names,
            n_rows=cost.n,
            rank=None,
            condition=None,
            digits=None,
            aliased={},
            cost=replace(cost, n_dropped=tally.dropped, chunks_missing=tally.chunks_missing),
            std_err=unknown[:, 0] if one else unknown,
            intercept_std_err=float("nan") if one else np.full_like(intercept, np.nan),
            df_resid=None,
            n_dropped=tally.dropped,
            dropped_by_column=tally.dropped_by_column,
            chunks_missing=tally.chunks_missing,
            coding=dataset.coding,
            **facts,
        )

    @property
    def n_features(self) -> int:
        """Number of features, p."""
        return len(self.feature_names)

    @property
    def coef_matrix(self) -> Array:
        """Coefficients as (p, k), whatever k is."""
        return self.coef.reshape(self.n_features, -1)

    @property
    def intercept_vector(self) -> Array:
        """Intercepts as (k,), whatever k is."""
        return np.atleast_1d(np.asarray(self.intercept, dtype=np.float64))

    def predict(self, X: Any) -> Any:
        """Return b0 + X b for rows in memory, or lazily for a Dask array.

        Parameters
        ----------
        X : array, (m, p), or (p,) for one row
            Features in the order of `feature_names`. A data frame is checked by its column names. For zarr stores use
            `streamlr.predict`, which streams.

        Returns
        -------
        (m,) float64, or (m, k) with several targets
            A row's prediction does not depend on the rows beside it.

        Raises
        ------
        UsageError
            The number or the names of the columns are not the model's.

        Examples
        --------
        >>> import streamlr
        >>> model = streamlr.fit(streamlr.Dataset([[0.0], [1.0], [2.0]], [1.0, 3.0, 5.0]))
        >>> model.predict([[3.0]])
        array([7.])
        """
        names = getattr(X, "columns", None)
        if names is not None:
            self.check_features([str(name) for name in names])
        if isinstance(X, zarr.Array):
            raise UsageError(
                "X is a zarr array, which predict would load whole: stream it with streamlr.predict(model, dataset, path)"
            )
        if hasattr(X, "__dask_graph__"):
            return self._predict_lazily(X)
        rows = plain_array(X)
        check_dtype(rows.dtype, "X")
        if rows.ndim not in (1, 2):
            raise UsageError(f"X has {rows.ndim} dimensions; allowed are 2 (rows and columns), and 1 for one row")
        self._check_count(rows.shape[-1])
        out = self.predict_block(np.atleast_2d(rows).astype(np.float64))
        out = out[:, 0] if self.coef.ndim == 1 else out
        return out[0] if rows.ndim == 1 else out

    def predict_block(self, x: Array) -> Array:
        """Return the predictions of rows (m, p) in memory, as (m, k)."""
        return predictions(x, self.coef_matrix, self.intercept_vector)

    def check_features(self, names: Sequence[str]) -> None:
        """Raise unless `names` are the model's features in its order; where either side has no names, only their number counts."""
        self._check_count(len(names))
        unnamed = default_names("x", self.n_features) in (tuple(names), self.feature_names)
        if tuple(names) == self.feature_names or (unnamed and not set(names) & set(self.feature_names)):
            return
        lacking = [name for name in self.feature_names if name not in names]
        extra = [name for name in names if name not in self.feature_names]
        detail = f"lacking {lacking[:5]}, unknown {extra[:5]}" if lacking else "the same in another order"
        raise UsageError(f"the features are not those of the model: {detail}; select {list(self.feature_names)[:20]} in that order")

    def check_targets(self, names: Sequence[str]) -> None:
        """Raise unless `names` are the model's targets in its order; where either side has no names, only their number counts."""
        k = len(self.target_names)
        if len(names) != k:
            raise UsageError(f"the data have {len(names)} target(s), the model {k}: {list(self.target_names)[:20]}; name as many")
        unnamed = (("y",), default_names("y", k))
        if tuple(names) != self.target_names and tuple(names) not in unnamed and self.target_names not in unnamed:
            raise UsageError(
                f"the targets {list(names)[:20]} are not those of the model: {list(self.target_names)[:20]}, in that order"
            )

    def _check_count(self, count: int) -> None:
        if count != self.n_features:
            raise UsageError(f"X has {count} features, but the model was fitted with {self.n_features} features as input")

    def _predict_lazily(self, X: Any) -> Any:
        array = X if hasattr(X, "rechunk") else X.to_dask_array()
        read = DaskRows(array, "X")
        read.check_current()
        read.fingerprint(complete=True)  # a graph that reads zarr takes fill values for missing chunks
        self._check_count(array.shape[1])
        rows = array.rechunk({1: -1}).astype(np.float64)
        if self.coef.ndim == 1:
            return rows.map_blocks(lambda x: self.predict_block(x)[:, 0], drop_axis=1, dtype=np.float64)
        k = self.coef.shape[1]
        return rows.map_blocks(self.predict_block, chunks=(rows.chunks[0], (k,)), dtype=np.float64)

    def summary(self, *, level: float = 0.95) -> Summary:
        """Return standard errors, t, p and confidence intervals for errors that are independent and of one variance.

        Parameters
        ----------
        level : float
            Of the confidence intervals, between 0 and 1.

        Raises
        ------
        UsageError
            The level is not between 0 and 1.

        Examples
        --------
        >>> import streamlr
        >>> model = streamlr.fit(streamlr.Dataset([[0.0], [1.0], [2.0], [3.0]], [1.0, 3.0, 5.0, 8.0]))
        >>> model.summary().names
        ('intercept', 'x0')
        """
        if not 0 < level < 1:
            raise UsageError(f"level is {level!r}; allowed are numbers between 0 and 1, for example 0.95")
        names, coef, std_err = self.feature_names, self.coef_matrix, self.std_err.reshape(self.n_features, -1)
        if self.fit_intercept:
            names = ("intercept", *names)
            coef = np.vstack([self.intercept_vector, coef])
            std_err = np.vstack([np.atleast_1d(np.asarray(self.intercept_std_err)), std_err])
        return summarise(names, self.target_names, coef, std_err, self.df_resid or 0, level, self._head())

    def _head(self) -> str:
        rows = f"{self.n_rows:,} rows, {self.n_features} features"
        if self.rank is None or self.condition is None or self.digits is None or self.df_resid is None:
            epochs = sum(record.complete for record in self.history)
            lines = [f"{rows}, route {self.route}", f"{epochs:,} epochs; {self.stopped}; no standard errors", str(self.cost)]
        else:
            lines = [
                f"{rows}, rank {self.rank}, route {self.route}",
                f"condition {self.condition:.3g}, about {self.digits:.0f} digits; residual degrees of freedom {self.df_resid:,}",
                str(self.cost),
            ]
        if self.validation is not None:
            lines.append(f"held out: {self.validation}")
        if self.ridge:
            lines.append(f"ridge {self.ridge:g} on the columns as given: no standard errors")
        if self.df_resid and not self.ridge and not self.aliased and np.isnan(self.std_err).any():
            lines.append("the residuals are too small for moments to tell: mse is a bound, and `evaluate` measures it")
        if self.n_dropped:
            lines.append(f"{self.n_dropped:,} rows left out for missing values")
        if self.chunks_missing:
            lines.append(f"{self.chunks_missing:,} absent chunks read as fill values")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the model as JSON values; numbers that are not finite are null."""
        facts = {field.name: getattr(self, field.name) for field in fields(self)}
        history = [record.to_dict() for record in self.history]
        validation = None if self.validation is None else self.validation.to_dict()
        values: dict[str, Any] = to_json({**facts, "cost": self.cost.to_dict(), "history": history, "validation": validation})
        return values

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the model as JSON: exact floats, no NaN, a digest; whole or not at all.

        Parameters
        ----------
        path : path
            The file to write.
        overwrite : bool
            Replace an existing file.

        Raises
        ------
        OutputExists
            The file exists and `overwrite` is False.
        """
        from importlib.metadata import version

        content = {**self.to_dict(), "written_by": {"streamlr": version("streamlr"), "numpy": np.__version__}}
        write_json(path, MODEL_FORMAT, MODEL_VERSION, content, overwrite=overwrite)
