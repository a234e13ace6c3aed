"""FittedModel: coefficients and where they come from; predict, save, load."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlr.aggregates.cost import Cost, predictions
from streamlr.direct.inference import Summary, summarise
from streamlr.errors import BadFile, UsageError
from streamlr.files import read_json, write_json

KIND = "streamlr model"
VERSION = 1
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
    rank : int
        Feature columns that do not depend on others.
    condition : float
        Condition number of the equilibrated columns.
    digits : float
        Decimal digits of the coefficients that this leaves correct, estimated.
    route : str
        "cholesky", or "eigen" where the rank is short.
    aliased : mapping
        For each dependent column, the combination of others that it equals; empty for a constant.
    cost : Cost
        On the rows that were fitted.
    fit_intercept, ridge : bool, float
        What was asked for.
    std_err : (p,) or (p, k) float64
        Standard errors of `coef`; NaN under ridge, and for columns that share a coefficient, were dropped or are constant.
    intercept_std_err : float or (k,)
        Standard error of the intercept; NaN under ridge, without an intercept, and where columns share a coefficient.
    df_resid : int
        Rows that count, less the parameters.
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
    """

    coef: Array
    intercept: float | Array
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]
    n_rows: int
    rank: int
    condition: float
    digits: float
    route: str
    aliased: Mapping[str, Mapping[str, float]]
    cost: Cost
    fit_intercept: bool
    ridge: float
    std_err: Array
    intercept_std_err: float | Array
    df_resid: int
    n_dropped: int = 0
    dropped_by_column: Mapping[str, int] = field(default_factory=dict)
    chunks_missing: int = 0
    fingerprint: str | None = None
    coding: Mapping[str, Any] = field(default_factory=dict)

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
        columns = getattr(X, "columns", None)
        if columns is not None:
            self.check_features([str(name) for name in columns], known=True)
        if hasattr(X, "__dask_graph__"):
            return self._predict_lazily(X)
        rows = np.asarray(X, dtype=np.float64)
        single = rows.ndim == 1
        rows = np.atleast_2d(rows)
        self._check_count(rows.shape[1])
        out = self.predict_block(rows)
        out = out[:, 0] if self.coef.ndim == 1 else out
        return out[0] if single else out

    def predict_block(self, x: Array) -> Array:
        """Return the predictions of rows (m, p) in memory, as (m, k)."""
        return predictions(x, self.coef_matrix, self.intercept_vector)

    def check_features(self, names: Sequence[str], *, known: bool) -> None:
        """Raise unless `names` are the model's features, in its order; only their number counts where names are not `known`."""
        if known and list(names) != list(self.feature_names):
            lacking = [name for name in self.feature_names if name not in names]
            extra = [name for name in names if name not in self.feature_names]
            detail = f"lacking {lacking[:5]}, unknown {extra[:5]}" if lacking or extra else "the same in another order"
            raise UsageError(
                f"the features are not those of the model: {detail}; select {list(self.feature_names)[:20]} in that order"
            )
        self._check_count(len(names))

    def _check_count(self, count: int) -> None:
        if count != self.n_features:
            raise UsageError(f"X has {count} features, but the model was fitted with {self.n_features} features as input")

    def _predict_lazily(self, X: Any) -> Any:
        X = X.to_dask_array() if not hasattr(X, "rechunk") else X
        self._check_count(X.shape[1])
        rows = X.rechunk({1: -1}).astype(np.float64)
        if self.coef.ndim == 1:
            return rows.map_blocks(lambda x: self.predict_block(x)[:, 0], drop_axis=1, dtype=np.float64)
        k = self.coef.shape[1]
        return rows.map_blocks(self.predict_block, chunks=(rows.chunks[0], (k,)), dtype=np.float64)

    def summary(self, level: float = 0.95) -> Summary:
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
        return summarise(names, self.target_names, coef, std_err, self.df_resid, level, self._head())

    def _head(self) -> str:
        lines = [
            f"{self.n_rows:,} rows, {self.n_features} features, rank {self.rank}, route {self.route}",
            f"condition {self.condition:.3g}, about {self.digits:.0f} digits; residual degrees of freedom {self.df_resid:,}",
            str(self.cost),
        ]
        if self.ridge:
            lines.append(f"ridge {self.ridge:g} on the columns as given: no standard errors")
        if self.n_dropped:
            lines.append(f"{self.n_dropped:,} rows left out for missing values")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the model as JSON values; numbers that are not finite are null."""
        return {
            "feature_names": list(self.feature_names),
            "target_names": list(self.target_names),
            "coef": _to_json(self.coef),
            "intercept": _to_json(self.intercept),
            "std_err": _to_json(self.std_err),
            "intercept_std_err": _to_json(self.intercept_std_err),
            "df_resid": self.df_resid,
            "n_rows": self.n_rows,
            "n_dropped": self.n_dropped,
            "dropped_by_column": dict(self.dropped_by_column),
            "chunks_missing": self.chunks_missing,
            "rank": self.rank,
            "condition": _to_json(self.condition),
            "digits": self.digits,
            "route": self.route,
            "aliased": {name: dict(combination) for name, combination in self.aliased.items()},
            "cost": {**{key: _to_json(value) for key, value in self.cost.to_dict().items()}, "weight_sum": self.cost.weight_sum},
            "fit_intercept": self.fit_intercept,
            "ridge": self.ridge,
            "fingerprint": self.fingerprint,
            "coding": dict(self.coding),
        }

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
        write_json(path, KIND, VERSION, content, overwrite=overwrite)


def load_model(path: str | os.PathLike[str]) -> FittedModel:
    """Read a model that `FittedModel.save` wrote, checking its format, version and digest.

    Parameters
    ----------
    path : path
        The file.

    Raises
    ------
    PathNotFound
        No such file.
    BadFile
        Not a model, of a newer version, or altered.

    Examples
    --------
    >>> import pathlib, tempfile, streamlr
    >>> model = streamlr.fit(streamlr.Dataset([[0.0], [1.0], [2.0]], [1.0, 3.0, 5.0]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save(pathlib.Path(folder) / "m.json")
    ...     again = streamlr.load_model(pathlib.Path(folder) / "m.json")
    >>> (again.coef == model.coef).all()
    np.True_
    """
    content = read_json(path, KIND, VERSION)
    try:
        p = len(content["feature_names"])
        cost = dict(content["cost"])
        cost.pop("rmse")
        cost |= {key: _number_or_array(cost[key], absent) for key, absent in (("mse", np.inf), ("r2", -np.inf), ("mae", None))}
        k = len(content["target_names"])
        coef, std_err, intercept = (_from_json(content[name]) for name in ("coef", "std_err", "intercept"))
        shape = (p,) if k == 1 else (p, k)
        if k == 0 or coef.shape != shape or std_err.shape != shape or intercept.shape != shape[1:]:
            raise ValueError("the coefficients do not fit the features and targets")
        if not (np.isfinite(coef).all() and np.isfinite(intercept).all()):
            raise ValueError("a coefficient is not finite")
        if len(set(content["feature_names"])) != p or type(content["n_rows"]) is not int:
            raise ValueError("feature names that differ and a number of rows are needed")
        return FittedModel(
            coef=coef,
            intercept=_number_or_array(content["intercept"]),
            feature_names=tuple(content["feature_names"]),
            target_names=tuple(content["target_names"]),
            n_rows=content["n_rows"],
            rank=content["rank"],
            condition=float(_from_json(content["condition"])),
            digits=content["digits"],
            route=content["route"],
            aliased=content["aliased"],
            cost=Cost(**cost),
            fit_intercept=content["fit_intercept"],
            ridge=content["ridge"],
            std_err=std_err,
            intercept_std_err=_number_or_array(content["intercept_std_err"], absent=np.nan),
            df_resid=content["df_resid"],
            n_dropped=content["n_dropped"],
            dropped_by_column=content["dropped_by_column"],
            chunks_missing=content["chunks_missing"],
            fingerprint=content["fingerprint"],
            coding=content["coding"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadFile(f"{path} lacks what a model needs ({error!r}); write it again with FittedModel.save") from error


def _to_json(value: Any) -> Any:
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, list | np.ndarray):
        return [_to_json(one) for one in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return float(value) if np.isfinite(value) else None


def _from_json(value: Any) -> Array:
    return np.array(value, dtype=np.float64)


def _number_or_array(value: Any, absent: float | None = None) -> Any:
    if value is None:
        return absent
    if not isinstance(value, list):
        return float(value)
    array = _from_json(value)
    return array if absent is None else np.where(np.isnan(array), absent, array)
