"""Whole fits by gradient descent: with defaults on all kinds of columns, what goes wrong, what is recorded, what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from strategies import cuts
from zarr.storage import MemoryStore

import streamlr
from streamlr import Descent
from streamlr.aggregates.cost import ResidualsOf, residual_sums
from streamlr.dataset.blocks import Block
from streamlr.dataset.ingest import ingest
from streamlr.demo import FORMULA, flights_path
from streamlr.descent.scaling import Coordinates
from streamlr.descent.seen import Seen
from streamlr.errors import ChunkMissing, Diverged, MemoryLimitExceeded, NonFiniteValue, NoRows, NumericalError, UsageError
from streamlr.passes.planning import plan_pass

DATA = Path(__file__).parent / "data"
STOCHASTIC = ["minibatch", "sgd"]
MODES = [*STOCHASTIC, "gd"]
N = 6_000
pytestmark = pytest.mark.filterwarnings("ignore::streamlr.errors.RankWarning", "ignore::streamlr.errors.PrecisionWarning")

Table = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def line(x: np.ndarray, rng: np.random.Generator, r2: float = 0.7, noise: np.ndarray | None = None) -> np.ndarray:
    """A target of which the columns explain a share."""
    spread = x.std(axis=0)
    signal = ((x - x.mean(axis=0)) / np.where(spread > 0, spread, 1.0)) @ rng.standard_normal(x.shape[1])
    noise = rng.standard_normal(len(x)) if noise is None else noise
    return signal / signal.std() * np.sqrt(r2) + noise / noise.std() * np.sqrt(1 - r2)


def offsets(rng) -> Table:
    x = rng.standard_normal((N, 6)) + 1e9
    return x, line(x, rng), None


def scales(rng) -> Table:
    x = rng.standard_normal((N, 15))
    return x * np.logspace(-8, 6, 15), line(x, rng), None


def correlated(rng) -> Table:
    x = np.sqrt(0.9999) * rng.standard_normal((N, 1)) + np.sqrt(0.0001) * rng.standard_normal((N, 8))
    return x, 10 * x @ rng.standard_normal(8) + rng.standard_normal(N), None


def student(rng) -> Table:
    x = rng.standard_t(2, (N, 8))
    return x, line(x, rng), None


def student_noise(rng) -> Table:
    x = rng.standard_t(2.5, (N, 8))
    return x, line(x, rng, noise=rng.standard_t(2.1, N)), None


def lognormal(rng) -> Table:
    x = np.exp(2 * rng.standard_normal((N, 6)))
    return x, line(x, rng), None


def sorted_by_y(rng) -> Table:
    x = rng.standard_normal((N, 6))
    y = line(x, rng)
    order = np.argsort(y)
    return x[order], y[order], None


def constant_and_double(rng) -> Table:
    x = rng.standard_normal((N, 4))
    return np.hstack([x, x[:, :1], np.full((N, 1), 3.7)]), line(x, rng), None


def rare_levels(rng) -> Table:
    shares = np.r_[np.full(8, 5e-4), 0.3]
    levels = rng.choice(10, N, p=np.r_[shares, 1 - shares.sum()])
    x = np.hstack([(levels[:, None] == np.arange(9)).astype(float), rng.standard_normal((N, 3))])
    return x, x @ np.r_[np.full(8, 3.0), 1.0, 1.0, 2.0, 3.0] + rng.standard_normal(N), None


def weighted(rng) -> Table:
    x = rng.standard_normal((N, 6))
    return x, line(x, rng), np.exp(rng.standard_normal(N)) * (rng.random(N) < 0.9)


def several_targets(rng) -> Table:
    x = rng.standard_normal((N, 6))
    return x, np.column_stack([line(x, rng), 1e6 + 1e3 * line(x, rng, 0.01), line(x, rng, 0.999)]), None


def hardly_any_noise(rng) -> Table:
    x = rng.standard_normal((N, 6))
    return x, line(x, rng, 0.999999), None


KINDS = [offsets, scales, correlated, student, student_noise, lognormal, sorted_by_y, constant_and_double, rare_levels]
KINDS += [weighted, several_targets, hardly_any_noise]


def stored(path: Path, x: np.ndarray, y: np.ndarray, w: np.ndarray | None, rows: int = 500) -> streamlr.Dataset:
    group = zarr.open_group(path, mode="w")
    for name, values in (("X", x), ("y", y), ("w", w)):
        if values is not None:
            group.create_array(name, data=values, chunks=(rows, *values.shape[1:]))
    return streamlr.open_dataset(path, features="X", target="y", weights=None if w is None else "w")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def datasets(folder) -> dict[str, streamlr.Dataset]:
    made = {kind.__name__: stored(folder / f"{kind.__name__}.zarr", *kind(np.random.default_rng(1))) for kind in KINDS}
    for name, source, formula in (
        ("flights", flights_path(), FORMULA),
        ("diamonds", DATA / "diamonds.csv.gz", "price ~ carat + depth + table + x + y + z + C(cut) + C(color) + C(clarity)"),
    ):
        ingest([source], folder / f"{name}.zarr", formula=formula, missing="drop")
        made[name] = streamlr.open_dataset(folder / f"{name}.zarr")
    return made


@pytest.fixture(scope="module")
def plain() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3_000, 4))
    return x, x @ [1.0, 2.0, 3.0, 4.0] + 5 + rng.standard_normal(3_000)


def excess(cost: Any, least: Any) -> float:
    return float(np.max((np.asarray(cost.mse) - least.mse) / least.mse))


@pytest.mark.parametrize("mode", STOCHASTIC)
def test_defaults_come_near_the_optimum_of_all_kinds_of_columns(mode, datasets):
    found = {}
    for name, dataset in datasets.items():
        model = streamlr.fit(dataset, mode)
        assert len(model.history) <= 10
        found[name] = excess(model.cost, streamlr.fit(dataset).cost)
    assert {name: value for name, value in found.items() if value > 1e-2} == {}
    assert {name: value for name, value in found.items() if value > 1e-3 and name in ("flights", "diamonds")} == {}
    assert sum(value <= 1e-3 for name, value in found.items()) >= 12


@pytest.mark.parametrize("mode", STOCHASTIC)
@pytest.mark.parametrize("max_epochs", [30, 100])
def test_more_epochs_are_no_worse(mode, max_epochs, plain):
    """While the rate is held high the cost is flat: no reason to stop."""
    dataset = streamlr.Dataset(*plain)
    model = streamlr.fit(dataset, Descent(mode, max_epochs=max_epochs))
    assert excess(model.cost, streamlr.fit(dataset).cost) < 1e-5
    assert len(model.history) > max_epochs // 10


@pytest.mark.parametrize("mode", STOCHASTIC)
@pytest.mark.parametrize("ridge", [0.1, 10.0, 1e3])
def test_defaults_come_near_the_optimum_under_a_penalty(mode, ridge):
    rng = np.random.default_rng(6)
    x = rng.standard_normal((1_000, 6))
    dataset = streamlr.Dataset(x * np.logspace(-2, 2, 6), line(x, rng), weights=rng.uniform(0.0, 2.0, 1_000))
    model, exact = streamlr.fit(dataset, mode, ridge=ridge), streamlr.fit(dataset, ridge=ridge)
    value, least = (one.cost.mse + ridge * (one.coef**2).sum() for one in (model, exact))
    assert -1e-9 < value / least - 1 < 1e-3


@pytest.mark.parametrize(("update", "most"), [("momentum", 0.2), ("nesterov", 0.05)])  # momentum's oscillations fade more slowly
def test_a_rule_that_remembers_has_time_to_forget_its_start_before_the_rate_falls(update, most):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2_000, 10)) * 10.0 ** np.linspace(-1, 1, 10)
    dataset = streamlr.Dataset(x, x @ rng.standard_normal(10) + rng.standard_normal(2_000))
    model = streamlr.fit(dataset, Descent(update=update))  # 80 steps, of which each moves the next ten
    assert excess(model.cost, streamlr.fit(dataset).cost) < most


def tiny() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((5, 2))
    yield "five rows", x, x @ [1.0, 2.0] + rng.standard_normal(5)
    yield "two rows", np.array([[1.0], [2.0]]), np.array([3.0, 4.0])
    yield "one row", np.array([[1e9, -3.0]]), np.array([3.0])
    yield "fewer rows than columns", rng.standard_normal((4, 7)), rng.standard_normal(4)
    x = rng.standard_normal((50, 1))
    yield "one column", x, x[:, 0] + rng.standard_normal(50)
    yield "constant target", rng.standard_normal((50, 3)), np.full(50, 7.7)
    yield "target of zeros", rng.standard_normal((50, 3)), np.zeros(50)
    yield "constant columns", np.full((50, 3), 2.5), rng.standard_normal(50) + 1
    yield "columns of zeros", np.zeros((50, 3)), rng.standard_normal(50) + 1
    x = rng.standard_normal((300, 4))
    yield "no noise", x, x @ [1.0, 2.0, 3.0, 4.0] + 5
    yield "huge numbers", rng.standard_normal((300, 3)) * 1e200, rng.standard_normal(300) * 1e150
    yield "small numbers", rng.standard_normal((300, 3)) * 1e-200, rng.standard_normal(300) * 1e-150


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize(("x", "y"), [pytest.param(x, y, id=name) for name, x, y in tiny()])
def test_small_and_odd_data_end_near_the_optimum(mode, fit_intercept, x, y):
    dataset = streamlr.Dataset(x, y)
    model = streamlr.fit(dataset, mode, fit_intercept=fit_intercept)
    exact = streamlr.fit(dataset, fit_intercept=fit_intercept)
    scale = np.abs(y).max() or 1.0
    start = np.mean((y / scale - (y / scale).mean() if fit_intercept else y / scale) ** 2)
    least = streamlr.evaluate(exact, dataset).mse / scale / scale  # where it is zero, nothing to be relative to
    assert model.cost.mse / scale / scale <= least * (1 + 1e-2) + 1e-5 * start
    assert np.isfinite(model.coef).all()
    assert model.stopped


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("update", ["plain", "momentum", "nesterov", "adam"])
@pytest.mark.parametrize("scale", ["auto", None])
def test_a_learning_rate_that_is_too_high_is_an_error_with_what_was_found_before(mode, update, scale, plain):
    with pytest.raises(Diverged, match=r"choose a lower one, or learning_rate='auto'") as caught:
        streamlr.fit(streamlr.Dataset(*plain), Descent(mode, learning_rate=1e3, update=update, scale=scale))
    error = caught.value
    assert ("scale='auto'" in str(error)) == (scale is None)
    assert "a learning rate of 1e+03" in str(error)
    assert isinstance(error, NumericalError)
    assert error.exit_status == 4
    # it went up from the start: that is the best, the mean for every row
    assert error.coef.tolist() == [0.0] * 4
    assert error.intercept == pytest.approx(0.0 if scale is None else plain[1].mean())
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.coef.tolist(), again.intercept) == (str(error), error.coef.tolist(), error.intercept)
    assert len(again.history) == len(error.history)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rate", [1e10, 1e100, 1e300])
@pytest.mark.parametrize("rows", [1, 300, 3_000])
@pytest.mark.parametrize("k", [1, 2])
def test_overflow_is_divergence_too(mode, rate, rows, k, plain):
    x, y = plain
    targets = np.column_stack([y, -y])[:rows, :k]
    with pytest.raises(Diverged) as caught:
        streamlr.fit(streamlr.Dataset(x[:rows], targets), Descent(mode, learning_rate=rate), fit_intercept=False)
    assert not np.any(caught.value.coef)  # of all that was tried, the start was best
    assert np.shape(caught.value.coef) == ((4,) if k == 1 else (4, 2))


@pytest.mark.parametrize("mode", ["minibatch", "gd"])
def test_slow_divergence_keeps_the_best_of_the_way(mode, plain):
    """It goes down along some directions at first, and up along one."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3_000, 3)) * [1.0, 1.0, 1e-3] + [0.0, 0.0, 1.0]
    x[:, 2] *= 7.0  # along which the Hessian is 98, and the targets are met at the start, but for a little
    y = x[:, 0] + 1e-6 * x[:, 2]
    rate = 2.04 / (2 * np.mean(x[:, 2] ** 2))
    options = {"batch_size": 3_000} if mode == "minibatch" else {}
    solver = Descent(mode, learning_rate=rate, scale=None, max_epochs=3_000, tol=0.0, **options)
    with pytest.raises(Diverged) as caught:
        streamlr.fit(streamlr.Dataset(x, y), solver, fit_intercept=False)
    error = caught.value
    costs = [record.cost.mse for record in error.history]
    assert min(costs) < 0.5 * costs[0] < costs[-1]  # down, and up again
    assert np.mean((y - x @ error.coef - error.intercept) ** 2) < 0.5 * costs[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("x_unit", "y_unit", "scale", "error"),
    [
        (1e200, 1.0, None, NumericalError),
        (1.0, 1e200, None, Diverged),
        (1e-310, 1.0, "auto", NumericalError),
        (1.0, 1e300, "auto", None),
        (1e308, 1.0, "auto", None),
        (1e150, 1.0, "auto", None),
        (1e-200, 1.0, "auto", None),
    ],
)
def test_the_ends_of_the_range_of_float64(mode, x_unit, y_unit, scale, error, plain):
    """Either numbers that are right, or an error that says what to do: never another warning."""
    x, y = np.sign(plain[0]), plain[1] / np.abs(plain[1]).max()
    dataset = streamlr.Dataset(x * x_unit, y * y_unit)
    if error:
        with pytest.raises(error, match=r"unit|scale='auto'"):
            streamlr.fit(dataset, Descent(mode, scale=scale))
    else:
        model, exact = streamlr.fit(dataset, Descent(mode, scale=scale)), streamlr.fit(dataset)
        np.testing.assert_allclose(model.coef / np.abs(exact.coef).max(), exact.coef / np.abs(exact.coef).max(), atol=1e-2)


def false_alarms() -> Iterator[Any]:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((N, 5))
    low = 1e-3 * x[:, 0] + rng.standard_normal(N)
    order = np.argsort(low)
    heavy = np.exp(2.5 * rng.standard_normal((N, 5)))
    yield pytest.param(x, low, {}, {}, id="low signal")
    yield pytest.param(x, low + 1e8, {}, {"fit_intercept": False}, id="huge mean, no intercept")
    yield pytest.param(x + 1e3, low, {}, {"fit_intercept": False}, id="columns far from zero, no intercept")
    yield pytest.param(heavy, heavy[:, 0] * rng.standard_t(2, N), {}, {}, id="heavy tails")
    yield pytest.param(x[order], low[order], {"shuffle": False}, {}, id="sorted and not shuffled")
    yield pytest.param(heavy[order], low[order], {"shuffle": False, "max_epochs": 1}, {}, id="heavy, sorted, one epoch")
    step = np.r_[np.zeros(N - 5), np.full(5, 1e6)]
    yield pytest.param(x, step, {"shuffle": False}, {}, id="a target of zeros but for the last")


@pytest.mark.parametrize("mode", STOCHASTIC)
@pytest.mark.parametrize(("x", "y", "options", "settings"), list(false_alarms()))
def test_no_false_alarm(mode, x, y, options, settings):
    dataset = streamlr.Dataset(x, y)
    model = streamlr.fit(dataset, Descent(mode, **options), **settings)
    zero = np.mean((y - (y.mean() if settings.get("fit_intercept", True) else 0.0)) ** 2)
    assert model.cost.mse <= 10 * zero


def test_no_false_alarm_in_full_batch():
    for parameter in false_alarms():
        x, y, _, settings = parameter.values
        model = streamlr.fit(streamlr.Dataset(x, y), Descent("gd", max_epochs=1_000), **settings)
        assert model.cost.mse <= streamlr.fit(streamlr.Dataset(x, y), **settings).cost.mse * (1 + 1e-2)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("size", [1, 7, 256])
def test_records_are_those_of_a_plain_loop(weights, size, plain):
    """Everything recorded, from a textbook's loop over the rows as stored, with records inside epochs."""
    x, y = plain[0][:1_000], plain[1][:1_000]
    w = np.random.default_rng(1).uniform(0.5, 2.0, 1_000) if weights else None
    share = np.ones(1_000) if w is None else w / w.mean()
    rate, theta, steps, expected = 0.01, np.zeros(5), 0, []
    a = np.column_stack([x, np.ones(1_000)])
    for epoch in (1, 2):
        met, gradients, epoch_steps = np.empty(0), np.zeros(5), 0
        for start in range(0, 1_000, size):
            rows = slice(start, min(start + size, 1_000))
            residuals = y[rows] - a[rows] @ theta
            gradient = -2 / size * a[rows].T @ (share[rows] * residuals)
            theta = theta - rate * gradient
            met, gradients, steps, epoch_steps = np.r_[met, residuals], gradients + gradient, steps + 1, epoch_steps + 1
            seen = len(met) + 1_000 * (epoch - 1)
            logged = seen // 300 > (seen - (rows.stop - start)) // 300
            for complete in ([False] if logged else []) + ([True] if rows.stop == 1_000 else []):
                mse, mae = (np.average(values, weights=share[: len(met)]) for values in (met**2, np.abs(met)))
                norm = np.linalg.norm(gradients) / epoch_steps
                expected.append((epoch, steps, seen, mse, mae, norm, complete))
    options = {"mode": "sgd"} if size == 1 else {"batch_size": size}
    solver = Descent(**options, learning_rate=rate, scale=None, max_epochs=2, tol=0.0, shuffle=False, log_every=300, average=False)
    model = streamlr.fit(streamlr.Dataset(x, y, weights=w), solver)
    assert len(model.history) == len(expected)
    for record, (epoch, steps, rows, mse, mae, norm, complete) in zip(model.history, expected, strict=True):
        assert (record.epoch, record.steps, record.rows, record.complete) == (epoch, steps, rows, complete)
        assert record.cost.mse == pytest.approx(mse, rel=1e-9)
        assert record.cost.mae == pytest.approx(mae, rel=1e-9)
        assert record.gradient_norm == pytest.approx(norm, rel=1e-9)
        assert (record.learning_rate, record.scale, record.gap, record.validation) == (rate, "none", None, None)
    np.testing.assert_allclose(np.r_[model.coef, model.intercept], theta, rtol=1e-9)
    seconds = [record.seconds for record in model.history]
    assert seconds == sorted(seconds)


@given(
    st.integers(0, 1000),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([1e-150, 1.0, 1e100]),
    st.sampled_from([0.0, 1e9]),
    st.data(),
)
def test_what_steps_met_is_the_cost_of_their_residuals(seed, k, weighted, unit, mean, data):
    """However rows are cut, whatever the targets' unit, and however far they are from the point they are measured from."""
    rng = np.random.default_rng(seed)
    n, zero, mean_weight = 300, np.zeros(k), 3.0 if weighted else 1.0
    coordinates = Coordinates(np.zeros(2), np.ones(2), zero, np.full(k, unit), True, mean_weight)
    residuals, targets, w = rng.standard_normal((n, k)), mean + rng.standard_normal((n, k)), rng.uniform(0.1, 2.0, (n, 1))
    w[:50] *= data.draw(st.sampled_from([0.0, 1.0]))
    seen = Seen.nothing(k)
    for first, last in pairwise(data.draw(cuts(n))):
        seen = seen.of(residuals[first:last], targets[first:last], w[first:last] if weighted else None, 1)
    weights = w[:, 0] * mean_weight if weighted else None
    expected = residual_sums(Block(0, n, residuals * unit, targets * unit, weights)).cost()
    found = seen.cost(coordinates)
    assert found.n == expected.n
    for name in ("mse", "mae", "weight_sum"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)
    np.testing.assert_allclose(found.r2, expected.r2, atol=1e-6 if mean else 1e-12)  # far from zero, targets lack digits themselves
    shares = w if weighted else np.ones((n, 1))
    np.testing.assert_allclose(seen.squares, [(shares * residuals**2).sum(), (shares * targets**2).sum()], rtol=1e-12)


@pytest.mark.parametrize("mode", STOCHASTIC)
def test_records_inside_epochs_do_not_change_where_it_leads(mode, datasets):
    quiet, loud = (streamlr.fit(datasets["weighted"], Descent(mode, max_epochs=3, log_every=every)) for every in (None, 700))
    assert sum(not record.complete for record in loud.history) == 3 * N // 700
    assert len(quiet.history) == 3
    np.testing.assert_allclose(loud.coef, quiet.coef, rtol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_the_cost_of_the_model_is_that_of_its_training_rows(mode, datasets):
    for name, validation in (("weighted", 0.0), ("several_targets", 0.25)):
        dataset = datasets[name]
        model = streamlr.fit(dataset, Descent(mode, max_epochs=3, validation=validation, seed=5))
        train = dataset.split(validation, seed=5)[0] if validation else dataset
        assert model.n_rows == train.n_rows
        assert model.cost.to_dict() == streamlr.evaluate(model, train).to_dict()


@pytest.mark.parametrize("mode", MODES)
def test_held_out_rows_teach_nothing(mode, plain):
    """They are chosen by their position: other targets there change the validation, and not one bit of the steps."""
    x, y = plain
    held_out = streamlr.Dataset(x, y).split(0.2, seed=7)[1]
    position = np.arange(3_000.0)
    marked = streamlr.Dataset(position[:, None], position).split(0.2, seed=7)[1]
    places = _positions(marked)
    assert len(places) == held_out.n_rows
    other = y.copy()
    other[places] *= -100
    solver = Descent(mode, max_epochs=1, validation=0.2, seed=7)
    one, two = streamlr.fit(streamlr.Dataset(x, y), solver), streamlr.fit(streamlr.Dataset(x, other), solver)
    assert one.coef.tobytes() == two.coef.tobytes()
    assert one.history[0].cost.to_dict() == two.history[0].cost.to_dict()
    assert two.history[0].validation.mse > 100 * one.history[0].validation.mse
    assert one.history[0].validation.n == len(places)


@pytest.mark.parametrize("mode", MODES)
def test_held_out_rows_of_one_target_value_still_tell_better_from_worse(mode, plain):
    x = plain[0][:300].copy()
    y = x[:, 0] + 1.0
    held_out = streamlr.Dataset(np.arange(300.0)[:, None], np.arange(300.0)).split(0.05, seed=0)[1]
    x[_positions(held_out), 0], y[_positions(held_out)] = 1.0, 2.0
    model = streamlr.fit(streamlr.Dataset(x, y), Descent(mode, validation=0.05))
    assert model.cost.r2 > 0.99


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("share", "count"), [(1e-9, 0), (1 - 1e-9, 50)])
def test_a_share_that_leaves_a_part_without_rows_is_refused_before_any_is_read(mode, share, count, plain):
    dataset = streamlr.Dataset(plain[0][:50], plain[1][:50])
    for call in (streamlr.plan, streamlr.fit):
        with pytest.raises(UsageError, match=f"of 50 rows, validation=.* holds out {count}; give more rows"):
            call(dataset, Descent(mode, validation=share))


def _positions(dataset: streamlr.Dataset) -> np.ndarray:
    """The rows of a dataset whose target is the position."""
    from streamlr.dataset.blocks import Span

    blocks = dataset.reader().blocks(Span(0, dataset.stored_rows), lambda tally: None)
    return np.concatenate([block.y[:, 0].copy() for block in blocks]).astype(int)


def test_the_best_coefficients_by_held_out_rows_are_returned():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((400, 150))
    dataset = streamlr.Dataset(x, x[:, 0] + 3 * rng.standard_normal(400))
    solver = Descent(learning_rate=0.02, validation=0.3, max_epochs=80, patience=5, tol=1e-6, batch_size=16)
    model = streamlr.fit(dataset, solver)
    held_out = dataset.split(0.3, seed=0)[1]
    costs = [record.validation.mse for record in model.history]
    best = costs.index(min(costs))
    assert best < len(costs) - 1
    assert "validation" in model.stopped
    assert streamlr.evaluate(model, held_out).mse == pytest.approx(costs[best], rel=1e-12)


def test_a_summary_after_a_descent(plain):
    text = str(streamlr.fit(streamlr.Dataset(*plain), Descent(max_epochs=2)).summary())
    assert "3,000 rows, 4 features, route minibatch" in text
    assert "2 epochs; all 2 epochs were used (max_epochs)" in text
    assert "no standard errors" in text
    assert "nan" not in text
    assert "None" not in text


@pytest.mark.parametrize("mode", MODES)
def test_a_plan_says_what_will_be_done(mode, datasets):
    dataset = datasets["flights"]
    plan = streamlr.plan(dataset, Descent(mode, max_epochs=4))
    assert (plan.solver, plan.n_rows, plan.n_features) == (mode, dataset.n_rows, 23)
    assert plan.passes == (1 if mode == "gd" else 4)
    assert plan.peak_bytes <= plan.limit_bytes
    with pytest.raises(streamlr.errors.MemoryLimitExceeded, match="the limit is"):
        streamlr.plan(dataset, mode, memory_limit=plan.base_bytes + 2**16)
    with pytest.raises(streamlr.errors.MemoryLimitExceeded):
        streamlr.fit(dataset, mode, memory_limit=plan.base_bytes + 2**16)


@pytest.mark.parametrize("mode", ["gd", "minibatch", "sgd"])
def test_the_cost_that_comes_last_is_planned_first(mode):
    """Its spans end within tiles, whose rows are kept: more than a descent itself needs of such small chunks."""
    arrays = [zarr.create_array(MemoryStore(), shape=(10**8, *w), chunks=(10_000, *w), dtype="f8") for w in ((100,), ())]
    dataset = streamlr.Dataset(*arrays)
    statistic = ResidualsOf(np.zeros((100, 1)), np.zeros(1))
    for workers in (1, 2, 4):
        with dask.config.set(num_workers=workers):
            cost = plan_pass(dataset, statistic, task="cost", memory=None)[0]
            plan = streamlr.plan(dataset, mode)
            assert plan.peak_bytes >= 0.99 * cost.peak_bytes  # what is in use may have changed a little
            of_tasks = plan.result_bytes + plan.tasks_per_process * plan.task_bytes
            assert plan.peak_bytes == plan.base_bytes + max(of_tasks, plan.solution_bytes)  # as it says when it is printed
            least = cost.base_bytes + cost.result_bytes + cost.task_bytes
            with pytest.raises(MemoryLimitExceeded):
                streamlr.fit(dataset, mode, memory_limit=least - 2**23)  # before it is found that no chunk is there
            with pytest.raises(ChunkMissing):
                streamlr.fit(dataset, mode, memory_limit=least + 2**29)


def test_a_batch_larger_than_the_data_is_refused(plain):
    dataset = streamlr.Dataset(*plain)
    for call in (streamlr.fit, streamlr.plan):
        with pytest.raises(UsageError, match="batch_size is 3,001 and there are 3,000 rows"):
            call(dataset, Descent(batch_size=3_001))
    train = dataset.split(0.5, seed=0)[0]
    with pytest.raises(UsageError, match=f"there are {train.n_rows:,} rows to train on"):
        streamlr.fit(dataset, Descent(batch_size=3_000, validation=0.5))
    streamlr.fit(dataset, Descent(batch_size=3_000, max_epochs=1))
    with pytest.raises(UsageError, match="batch_size is 0; allowed are whole numbers from 1 on"):
        Descent(batch_size=0)


@pytest.mark.parametrize("mode", MODES)
def test_no_rows_are_named_as_that(mode, plain, folder):
    x, y = plain
    with pytest.raises(NoRows):
        streamlr.fit(streamlr.Dataset(x, y, weights=np.zeros(3_000)), mode)
    stored(folder / f"{mode}-holes.zarr", np.full_like(x, np.nan), y, np.ones(3_000))
    with pytest.raises(NoRows):
        streamlr.fit(streamlr.open_dataset(folder / f"{mode}-holes.zarr", missing="drop"), mode)
    with pytest.raises(NoRows):
        streamlr.fit(streamlr.open_dataset(folder / f"{mode}-holes.zarr", weights="w", missing="drop"), mode, ridge=1.0)
    with pytest.raises(NonFiniteValue, match="row 0"):
        streamlr.fit(streamlr.open_dataset(folder / f"{mode}-holes.zarr"), mode)
    with pytest.raises(UsageError, match="no target"):
        streamlr.fit(streamlr.Dataset(x), mode)


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_left_out_are_counted_once(mode, plain, folder):
    x, y = plain[0].copy(), plain[1]
    x[::10, 1] = np.nan
    stored(folder / f"{mode}-some.zarr", x, y, None)
    model = streamlr.fit(streamlr.open_dataset(folder / f"{mode}-some.zarr", missing="drop"), Descent(mode, max_epochs=3))
    assert (model.n_rows, model.n_dropped) == (2_700, 300)
    assert sum(model.dropped_by_column.values()) == 300
    assert [record.rows for record in model.history] == [2_700, 5_400, 8_100]
    assert {record.cost.n for record in model.history} == {2_700}


@pytest.mark.parametrize("mode", STOCHASTIC)
def test_weights_of_zero_are_as_good_as_no_rows(mode, plain):
    """Also where a whole sample, or the first rows of all, have no weight."""
    x, y = plain
    w = np.zeros(3_000)
    w[-200:] = 1.0
    model = streamlr.fit(streamlr.Dataset(x, y, weights=w), Descent(mode, max_epochs=100, shuffle=False, log_every=300))
    exact = streamlr.fit(streamlr.Dataset(x[-200:], y[-200:]))
    assert model.cost.mse <= 1.5 * exact.cost.mse
    w[:] = 0.0
    w[77] = 1.0  # all columns look constant
    model = streamlr.fit(streamlr.Dataset(x, y, weights=w), mode)
    assert model.cost.mse == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("mode", ["minibatch", "sgd"])
def test_rows_that_are_left_out_do_not_lengthen_the_descent(mode, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300_000, 3))
    y = x.sum(axis=1) + rng.standard_normal(len(x))
    y[rng.random(len(x)) > 0.004] = np.nan
    group = zarr.open_group(tmp_path / "s.zarr", mode="w")
    group.create_array("X", data=x, chunks=(50_000, 3))
    group.create_array("y", data=y, chunks=(50_000,))
    dataset = streamlr.open_dataset(tmp_path / "s.zarr", missing="drop")
    model, exact = streamlr.fit(dataset, mode), streamlr.fit(dataset)
    assert model.n_rows == exact.n_rows < 1_500
    assert excess(model.cost, exact.cost) < 1e-2


def test_a_penalty_is_measured_in_the_mean_weight_of_all_rows():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100_000, 3))
    y, weights = x @ [1.0, 2.0, 3.0] + rng.standard_normal(len(x)), np.where(rng.random(len(x)) < 1e-3, 1.0, 1e-6)
    dataset = streamlr.Dataset(x, y, weights)
    model, exact = streamlr.fit(dataset, "minibatch", ridge=1.0), streamlr.fit(dataset, ridge=1.0)
    np.testing.assert_allclose(model.coef, exact.coef, rtol=5e-2)


@pytest.mark.parametrize("mode", ["minibatch", "sgd"])
def test_a_penalty_is_not_measured_in_the_weight_of_rows_that_are_left_out(mode, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100_000, 3))
    y, lost = x @ [1.0, 2.0, 3.0] + rng.standard_normal(len(x)), rng.random(len(x)) < 0.1
    x[lost, 0] = np.nan
    group = zarr.open_group(tmp_path / "s.zarr", mode="w")
    for name, array in {"X": x, "y": y, "w": np.where(lost, 1_000.0, 1.0)}.items():
        group.create_array(name, data=array, chunks=(20_000, *array.shape[1:]))
    dataset = streamlr.open_dataset(tmp_path / "s.zarr", weights="w", missing="drop")
    model, exact = streamlr.fit(dataset, mode, ridge=1.0), streamlr.fit(dataset, ridge=1.0)
    np.testing.assert_allclose(model.coef, exact.coef, rtol=5e-2)


def test_targets_of_no_weight_do_not_show_in_what_the_steps_met():
    targets = np.random.default_rng(0).standard_normal((1_000, 1))
    weights = np.ones((1_000, 1))
    weights[:300] = 0.0
    masked = targets.copy()
    masked[:300] = 1e30
    seen = Seen.nothing(1)
    for rows in (slice(0, 200), slice(200, 400), slice(400, None)):  # the first of no weight at all
        seen = seen.of(targets[rows], masked[rows], weights[rows], 1)
    expected = float((targets[300:] ** 2).sum())
    assert seen.squares == pytest.approx((expected, expected), rel=1e-12)
