"""The scikit-learn estimators: the protocol, the numbers, and arrays that must not be loaded."""

from __future__ import annotations

import pickle
import warnings
from fractions import Fraction

import dask.array as da
import numpy as np
import pytest
import zarr
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import streamlr
from streamlr import LinearRegression, Ridge
from streamlr.errors import UsageError


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5000, 4)) + 10
    return x, x @ [1.0, -2.0, 0.5, 3.0] + 7 + rng.normal(size=5000)


@pytest.mark.parametrize(
    "estimator", [LinearRegression(), LinearRegression(fit_intercept=False), Ridge(), Ridge(alpha=0.0)], ids=str
)
def test_scikit_learns_own_checks_run_clean(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the checks themselves, which provoke some
        results = check_estimator(estimator, on_fail=None)
    assert [result["check_name"] for result in results if result["status"] in ("failed", "xfail")] == []
    skipped = {result["check_name"] for result in results if result["status"] == "skipped"}
    assert skipped <= {"check_array_api_input"}  # scikit-learn runs it only where SCIPY_ARRAY_API is set
    assert sum(result["status"] == "passed" for result in results) >= 50


def test_ridge_means_what_scikit_learns_alpha_means():
    x, y, alpha = [0, 1, 2, 5], [1, 3, 2, 8], 2
    mean_x, mean_y = Fraction(sum(x), 4), Fraction(sum(y), 4)
    sxy = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    sxx = sum((a - mean_x) ** 2 for a in x)
    model = Ridge(alpha=alpha).fit(np.array(x)[:, None], np.array(y))
    assert model.coef_[0] == pytest.approx(float(sxy / (sxx + alpha)), rel=1e-15)
    weighted = Ridge(alpha=alpha).fit(np.array(x)[:, None], np.array(y), sample_weight=[2, 2, 2, 2])
    assert weighted.coef_[0] == pytest.approx(float(2 * sxy / (2 * sxx + alpha)), rel=1e-15)


@pytest.mark.parametrize("make", [LinearRegression, Ridge])
def test_partial_fit_is_exact_for_any_batches(rows, make):
    x, y = rows
    whole = make().fit(x, y)
    pieces = make()
    for start, stop in ((0, 1), (1, 2), (2, 1000), (1000, 4999), (4999, 5000)):
        pieces.partial_fit(x[start:stop], y[start:stop])
    assert np.allclose(pieces.coef_, whole.coef_, rtol=1e-12, atol=0)
    assert pieces.intercept_ == pytest.approx(whole.intercept_, rel=1e-12)
    assert pieces.moments_.n == 5000


def test_a_failed_partial_fit_leaves_the_estimator_as_it_was(rows):
    x, y = rows
    model = LinearRegression().fit(x, y)
    before = model.coef_.copy()
    for bad_x, bad_y in ((x[:5, :3], y[:5]), (np.full((5, 4), np.nan), y[:5]), (x[:0], y[:0]), (x[:5], y[:4])):
        with pytest.raises(ValueError):  # noqa: PT011  # each has another message; the state is what matters
            model.partial_fit(bad_x, bad_y)
        assert (model.coef_ == before).all()
        assert model.moments_.n == 5000


def test_dask_and_zarr_arrays_give_the_same_bits_and_are_never_loaded(rows, tmp_path, monkeypatch):
    x, y = rows
    expected = LinearRegression().fit(x, y)
    group = zarr.open_group(tmp_path / "s.zarr", mode="w")
    stored = group.create_array("X", data=x, chunks=(700, 4)), group.create_array("y", data=y, chunks=(900,))
    lazy = da.from_array(x, chunks=(333, 3)), da.from_array(y, chunks=1000)
    monkeypatch.setattr(zarr.Array, "__getitem__", lambda *_: pytest.fail("a zarr array was loaded"))
    monkeypatch.setattr(da.Array, "__array__", lambda *_, **__: pytest.fail("a Dask array was loaded"))
    for pair in (stored, lazy):
        model = LinearRegression().fit(*pair)
        assert (model.coef_ == expected.coef_).all()
        assert model.score(*pair) == pytest.approx(expected.score(x, y), rel=1e-12)
    lazy_prediction = expected.predict(lazy[0])
    assert isinstance(lazy_prediction, da.Array)
    assert (lazy_prediction.compute() == expected.predict(x)).all()


def test_chunked_batches_with_other_columns_are_refused(rows):
    x, y = rows
    model = LinearRegression().fit(x, y)
    with pytest.raises(UsageError, match="X has 3 features, but LinearRegression is expecting 4"):
        model.partial_fit(da.from_array(x[:, :3]), da.from_array(y))


def test_several_targets_have_scikit_learns_shapes(rows):
    x, y = rows
    both = LinearRegression().fit(x, np.column_stack([y, 2 * y]))
    assert both.coef_.shape == (2, 4)
    assert both.intercept_.shape == (2,)
    assert both.predict(x[:3]).shape == (3, 2)
    column = LinearRegression().fit(x, y[:, None])
    assert column.coef_.shape == (1, 4)
    assert column.predict(x[:3]).shape == (3, 1)
    assert np.allclose(both.coef_[1], 2 * both.coef_[0])


def test_they_work_where_scikit_learn_users_put_them(rows):
    x, y = rows
    search = GridSearchCV(make_pipeline(StandardScaler(), Ridge()), {"ridge__alpha": [0.1, 1e6]}, cv=3).fit(x, y)
    assert search.best_params_ == {"ridge__alpha": 0.1}
    assert clone(Ridge(alpha=3)).alpha == 3
    model = pickle.loads(pickle.dumps(LinearRegression().fit(x, y)))
    assert model.predict(x[:1]).shape == (1,)
    assert "Ridge" in Ridge(alpha=3)._repr_html_()


def test_the_rank_is_told_and_the_names_are_kept():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": [0.0, 1, 2, 3], "b": [1.0, 0, 1, 1]})
    frame["c"] = frame["a"] + frame["b"]
    model = LinearRegression().fit(frame, [1.0, 2, 3, 5])
    assert model.rank_ == 2
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    assert list(model.model_.aliased) == ["c"]


def test_a_bad_alpha_says_what_is_allowed(rows):
    with pytest.raises(UsageError, match=r"alpha is -1.*from 0 on"):
        Ridge(alpha=-1).fit(*rows)
    assert streamlr.Ridge is Ridge
