"""scikit-learn estimators: skins over the API, with scikit-learn's names and meanings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from streamlr.aggregates.moments import Moments
from streamlr.api import accumulate, evaluate, solve
from streamlr.dataset.blocks import Span
from streamlr.dataset.dataset import Dataset
from streamlr.direct.normal import check_penalty
from streamlr.errors import RankWarning, UsageError
from streamlr.model import FittedModel


class LinearEstimator(MultiOutputMixin, RegressorMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
    """What all estimators share: rows in, a model out, and scikit-learn's names for what is in it."""

    fit_intercept: bool
    n_features_in_: int
    model_: FittedModel

    def predict(self, X: Any) -> Any:
        """Return b0 + X b, lazily for a Dask array; chunk by chunk for a zarr array.

        Parameters
        ----------
        X : array, (m, p)
            Features.
        """
        check_is_fitted(self)
        if _is_chunked(X):
            self._check_columns(Dataset(X))
            out = self.model_.predict(X) if _is_dask(X) else self._predict_stored(Dataset(X))
        else:
            out = self.model_.predict(validate_data(self, X, reset=False, dtype="numeric"))
        return out[:, None] if self.coef_.shape[:-1] == (1,) else out

    def _predict_stored(self, dataset: Dataset) -> NDArray[np.float64]:
        """Predict the rows of a zarr array through the reader that checks its chunks; only the predictions are held."""
        blocks = dataset.blocks(Span(0, dataset.stored_rows), lambda _: None)
        predicted = np.concatenate([self.model_.predict_block(block.x) for block in blocks])
        return predicted[:, 0] if self.model_.coef.ndim == 1 else predicted

    def score(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> float:
        """Return R^2 about the weighted mean, averaged over targets; Dask and zarr arrays in one pass.

        Parameters
        ----------
        X, y, sample_weight
            As for `fit`.
        """
        check_is_fitted(self)
        if not (_is_chunked(X) or _is_chunked(y)):
            return float(super().score(X, y, sample_weight))
        return float(np.mean(evaluate(self.model_, Dataset(X, y, sample_weight)).r2))

    def _dataset(self, X: Any, y: Any, sample_weight: Any, *, reset: bool) -> Dataset:
        """Return rows as a dataset: NumPy-like ones checked by scikit-learn; not Dask and zarr arrays, which it would load."""
        if _is_chunked(X) or _is_chunked(y):
            if reset and hasattr(self, "feature_names_in_"):
                del self.feature_names_in_  # these arrays have no names
        else:
            X, y = validate_data(self, X, y, reset=reset, dtype="numeric", multi_output=True, y_numeric=True)
            if sample_weight is not None:
                from sklearn.utils.validation import _check_sample_weight

                sample_weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        dataset = Dataset(X, y, sample_weight, feature_names=getattr(self, "feature_names_in_", None))
        if not reset:
            self._check_columns(dataset)
        self.n_features_in_ = dataset.n_features
        self._one_target_as_column = getattr(y, "ndim", 1) == 2 and dataset.n_targets == 1
        return dataset

    def _check_columns(self, dataset: Dataset) -> None:
        if dataset.n_features != self.n_features_in_:
            raise UsageError(
                f"X has {dataset.n_features} features, but {type(self).__name__} is expecting {self.n_features_in_} features "
                "as input"
            )

    def _show(self, model: FittedModel) -> None:
        """Copy a model into the attributes that scikit-learn's users know."""
        columns = self._one_target_as_column
        self.model_ = model
        self.coef_: NDArray[np.float64] = model.coef.T if model.coef.ndim == 2 else model.coef[None, :] if columns else model.coef
        intercept = np.atleast_1d(model.intercept) if columns else model.intercept
        self.intercept_: float | NDArray[np.float64] = intercept if self.fit_intercept else 0.0

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """Put every attribute back where something fails or is interrupted; none is ever changed in place."""
        before = self.__dict__.copy()
        try:
            yield
        except BaseException:
            self.__dict__ = before
            raise


class _Exact(LinearEstimator):
    """What the exact estimators share: moments in, coefficients out."""

    def fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> Self:
        """Fit to all rows, in one pass over them.

        Parameters
        ----------
        X : array, (n, p)
            NumPy-like, a Dask array or a zarr array; the latter two are read chunk by chunk and never loaded.
        y : array, (n,) or (n, k)
            Target or targets.
        sample_weight : array, (n,), optional
            Non-negative weights.
        """
        with self._unchanged_on_error():
            return self._settle(accumulate(self._dataset(X, y, sample_weight, reset=True)))

    def partial_fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> Self:
        """Fit to these rows and all rows before them: exactly what one fit to all of them gives, to rounding.

        Parameters
        ----------
        X, y, sample_weight
            As for `fit`. On an error the estimator stays as it was.
        """
        first = not hasattr(self, "moments_")
        with self._unchanged_on_error():
            moments = accumulate(self._dataset(X, y, sample_weight, reset=first))
            return self._settle(moments if first else self.moments_ + moments)

    def _settle(self, moments: Moments) -> Self:
        """Solve, and show the result."""
        with warnings.catch_warnings():  # as everywhere in scikit-learn a short rank is no news; `rank_` tells
            warnings.simplefilter("ignore", RankWarning)
            model = solve(moments, fit_intercept=self.fit_intercept, ridge=self._ridge(moments))
        self.moments_, self.rank_ = moments, model.rank
        self._show(model)
        return self

    def _ridge(self, moments: Moments) -> float:
        return 0.0


class LinearRegression(_Exact):
    r"""Ordinary least squares, exact, in one pass.

    .. math:: \min_{b_0, b} \sum w_i (y_i - b_0 - x_i'b)^2

    Where columns depend on others, the coefficients are the ones of least norm.

    Parameters
    ----------
    fit_intercept : bool
        Fit b0.

    Attributes
    ----------
    coef_ : (p,) or (k, p) float64
        Coefficients.
    intercept_ : float or (k,) float64
        Intercepts.
    rank_ : int
        Columns that do not depend on others.
    n_features_in_, feature_names_in_
        As in scikit-learn.
    model_ : FittedModel
        The model as a value: cost, standard errors, condition, aliased columns.
    moments_ : Moments
        Of all rows seen; what `partial_fit` adds to.

    Examples
    --------
    >>> import numpy as np
    >>> LinearRegression().fit(np.array([[0.0], [1.0], [2.0]]), np.array([1.0, 3.0, 5.0])).coef_
    array([2.])
    """

    moments_: Moments

    def __init__(self, *, fit_intercept: bool = True) -> None:
        self.fit_intercept = fit_intercept


class Ridge(_Exact):
    r"""Least squares with a penalty on squared coefficients, exact, in one pass.

    .. math:: \min_{b_0, b} \sum w_i (y_i - b_0 - x_i'b)^2 + \alpha |b|^2

    Parameters
    ----------
    alpha : float
        The penalty, as in scikit-learn: `streamlr.fit(ridge=)` times the sum of weights. The intercept is not penalised.
    fit_intercept : bool
        Fit b0.

    Attributes
    ----------
    coef_, intercept_, rank_, n_features_in_, feature_names_in_, model_, moments_
        As for `LinearRegression`.

    Examples
    --------
    >>> import numpy as np
    >>> Ridge(alpha=2.0).fit(np.array([[0.0], [1.0], [2.0]]), np.array([1.0, 3.0, 5.0])).coef_
    array([1.])
    """

    moments_: Moments

    def __init__(self, alpha: float = 1.0, *, fit_intercept: bool = True) -> None:
        self.alpha = alpha
        self.fit_intercept = fit_intercept

    def _ridge(self, moments: Moments) -> float:
        alpha = check_penalty(self.alpha, "alpha")
        return alpha / moments.weight_sum if moments.weight_sum else 0.0


def _is_dask(array: Any) -> bool:
    return hasattr(array, "__dask_graph__")


def _is_chunked(array: Any) -> bool:
    """Whether an array is read chunk by chunk, and so must not go through scikit-learn's checks, which would load it."""
    import zarr

    return _is_dask(array) or isinstance(array, zarr.Array)
