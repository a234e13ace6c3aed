"""Full-batch descent: two routes to the same gradients, and where they lead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import streamlr
from streamlr import Descent
from streamlr.dataset.ingest import ingest
from streamlr.demo import FORMULA, flights_path
from streamlr.descent.full import Curvature
from streamlr.passes.progress import Event

P, N = 600, 300  # so wide that p^2 numbers are much more than the rows: a limit lies between


@pytest.fixture(scope="module")
def wide():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((N, P)) * rng.uniform(0.1, 10, P) + rng.uniform(-3, 3, P)
    y = x[:, :3] @ [1.0, -2.0, 0.3] + rng.standard_normal(N)
    return x, np.column_stack([y, 1e3 * y[::-1] + 7]), rng.uniform(0.0, 2.0, N)


def narrow(n: int = 2_000, k: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 4)) * [1.0, 10.0, 0.1, 3.0] + [0.0, 10.0, 0.05, -2.0]
    x[:, 3] += 0.5 * x[:, 0]
    y = x @ rng.standard_normal((4, k)) + 5 + rng.standard_normal((n, k))
    return x, y[:, 0] if k == 1 else y, rng.uniform(0.0, 2.0, n)


def limit_between(dataset: streamlr.Dataset) -> int:
    """A memory limit that p^2 numbers do not fit, and rows do."""
    plan = streamlr.plan(dataset, "gd")
    assert plan.solution_bytes > 30 * 2**20
    return plan.base_bytes + 20 * 2**20


@pytest.mark.parametrize("update", ["plain", "momentum", "nesterov"])
@pytest.mark.parametrize(
    ("weighted", "several", "options", "settings"),
    [
        (False, False, {}, {}),
        (True, True, {"scale": "standard"}, {}),
        (True, False, {"scale": None, "learning_rate": 1e-5}, {}),
        (False, True, {}, {"fit_intercept": False}),
        (True, True, {}, {"ridge": 0.3}),
    ],
    ids=["default", "weights", "unscaled", "no intercept", "ridge"],
)
def test_moments_and_data_lead_the_same_way(wide, update, weighted, several, options, settings):
    x, y, w = wide
    dataset = streamlr.Dataset(x, y if several else y[:, 0], weights=w if weighted else None)
    solver = Descent("gd", max_epochs=6, update=update, gradient_tol=0.0, **options)
    by_moments = streamlr.fit(dataset, solver, **settings)
    limit = limit_between(dataset)
    assert streamlr.plan(dataset, solver, memory_limit=limit).passes == 6
    by_data = streamlr.fit(dataset, solver, memory_limit=limit, **settings)
    assert by_data.history[-1].gap is None  # nothing of p^2 was made
    assert by_moments.history[-1].gap is not None
    size = np.abs(by_moments.coef).max(axis=0)
    np.testing.assert_allclose(by_data.coef / size, by_moments.coef / size, rtol=0, atol=1e-11)
    for one, other in zip(by_moments.history, by_data.history, strict=True):
        np.testing.assert_allclose(one.cost.mse, other.cost.mse, rtol=1e-10)
        np.testing.assert_allclose(one.cost.r2, other.cost.r2, rtol=1e-8, atol=1e-9)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-8)
        assert one.learning_rate == pytest.approx(other.learning_rate, rel=1e-9)
        assert (one.epoch, one.steps, one.rows, one.scale) == (other.epoch, other.steps, other.rows, other.scale)


def test_steps_are_those_of_the_definition():
    """The textbook's loop over the columns as they are, written out."""
    x, y, w = narrow(200, k=2)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    design, theta = np.column_stack([x, np.ones(len(x))]), np.zeros((5, 2))
    model = streamlr.fit(
        streamlr.Dataset(x, y, weights=w), Descent("gd", scale=None, learning_rate=0.1, max_epochs=4, gradient_tol=0.0), ridge=0.2
    )
    for record in model.history:
        residuals = y - design @ theta
        np.testing.assert_allclose(record.cost.mse, np.average(residuals**2, axis=0, weights=w), rtol=1e-10)
        gradient = -2 * design.T @ (w[:, None] * residuals) / w.sum()
        gradient[:4] += 2 * 0.2 * theta[:4]
        assert record.gradient_norm == pytest.approx(np.linalg.norm(gradient), rel=1e-10)
        last, theta = theta, theta - 0.1 * gradient
    np.testing.assert_allclose(model.coef, last[:4], rtol=1e-10)
    np.testing.assert_allclose(model.intercept, last[4], rtol=1e-10)


@pytest.mark.parametrize("update", ["plain", "momentum", "nesterov"])
@pytest.mark.parametrize("scale", ["standard", "whiten"])
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 10.0, 1e4])
def test_it_ends_at_the_exact_fit(update, scale, fit_intercept, ridge):
    x, y, w = narrow(k=2)
    dataset = streamlr.Dataset(x, y, weights=w)
    settings: dict[str, Any] = {"fit_intercept": fit_intercept, "ridge": ridge}
    model = streamlr.fit(dataset, Descent("gd", scale=scale, update=update), **settings)
    exact = streamlr.fit(dataset, **settings)
    np.testing.assert_allclose(model.coef, exact.coef, rtol=1e-6, atol=1e-7 * np.abs(exact.coef).max())
    np.testing.assert_allclose(model.intercept, exact.intercept, rtol=1e-6)
    assert "gradient" in model.stopped
    gaps = np.array([record.gap for record in model.history])
    values = np.array([record.cost.mse for record in model.history])
    assert (gaps >= -1e-12 * values[0]).all()  # of the penalised cost, which the exact fit makes least
    assert (np.abs(gaps[-1]) <= 1e-9 * values[0]).all()
    if update == "plain":
        assert (np.diff(gaps, axis=0) <= 1e-12 * values[0]).all()


def test_the_gap_is_the_cost_above_the_least():
    x, y, _ = narrow()
    dataset = streamlr.Dataset(x, y)
    model = streamlr.fit(dataset, Descent("gd", max_epochs=3, gradient_tol=0.0))
    least = np.mean((y - np.column_stack([x, np.ones(len(x))]) @ np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y)[0]) ** 2)
    for record in model.history:
        assert record.gap == pytest.approx(record.cost.mse - least, rel=1e-9)
    assert model.history[0].gap == pytest.approx(np.var(y) - least, rel=1e-9)  # it starts from the mean
    assert streamlr.evaluate(model, dataset).mse - least == pytest.approx(model.history[-1].gap, rel=1e-9)


def test_the_gradient_falls_below_a_hundred_millionth_on_the_flights(tmp_path):
    ingest([flights_path()], tmp_path / "flights.zarr", formula=FORMULA, missing="drop")
    dataset = streamlr.open_dataset(tmp_path / "flights.zarr")
    model, exact = streamlr.fit(dataset, "gd"), streamlr.fit(dataset)
    assert model.history[-1].gradient_norm < 1e-8 * model.history[0].gradient_norm
    assert "gradient" in model.stopped
    assert abs(model.cost.mse / exact.cost.mse - 1) < 1e-10


def readings(dataset: streamlr.Dataset, solver: Descent, **settings: Any) -> dict[str, float]:
    """How often all rows were read, by what they were read for."""
    done: dict[str, int] = {}
    last: dict[str, int] = {}

    def note(event: Event) -> None:
        if not event.note:  # with one, it is of a record and not of a reading
            before = last.get(event.task, 0)
            done[event.task] = done.get(event.task, 0) + event.rows - (before if event.rows >= before else 0)
            last[event.task] = event.rows % event.rows_total

    streamlr.fit(dataset, solver, progress=note, **settings)
    return {task: count / dataset.n_rows for task, count in done.items()}


def test_the_rows_are_read_as_often_as_the_plan_says(wide):
    x, y, _ = wide
    dataset = streamlr.Dataset(x, y[:, 0])
    solver = Descent("gd", max_epochs=7, gradient_tol=0.0)
    assert streamlr.plan(dataset, solver).passes == 1
    assert readings(dataset, solver) == {"sample": 1, "moments": 1, "cost": 1}
    limit = limit_between(dataset)
    assert streamlr.plan(dataset, solver, memory_limit=limit).passes == 7
    assert readings(dataset, solver, memory_limit=limit) == {"sample": 1, "gradient": 7, "cost": 1}


def test_curvature_is_the_most_that_a_change_of_gradient_shows():
    hessian = np.diag([2.0, 8.0])
    move = np.array([[1.0, 0.0], [1.0, 1.0]])
    before = Curvature(move, np.zeros((2, 2)), np.array([3.0, 9.0]))
    after = before.met(hessian @ move)
    np.testing.assert_allclose(after.most, [np.sqrt(68 / 2), 9.0])
    still = Curvature(np.zeros((2, 2)), np.zeros((2, 2)), np.array([3.0, 9.0])).met(np.ones((2, 2)))
    assert still.most.tolist() == [3.0, 9.0]


@pytest.mark.parametrize("update", ["plain", "momentum", "nesterov"])
def test_a_row_that_no_sample_shows_does_not_throw_it_off(update):
    """One row carries nearly all of a column's variance, fifty times what a sample sees: the first step leads far up."""
    rng = np.random.default_rng(1)
    n = 200_000
    x = rng.standard_normal((n, 2))
    x[123_456, 1] = 3e3
    y = x @ [1.0, 0.5] + rng.standard_normal(n)
    dataset = streamlr.Dataset(x, y)
    model, exact = streamlr.fit(dataset, Descent("gd", update=update)), streamlr.fit(dataset)
    assert model.history[0].learning_rate > 20 * model.history[-1].learning_rate  # the sample was wrong, and found out
    assert max(record.cost.mse for record in model.history) > 20 * model.history[0].cost.mse
    np.testing.assert_allclose(model.coef, exact.coef, rtol=1e-6)


def test_held_out_rows_choose_the_coefficients(wide):
    x, y, _ = wide
    dataset = streamlr.Dataset(x, y[:, 0])
    solver = Descent("gd", validation=0.3, max_epochs=60, tol=1e-4, patience=10, seed=4)
    for settings in ({}, {"memory_limit": limit_between(dataset)}):
        model = streamlr.fit(dataset, solver, **settings)
        train, held_out = dataset.split(0.3, seed=4)
        costs = [record.validation.mse for record in model.history]
        assert model.n_rows == train.n_rows == model.history[0].cost.n
        kept = streamlr.evaluate(model, held_out).mse
        assert min(costs) * (1 - 1e-9) <= kept <= min(costs) * (1 + 1.1e-4)
        assert kept == pytest.approx(model.validation.mse, rel=1e-9)
        assert streamlr.evaluate(model, train).mse == pytest.approx(model.cost.mse, rel=1e-12)
        assert costs.index(min(costs)) < len(costs) - 1  # with more columns than rows, too many steps learn the noise
        assert "validation" in model.stopped


def test_the_start_may_be_the_best_by_held_out_rows():
    """Rows of noise: whatever is learned from it is wrong elsewhere."""
    rng = np.random.default_rng(0)
    dataset = streamlr.Dataset(rng.standard_normal((60, 40)), rng.standard_normal(60))
    model = streamlr.fit(dataset, Descent("gd", validation=0.3, max_epochs=50))
    assert not model.coef.any()
    assert model.validation.mse == model.history[0].validation.mse < model.history[1].validation.mse
