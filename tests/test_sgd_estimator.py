"""SGDRegressor: scikit-learn's protocol, its meanings, and streams whose laws do not depend on how they are cut."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from itertools import pairwise
from pathlib import Path

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from strategies import cuts

from streamlr import LinearRegression, Ridge, SGDRegressor
from streamlr.descent.automatic import walk_of
from streamlr.descent.online import SAMPLE_ROWS, WINDOW_ROWS, Online, carried
from streamlr.descent.options import Descent
from streamlr.descent.schedules import Constant, InverseScaling
from streamlr.errors import DataError, Diverged, UsageError

DIAMONDS = Path(__file__).parent / "data" / "diamonds.csv.gz"


def expected_failures(estimator):
    return {"check_sample_weight_equivalence_on_dense_data": "rows of weight two are one step, repeated rows are two"}


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(
    [
        SGDRegressor(random_state=0),
        SGDRegressor(random_state=0, batch_size=1),
        SGDRegressor(fit_intercept=False, update="nesterov"),
    ],
    expected_failed_checks=expected_failures,
)
def test_scikit_learns_own_checks_run_clean(estimator, check):
    check(estimator)


def make_rows(n=20_000, p=4, k=1, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p)) * 10.0 ** np.arange(p) + 100
    y = (x - 100) @ rng.normal(size=(p, k)) / 10 ** (p - 1) + 7 + rng.normal(size=(n, k))
    return x, y[:, 0] if k == 1 else y


@cache
def diamonds():
    frame = pd.read_csv(DIAMONDS)
    coded = pd.get_dummies(frame.drop(columns="price"), drop_first=True, dtype=float)
    order = np.random.default_rng(0).permutation(len(frame))
    return coded.to_numpy()[order], frame["price"].to_numpy(dtype=float)[order]


def streamed(model, x, y, edges, weights=None):
    for a, b in pairwise(edges):
        model.partial_fit(x[a:b], y[a:b], None if weights is None else weights[a:b])
    return model


def gap(model, x, y, weights=None, **options):
    """How far the cost is from that of the optimum, as a share of it."""
    best = LinearRegression(**options).fit(x, y, weights)
    w = np.ones(len(x)) if weights is None else weights
    ours, least = (w @ (y - one.predict(x)) ** 2 for one in (model, best))
    return ours / least - 1


# meanings


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_alpha_is_the_ridge_of_scikit_learn(k, stream):
    x, y = make_rows(k=k)
    x = (x - 100) / 10.0 ** np.arange(4)
    model = SGDRegressor(alpha=0.7, random_state=0)
    for _ in range(20):
        model.partial_fit(x, y) if stream else model.fit(x, y)
        if not stream:
            break
    exact = Ridge(alpha=0.7 * len(x)).fit(x, y)
    unpenalised = LinearRegression().fit(x, y)
    assert np.abs(model.coef_ - exact.coef_).max() < 0.02 * np.abs(unpenalised.coef_ - exact.coef_).max()


@pytest.mark.parametrize(("word", "power"), [("constant", 0.0), ("invscaling", 0.25), ("invscaling", 0.7), ("invscaling", 0.0)])
def test_scikit_learns_rates_are_steps_of_half_the_square(word, power):
    x, y = make_rows(50, 2)
    x, y = x / 100, y / 10
    options = {"eta0": 0.03, "power_t": power} if word == "invscaling" else {"eta0": 0.03}
    model = SGDRegressor(learning_rate=word, batch_size=1, scale=None, **options).partial_fit(x, y)
    b, b0 = np.zeros(2), 0.0
    for t, (row, target) in enumerate(zip(x, y, strict=True), 1):
        step = 0.03 / t**power * (target - row @ b - b0)
        b, b0 = b + step * row, b0 + step
    assert np.allclose(model.coef_, b, rtol=1e-12)
    assert model.intercept_ == pytest.approx(b0, rel=1e-12)
    assert model.t_ == 50


def test_a_schedule_is_the_rate_of_the_square_itself():
    x, y = make_rows(500, 2)
    ours = SGDRegressor(learning_rate=Constant(0.01)).partial_fit(x, y)
    theirs = SGDRegressor(learning_rate="constant", eta0=0.02).partial_fit(x, y)
    assert (ours.coef_ == theirs.coef_).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_iter": 0}, "max_iter is 0; allowed are whole numbers from 1 on"),
        ({"n_iter_no_change": 2.5}, "n_iter_no_change is 2.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"shuffle": 1}, "shuffle is 1; allowed are True and False"),
        ({"average": 10}, "average is 10"),
        ({"alpha": -1.0}, "alpha is -1"),
        ({"tol": -1.0}, "tol is -1"),
        ({"learning_rate": "optimal"}, "learning_rate is 'optimal'; allowed are 'auto'"),
        ({"learning_rate": 0.1}, "learning_rate is 0.1; allowed"),
        ({"eta0": 0.1}, "eta0 is no option of learning_rate='auto'"),
        ({"learning_rate": "constant", "power_t": 0.5}, "power_t is no option of learning_rate='constant'"),
        ({"learning_rate": InverseScaling(0.1), "eta0": 0.5}, "eta0 is no option"),
        ({"learning_rate": "constant", "eta0": 0.0}, "eta0 is 0.0; allowed are finite numbers above zero"),
        ({"learning_rate": "constant", "eta0": "fast"}, "eta0 is 'fast'; allowed are finite numbers above zero"),
        ({"learning_rate": "invscaling", "power_t": "slow"}, "power_t is 'slow'"),
        ({"learning_rate": "invscaling", "power_t": -1.0}, "power_t is -1.0; allowed are numbers from 0 on"),
        ({"validation_fraction": 0.1}, "validation_fraction is for early_stopping=True"),
        ({"update": "newton"}, "update is 'newton'"),
        ({"scale": "minmax"}, "scale is 'minmax'"),
    ],
)
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_every_option_acts_or_is_refused_by_name(options, words, method):
    x, y = make_rows(30)
    with pytest.raises(UsageError) as error:
        getattr(SGDRegressor(**options), method)(x, y)
    assert words in str(error.value)


def test_options_of_fit_alone_are_refused_there():
    x, y = make_rows(30)
    for share in (0.0, 1.0, "half"):
        with pytest.raises(UsageError, match="validation_fraction is"):
            SGDRegressor(early_stopping=True, validation_fraction=share).fit(x, y)
    with pytest.raises(UsageError, match="of 3 rows, validation_fraction=1e-09 holds out 0"):
        SGDRegressor(early_stopping=True, validation_fraction=1e-9, random_state=0).fit(x[:3], y[:3])
    with pytest.raises(ValueError, match="cannot be used to seed"):
        SGDRegressor(random_state="today").fit(x, y)


# fit


def test_a_seed_gives_the_same_bits_and_another_seed_others():
    x, y = make_rows(3000)
    first, again, other = (SGDRegressor(random_state=seed, max_iter=2).fit(x, y) for seed in (1, 1, 2))
    assert first.coef_.tobytes() == again.coef_.tobytes() != other.coef_.tobytes()
    drawn = [SGDRegressor(random_state=np.random.RandomState(3), max_iter=2).fit(x, y) for _ in range(2)]
    assert drawn[0].coef_.tobytes() == drawn[1].coef_.tobytes()


@pytest.mark.parametrize("batch_size", [256, 1])
def test_stored_rows_give_the_bits_of_rows_in_memory_and_are_never_loaded(tmp_path, monkeypatch, batch_size):
    x, y = make_rows(45_000)  # more than one stretch
    w = np.random.default_rng(1).uniform(0.5, 2, len(x))
    group = zarr.open_group(tmp_path / "s.zarr", mode="w")
    names = (("X", x, (700, 4)), ("y", y, (900,)), ("w", w, (5000,)))
    stored = [group.create_array(name, data=data, chunks=chunks) for name, data, chunks in names]
    lazy = [da.from_array(x, chunks=(3333, 3)), da.from_array(y, chunks=1000), da.from_array(w, chunks=7000)]
    model = SGDRegressor(random_state=0, max_iter=2, batch_size=batch_size)
    flowed = clone(model).partial_fit(x, y, w)
    monkeypatch.setattr(zarr.Array, "__getitem__", lambda *_: pytest.fail("a zarr array was loaded"))
    monkeypatch.setattr(da.Array, "__array__", lambda *_, **__: pytest.fail("a Dask array was loaded"))
    for arrays in (stored, lazy):
        assert gap(clone(model).fit(*arrays), x, y, w) < 2e-3
        assert clone(model).partial_fit(*arrays).coef_.tobytes() == flowed.coef_.tobytes()
    unshuffled = clone(model).set_params(shuffle=False)
    assert unshuffled.fit(*stored).coef_.tobytes() == clone(unshuffled).fit(x, y, w).coef_.tobytes()


def test_one_chunk_grid_gives_the_same_shuffled_bits(tmp_path):
    x, y = make_rows(5000)
    stored = zarr.create_array(tmp_path / "x.zarr", data=x, chunks=x.shape), zarr.create_array(tmp_path / "y.zarr", data=y)
    models = [SGDRegressor(random_state=0, max_iter=2).fit(*pair) for pair in ((x, y), stored)]
    assert models[0].coef_.tobytes() == models[1].coef_.tobytes()


def test_early_stopping_of_fit_holds_rows_out_and_says_why():
    x, y = make_rows(5000)
    model = SGDRegressor(early_stopping=True, max_iter=50, n_iter_no_change=2, tol=0.01, random_state=0).fit(x, y)
    assert model.n_iter_ < 50
    rate = model.history_[-1].learning_rate
    assert model.stopped_ == (
        f"the validation cost has not improved by more than 0.01 of itself for 2 epochs (learning rate {rate:.2g})"
    )
    assert model.history_[-1].validation is not None
    assert 300 < model.history_[-1].validation.n < 700
    never = SGDRegressor(tol=None, max_iter=12, random_state=0).fit(x, y)
    assert never.n_iter_ == len(never.history_) == 12


def test_a_warm_start_goes_on_from_the_coefficients_and_a_cold_one_does_not():
    x, y = make_rows(2000)
    model = SGDRegressor(warm_start=True, learning_rate=Constant(1e-4), average=False, max_iter=1, random_state=0)
    costs = [model.fit(x, y).history_[0].cost.mse for _ in range(4)]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 4
    assert model.t_ == 4 * 8
    cold = clone(model).set_params(warm_start=False)
    assert len({cold.fit(x, y).history_[0].cost.mse for _ in range(2)}) == 1
    with pytest.raises(UsageError, match="the rows have 3 features and 1 targets, and the coefficients to go on from 4 and 1"):
        model.fit(x[:, :3], y)


def test_a_stream_goes_on_from_a_fit():
    x, y = make_rows(5000)
    model = SGDRegressor(random_state=0).fit(x, y)
    steps, before = model.t_, gap(model, x, y)
    model.partial_fit(x[:256], y[:256])
    assert model.t_ == steps + 1
    assert gap(model, x, y) < before + 1e-3
    assert gap(SGDRegressor().partial_fit(x[:256], y[:256]), x, y) > 5e-3


# streams


@settings(max_examples=12)
@given(st.data())
def test_how_a_stream_is_cut_into_whole_batches_does_not_show(data):
    size = data.draw(st.sampled_from([16, 100, 256]))
    batches = data.draw(st.integers(2, 40))
    x, y = make_rows(size * batches, k=data.draw(st.sampled_from([1, 2])))
    weights = data.draw(st.sampled_from([None, np.random.default_rng(2).uniform(0, 2, len(x))]))
    options = {"batch_size": size, "update": data.draw(st.sampled_from(["plain", "nesterov", "adam"]))}
    options |= {"average": data.draw(st.booleans()), "alpha": data.draw(st.sampled_from([0.0, 0.1]))}
    edges = [size * cut for cut in data.draw(cuts(batches))]
    cut, whole = (streamed(SGDRegressor(**options), x, y, one, weights) for one in (edges, [0, len(x)]))
    assert cut.coef_.tobytes() == whole.coef_.tobytes()
    assert np.asarray(cut.intercept_).tobytes() == np.asarray(whole.intercept_).tobytes()
    assert cut.t_ == whole.t_ == batches
    assert np.allclose(cut.model_.cost.mse, whole.model_.cost.mse, rtol=1e-12)


def test_a_long_stream_has_the_same_bits_across_the_end_of_the_sample_and_of_windows():
    x, y = make_rows(45_000)
    whole = SGDRegressor(early_stopping=True).partial_fit(x, y)
    pieces = streamed(SGDRegressor(early_stopping=True), x, y, [*range(0, 45_000, 2560), 45_000])
    assert whole.coef_.tobytes() == pieces.coef_.tobytes()
    assert len(whole.history_) == len(pieces.history_) == 3
    assert [record.rows for record in whole.history_] == [WINDOW_ROWS, 2 * WINDOW_ROWS, 4 * WINDOW_ROWS]


@pytest.mark.parametrize("batch_size", [256, 32, 1])
@pytest.mark.parametrize("chunk", [4096, 1000])
def test_one_reading_of_real_rows_comes_near_the_optimum(batch_size, chunk):
    x, y = diamonds()
    model = streamed(SGDRegressor(batch_size=batch_size), x, y, [*range(0, len(x), chunk), len(x)])
    assert gap(model, x, y) < 1e-3


@pytest.mark.parametrize("options", [{"scale": "standard"}, {"update": "momentum"}, {"fit_intercept": False}, {"scale": "whiten"}])
def test_variants_come_near_as_well(options):
    x, y = make_rows(60_000)
    model = streamed(SGDRegressor(**options), x, y, [*range(0, 60_000, 3000), 60_000])
    intercept = {"fit_intercept": options.get("fit_intercept", True)}
    assert gap(model, x, y, **intercept) < 1e-3


def test_several_targets_and_weights_have_their_optimum():
    x, y = make_rows(40_000, k=2)
    w = np.random.default_rng(3).exponential(size=len(x)) * (x[:, 0] > 99.5)
    model = streamed(SGDRegressor(), x, y, range(0, 40_001, 2000), w)
    assert model.coef_.shape == (2, 4)
    for j in range(2):
        one = LinearRegression().fit(x, y[:, j], w)
        ours, least = (w @ (y[:, j] - p) ** 2 for p in (model.predict(x)[:, j], one.predict(x)))
        assert ours / least - 1 < 2e-3


def test_rows_of_no_weight_say_nothing_and_missing_weights_are_ones():
    x, y = make_rows(3000)
    w = np.ones(3000)
    mixed = SGDRegressor().partial_fit(x[:1024], y[:1024]).partial_fit(x[1024:], y[1024:], w[1024:])
    assert mixed.coef_.tobytes() == SGDRegressor().partial_fit(x, y).coef_.tobytes()
    wild, zero = np.where(np.arange(3000) % 2, 1e6, y), (np.arange(3000) % 2 == 0).astype(float)
    tame, spoilt = (SGDRegressor(scale=None).partial_fit(x, target, zero) for target in (y, wild))
    assert tame.coef_.tobytes() == spoilt.coef_.tobytes()


@pytest.mark.parametrize(
    "x",
    [
        np.array([[3.0]]),
        np.full((600, 1), 7.0),
        1e9 + make_rows(3000, 1)[0],
        np.column_stack([np.full(600, 1e9), np.arange(600.0)]),
    ],
    ids=["one row", "constant", "far", "constant and far"],
)
@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"scale": "standard"}, {"update": "adam"}], ids=str)
@pytest.mark.parametrize("size", [1000, 7])
def test_awkward_columns_do_not_diverge(x, options, size):
    y = 2 * (x[:, -1] - x[0, -1]) + 3
    model = SGDRegressor(**options)
    for _ in range(3):
        streamed(model, x, y, [*range(0, len(x), size), len(x)])
    far = 2.0 if options.get("update") == "adam" else 0.1  # whose steps have a size of their own: few of them do not lead far
    assert np.mean((model.predict(x) - y) ** 2) <= 5 * far * np.var(y) + 1e-12
    fitted = SGDRegressor(random_state=0, **options).fit(x, y)
    assert np.mean((fitted.predict(x) - y) ** 2) <= far * np.var(y) + 1e-12


# coordinates


@settings(max_examples=40)
@given(st.data())
def test_a_change_of_coordinates_changes_no_model(data):
    p, k, rng = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2)), np.random.default_rng(data.draw(st.integers(0, 999)))
    intercept, rule = data.draw(st.booleans()), data.draw(st.sampled_from(["plain", "momentum", "nesterov", "adam"]))
    scale = data.draw(st.sampled_from(["standard", "whiten", None]))
    walks = []
    for _ in range(2):
        offsets, sizes = rng.choice([0.0, 1e3, -1e6], p + k), 10.0 ** rng.integers(-3, 4, p + k)
        sample = np.column_stack([rng.normal(size=(40, p + k)) * sizes + offsets, np.ones(40)])
        options = Descent(update=rule, scale=scale)
        facts = {"n_features": p, "n_targets": k, "weighted": True, "fit_intercept": intercept, "ridge": 0.0, "n_rows": SAMPLE_ROWS}
        walks.append(walk_of(sample, options, **facts))
    old, new = walks
    start = old.start()
    b = rng.normal(size=start.b.shape)
    here = start._replace(b=b, average=start.average._replace(b=2 * b, rows=5.0))
    there = carried(here, old, new)
    x = rng.normal(size=(9, p)) * old.objective.coordinates.scale + old.objective.coordinates.mean
    for one, other in ((here.b, there.b), (here.average.b, there.average.b)):
        a, z = predictions_of(old, one, x), predictions_of(new, other, x)
        size = max(predictions_of(walk, b, x, size=True).max() for walk, b in ((old, one), (new, other)))
        assert np.abs(a - z).max() <= 1e-13 * size
    assert there.average.rows == 5.0


def predictions_of(walk, b, x, *, size=False):
    c = walk.objective.coordinates
    z, mean = (x - c.mean) / c.scale, c.target_mean
    if size:  # of what is added up, and so of the rounding
        z, mean, b = (np.abs(x) + np.abs(c.mean)) / c.scale, np.abs(mean), np.abs(b)
    return mean + c.target_scale * (z @ b[: c.n_features] + (b[-1] if c.intercept else 0.0))


def test_a_velocity_is_carried_as_a_difference_of_coefficients():
    rng = np.random.default_rng(0)
    facts = {"n_features": 3, "n_targets": 2, "weighted": True, "fit_intercept": True, "ridge": 0.0, "n_rows": 100}
    samples = [np.column_stack([rng.normal(size=(50, 5)) * size + 3, np.ones(50)]) for size in (1.0, [2.0, 0.1, 9.0, 4.0, 0.5])]
    old, new = (walk_of(sample, Descent(update="momentum", scale="whiten"), **facts) for sample in samples)
    start = old.start()
    velocity = rng.normal(size=start.b.shape)
    here = start._replace(memory=start.memory._replace(velocity=velocity))
    ahead = here._replace(b=here.b + old.transform @ velocity)
    moved, led = carried(here, old, new), carried(ahead, old, new)
    assert np.allclose(moved.b + new.transform @ moved.memory.velocity, led.b, rtol=1e-10)


def test_coordinates_are_made_anew_only_when_the_rows_have_doubled(monkeypatch):
    x, y = make_rows(40_000)
    made = []
    monkeypatch.setattr(
        "streamlr.descent.online.walk_of", lambda sample, *a, **k: made.append(len(sample)) or walk_of(sample, *a, **k)
    )
    model = streamed(SGDRegressor(), x, y, range(0, 40_001, 100))
    assert made == [100 * 2**i for i in range(9)] + [32_800]
    assert not model._standing[2].sample
    assert len(pickle.dumps(model)) < 20_000


# contracts


@pytest.mark.parametrize("started", ["new", "fitted", "short stream", "long stream"])
def test_after_any_error_the_estimator_is_as_it_was(started, tmp_path):
    x, y = make_rows(40_000)
    model = SGDRegressor(learning_rate=Constant(0.001), random_state=0, max_iter=1)
    if started == "fitted":
        model.fit(x[:1000], y[:1000])
    elif started != "new":
        model.partial_fit(x, y) if started == "long stream" else model.partial_fit(x[:700], y[:700])
    late = x[:20_000].copy()
    late[-1, 2] = np.nan
    stored = zarr.create_array(tmp_path / "x.zarr", data=late, chunks=(1000, 4))
    bad = [
        (late, y[:20_000], None, ValueError),
        (stored, y[:20_000], None, DataError),
        (da.from_array(late, chunks=(1000, 4)), y[:20_000], None, DataError),
        (x[:0], y[:0], None, ValueError),
        (x[:5], y[:4], None, ValueError),
        (x[:5], y[:5], -np.ones(5), ValueError),
        (x[:5], y[:5], np.full(5, np.nan), ValueError),
        (x[:5].astype(str), np.array(list("abcde")), None, ValueError),
    ]
    if "stream" in started:
        bad += [(x[:512] * 1e200, y[:512] * 1e300, None, ArithmeticError)]
    if started != "new":
        bad += [(x[:5, :3], y[:5], None, ValueError), (da.from_array(x[:5, :3]), da.from_array(y[:5]), None, ValueError)]
        bad += [(x[:5], np.column_stack([y[:5], y[:5]]), None, ValueError)]
    before = pickle.dumps(model.__dict__)
    for rows, targets, weights, kind in bad:
        with np.errstate(all="ignore"), pytest.raises(kind):
            model.partial_fit(rows, targets, weights)
        assert pickle.dumps(model.__dict__) == before
    if started == "fitted":
        with pytest.raises(ValueError, match="NaN"):
            model.fit(late, y[:20_000])
        assert pickle.dumps(model.__dict__) == before


def test_an_interrupt_leaves_the_estimator_as_it_was(monkeypatch):
    x, y = make_rows(20_000)
    model = SGDRegressor().partial_fit(x[:300], y[:300])
    before, calls = pickle.dumps(model.__dict__), []
    original = Online._learned

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(Online, "_learned", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.partial_fit(x, y)
    assert pickle.dumps(model.__dict__) == before


def test_a_rate_that_is_too_high_diverges_by_name():
    x, y = make_rows(5000)
    with pytest.raises(Diverged, match="choose a lower one"):
        SGDRegressor(learning_rate="constant", eta0=5.0).partial_fit(x, y)


def test_a_stream_survives_pickling_and_a_clone_starts_anew():
    x, y = make_rows(3000)
    model = SGDRegressor(update="nesterov").partial_fit(x[:1000], y[:1000])
    twins = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    for twin in twins:
        assert (
            twin.partial_fit(x[1000:], y[1000:]).coef_.tobytes()
            == copy.deepcopy(model).partial_fit(x[1000:], y[1000:]).coef_.tobytes()
        )
    assert not hasattr(clone(model), "coef_")


def test_inputs_are_not_changed_and_not_kept():
    x, y = make_rows(600)
    kept = x.copy(), y.copy()
    model, other = SGDRegressor().partial_fit(x, y), SGDRegressor().partial_fit(x, y)
    assert (x == kept[0]).all()
    assert (y == kept[1]).all()
    x[:], y[:] = 0.0, 0.0
    assert model.partial_fit(*kept).coef_.tobytes() == other.partial_fit(*kept).coef_.tobytes()


def test_early_stopping_of_a_stream_stops_and_says_why():
    x, y = make_rows(20 * WINDOW_ROWS)
    model = SGDRegressor(early_stopping=True, n_iter_no_change=3, tol=0.01, batch_size=256)
    learned, stopped_at = None, None
    for a in range(0, len(x), WINDOW_ROWS):
        model.partial_fit(x[a : a + WINDOW_ROWS], y[a : a + WINDOW_ROWS])
        if model.stopped_ and stopped_at is None:
            learned, stopped_at = model.coef_.tobytes(), a // WINDOW_ROWS
        elif model.stopped_:
            assert model.coef_.tobytes() == learned
    assert stopped_at is not None
    assert 3 <= stopped_at <= 8
    assert "has not improved by more than 0.01 of itself for 3 windows of 8,192 rows" in model.stopped_
    assert model.model_.n_rows == (stopped_at + 1) * WINDOW_ROWS
    with pytest.raises(ValueError, match="NaN"):
        model.partial_fit(x[:5] * np.nan, y[:5])
    whole = SGDRegressor(early_stopping=True, n_iter_no_change=3, tol=0.01).partial_fit(x, y)
    assert whole.coef_.tobytes() == learned
    unending = streamed(SGDRegressor(), x, y, range(0, len(x) + 1, WINDOW_ROWS))
    assert not unending.stopped_


def test_a_cost_that_goes_on_falling_is_not_stopped():
    x, _ = make_rows(20 * WINDOW_ROWS)
    y = x.sum(axis=1)
    model = SGDRegressor(early_stopping=True, n_iter_no_change=2, tol=1e-9, learning_rate=Constant(1e-3))
    assert not streamed(model, x, y, range(0, len(x) + 1, WINDOW_ROWS)).stopped_


def test_options_cannot_change_in_mid_stream_unnoticed():
    x, y = make_rows(600)
    model = SGDRegressor().partial_fit(x, y)
    with pytest.raises(UsageError, match="options were changed in mid-stream"):
        model.set_params(alpha=1.0).partial_fit(x, y)
    model.fit(x, y).partial_fit(x, y)


def test_the_cost_of_a_stream_is_that_of_rows_before_they_were_learned_from():
    x, y = make_rows(512, 1)
    model = SGDRegressor().partial_fit(x[:256], y[:256])
    first = model.model_.cost
    assert first.mse == pytest.approx(np.var(y[:256]), rel=1e-12)
    met = y[256:] - model.predict(x[256:])
    model.partial_fit(x[256:], y[256:])
    assert model.model_.cost.mse == pytest.approx((first.mse + np.mean(met**2)) / 2, rel=1e-10)
    assert model.model_.cost.mae == pytest.approx((first.mae + np.abs(met).mean()) / 2, rel=1e-10)
    assert model.model_.n_rows == 512


def test_it_works_where_scikit_learn_users_put_it():
    x, y = make_rows(2000)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), SGDRegressor(random_state=0)), {"sgdregressor__alpha": [0.0, 100.0]}, cv=3
    )
    assert search.fit(x, y).best_params_ == {"sgdregressor__alpha": 0.0}
    assert cross_val_score(SGDRegressor(random_state=0), x, y, cv=3, n_jobs=2).min() > 0.1
    frame = pd.DataFrame(x, columns=list("abcd"))
    model = SGDRegressor().partial_fit(frame, y)
    assert list(model.feature_names_in_) == list("abcd") == list(model.model_.feature_names)
    with pytest.raises(ValueError, match="feature names"):
        model.partial_fit(frame[list("badc")], y)
    column = SGDRegressor().partial_fit(x, y[:, None])
    assert column.coef_.shape == (1, 4)
    assert column.predict(x[:3]).shape == (3, 1)


@pytest.mark.parametrize("rows", [1, 10, 100])
def test_calls_with_few_rows_teach_as_much_as_calls_with_many(rows):
    x, y = make_rows(6_000)
    assert gap(streamed(SGDRegressor(), x, y, range(0, 6_001, rows)), x, y) < 0.02


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tol": None, "n_iter_no_change": 7}, "n_iter_no_change is 7"),
        ({"random_state": "x"}, "x"),
        ({"early_stopping": True, "validation_fraction": 2.0}, "validation_fraction is 2.0"),
    ],
)
def test_an_option_that_would_not_act_is_refused_by_both(options, says):
    x, y = make_rows(100)
    for method in ("fit", "partial_fit"):
        with pytest.raises(ValueError, match=says):
            getattr(SGDRegressor(**options), method)(x, y)


def test_a_batch_size_changed_in_mid_stream_is_refused_also_where_calls_have_fewer_rows():
    x, y = make_rows(100)
    model = SGDRegressor(batch_size=64).partial_fit(x[:10], y[:10])
    model.batch_size = 32
    with pytest.raises(UsageError, match="changed in mid-stream"):
        model.partial_fit(x[10:20], y[10:20])
