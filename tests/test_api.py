"""The public functions: what they refuse, what they count, and that nothing a caller gave is ignored."""

from __future__ import annotations

import pickle
import shutil

import dask.array as da
import numpy as np
import pytest
import zarr

import streamlr
from streamlr import errors
from streamlr.errors import ChunkMissing, MemoryLimitExceeded, PrecisionWarning, UnsupportedDtype, UsageError


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 3))
    return x, x @ [1.0, 2.0, 3.0] + 4 + rng.normal(size=500)


@pytest.fixture
def dataset(rows):
    return streamlr.Dataset(*rows)


@pytest.fixture
def model(dataset):
    return streamlr.fit(dataset)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda ds, model: streamlr.fit("flights.zarr"), r"data are a str; give a Dataset: streamlr.open_dataset"),
        (lambda ds, model: streamlr.evaluate(ds, model), r"model is a Dataset; give what `fit`"),
        (lambda ds, model: streamlr.predict(ds, model, "out.zarr"), r"model is a Dataset"),
        (lambda ds, model: streamlr.predict(model, np.ones((2, 3)), "out.zarr"), r"data are a ndarray"),
        (lambda ds, model: streamlr.plan("flights.zarr"), r"data are a str"),
        (lambda ds, model: streamlr.accumulate(None), r"data are a NoneType"),
        (lambda ds, model: streamlr.solve(ds), r"moments are a Dataset; give what `accumulate`"),
        (lambda ds, model: streamlr.fit(ds, ridge="0.1"), r"ridge is '0.1'; allowed are finite numbers from 0 on"),
        (lambda ds, model: streamlr.fit(ds, ridge=float("nan")), r"ridge is nan"),
        (
            lambda ds, model: streamlr.fit(ds, solver="newton"),
            r"solver is 'newton'; allowed are 'auto', 'normal', 'gd', 'minibatch', 'sgd'",
        ),
        (lambda ds, model: streamlr.Direct("qr"), r"route is 'qr'"),
        (lambda ds, model: streamlr.Direct(rank="maybe"), r"rank is 'maybe'"),
        (lambda ds, model: ds.split(0.1, seed=None), r"seed is None; allowed are integers"),
        (lambda ds, model: ds.split(1.5), r"fraction is 1.5"),
        (lambda ds, model: streamlr.fit(streamlr.Dataset(np.ones((3, 1)))), r"no target"),
        (lambda ds, model: model.predict(np.ones((2, 2, 3))), r"X has 3 dimensions"),
        (lambda ds, model: model.predict(zarr.array(np.ones((2, 3)))), r"streamlr.predict"),
    ],
)
def test_misuse_says_what_was_got_and_what_to_do(call, says, dataset, model):
    with pytest.raises(UsageError, match=says):
        call(dataset, model)


@pytest.mark.parametrize("ridge", [np.float32(0.5), np.int64(1), 1, True])
def test_numbers_of_any_kind_are_numbers(ridge, dataset, tmp_path):
    model = streamlr.fit(dataset, ridge=ridge, fit_intercept=np.bool_(True))
    model.save(tmp_path / "m.json")
    assert streamlr.load_model(tmp_path / "m.json").ridge == float(ridge)


@pytest.mark.parametrize(
    "cells", [np.array([["1", "2", "3"]]), np.array([[1j, 2, 3]]), np.array([["2020-01-01"] * 3], dtype="M8[D]")]
)
def test_predict_takes_real_numbers_only(model, cells):
    with pytest.raises(UnsupportedDtype, match="'X' has dtype"):
        model.predict(cells)


def test_a_masked_cell_is_missing_in_a_prediction(model):
    masked = np.ma.masked_array(np.ones((2, 3)), mask=[[False, True, False], [False] * 3])
    predicted = model.predict(masked)
    assert np.isnan(predicted[0])
    assert predicted[1] == model.predict(np.ones((1, 3)))[0]


def test_evaluate_knows_targets_by_their_names(rows, tmp_path):
    x, y = rows
    group = zarr.open_group(tmp_path / "s.zarr", mode="w")
    group.create_array("X", data=x)
    group.create_array("p", data=y)
    group.create_array("q", data=-y)
    pq = streamlr.open_dataset(tmp_path / "s.zarr", target=["p", "q"])
    model = streamlr.fit(pq)
    assert (streamlr.evaluate(model, pq).r2 > 0.9).all()
    with pytest.raises(UsageError, match=r"targets \['q', 'p'\] are not those of the model: \['p', 'q'\]"):
        streamlr.evaluate(model, streamlr.open_dataset(tmp_path / "s.zarr", target=["q", "p"]))
    with pytest.raises(UsageError, match="the data have 1 target"):
        streamlr.evaluate(model, streamlr.open_dataset(tmp_path / "s.zarr", target="q"))
    # arrays without names are taken in their order
    assert (streamlr.evaluate(model, streamlr.Dataset(x, np.column_stack([y, -y]))).r2 > 0.9).all()


def test_left_out_rows_are_counted_wherever_rows_are_read(rows, tmp_path):
    x, y = rows
    x = x.copy()
    x[::10, 1] = np.nan
    group = zarr.open_group(tmp_path / "s.zarr", mode="w")
    group.create_array("X", data=x, chunks=(60, 3))
    group.create_array("y", data=y, chunks=(60,))
    ds = streamlr.open_dataset(tmp_path / "s.zarr", missing="drop")
    model = streamlr.fit(ds)
    assert (model.n_rows, model.n_dropped, dict(model.dropped_by_column)) == (450, 50, {"x1": 50})
    cost = streamlr.evaluate(model, ds)
    assert (cost.n, cost.n_dropped) == (450, 50)
    assert "50 rows with missing values left out" in str(cost)
    m = streamlr.accumulate(ds)
    assert streamlr.solve(m + m).n_dropped == 100
    assert streamlr.predict(model, ds, tmp_path / "out.zarr").dropped == 50


def test_integers_that_float64_may_have_rounded_are_told(rows):
    x = np.column_stack([np.arange(500), np.arange(500) % 7])
    x[3, 0] = 2**53 + 1
    for solver in ("auto", "gd", "minibatch", "sgd"):
        with pytest.warns(PrecisionWarning, match="'x0'") as caught:
            model = streamlr.fit(streamlr.Dataset(x, rows[1]), solver)
        assert {warning.filename for warning in caught if warning.category is PrecisionWarning} == {__file__}
    with pytest.warns(PrecisionWarning, match="'x0'"):
        streamlr.evaluate(model, streamlr.Dataset(x, rows[1]))


def test_data_frames_bring_their_names(rows):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(rows[0], columns=["a", "b", "c"])
    model = streamlr.fit(streamlr.Dataset(frame, rows[1]))
    assert model.feature_names == ("a", "b", "c")
    assert (model.predict(frame) == model.predict(rows[0])).all()
    with pytest.raises(UsageError, match="another order"):
        model.predict(frame[["b", "a", "c"]])
    assert streamlr.fit(streamlr.Dataset(*rows)).predict(frame).shape == (500,)


def test_predictions_never_come_from_missing_chunks(rows, tmp_path):
    x, y = rows
    group = zarr.open_group(tmp_path / "s.zarr", mode="w")
    group.create_array("X", data=x, chunks=(50, 3))
    model, estimator = streamlr.fit(streamlr.Dataset(x, y)), streamlr.LinearRegression().fit(x, y)
    whole = zarr.open_array(tmp_path / "s.zarr/X", mode="r")
    assert (estimator.predict(whole) == model.predict(x)).all()
    shutil.rmtree(tmp_path / "s.zarr/X/c/3")
    with pytest.raises(ChunkMissing, match=r"chunk 3.0 of array 'X'"):
        estimator.predict(whole)
    lazy = da.from_zarr(str(tmp_path / "s.zarr"), component="X")
    for predict in (model.predict, estimator.predict):
        with pytest.raises(ChunkMissing, match=r"chunk 3\.0"):
            predict(lazy)


def test_an_estimator_forgets_names_that_no_longer_hold(rows):
    pd = pytest.importorskip("pandas")
    x, y = rows
    frame = pd.DataFrame(x[:, :2], columns=["a", "b"])
    estimator = streamlr.LinearRegression().fit(frame, y)
    estimator.partial_fit(da.from_array(x[:, :2]), y)  # more rows of the same columns
    assert estimator.moments_.n == 1000
    estimator.fit(da.from_array(x), da.from_array(y))
    assert not hasattr(estimator, "feature_names_in_")
    assert estimator.n_features_in_ == 3
    column = streamlr.Ridge().fit(x, y[:, None])
    assert column.predict(da.from_array(x)).shape == (500, 1)


def test_a_wide_short_table_is_planned_by_its_rows():
    plan = streamlr.plan(streamlr.Dataset(np.zeros((200, 2000)), np.zeros(200)))
    assert plan.peak_bytes - plan.base_bytes < 500_000_000
    with pytest.raises(MemoryLimitExceeded, match=r"to solve for 20,000 columns"):
        streamlr.plan(streamlr.Dataset(np.zeros((10, 20_000)), np.zeros(10)), memory_limit="20GB")


def test_public_values_survive_pickling(dataset, model, rows):
    assert (pickle.loads(pickle.dumps(model)).coef == model.coef).all()
    again = pickle.loads(pickle.dumps(dataset))
    assert (streamlr.fit(again).coef == model.coef).all()
    m = pickle.loads(pickle.dumps(streamlr.accumulate(dataset)))
    assert (streamlr.solve(m).coef == model.coef).all()


@pytest.mark.parametrize("name", [name for name, value in vars(errors).items() if isinstance(value, type)])
def test_errors_come_back_from_other_processes(name):
    kind = getattr(errors, name)
    if not issubclass(kind, BaseException):
        return
    again = pickle.loads(pickle.dumps(kind("chunk 1.0")))
    assert (type(again), str(again)) == (kind, "chunk 1.0")
    assert str(kind.__new__(kind, "chunk 1.0")) == "chunk 1.0"  # as Dask rebuilds them, through tblib


def test_progress_is_told_to_the_end(rows):
    events = []
    streamlr.fit(streamlr.Dataset(*rows), progress=events.append)
    assert (events[-1].rows, events[-1].rows_total, events[-1].task) == (500, 500, "moments")
    streamlr.fit(streamlr.Dataset(*rows), progress=True)
