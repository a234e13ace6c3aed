"""The normal equations: exact least squares, with or without full rank, against rational arithmetic."""

from __future__ import annotations

import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import EPS, Array, ExactFit, digits_of, exact_solve, fractions_of, moments_of, same_bits
from threadpoolctl import threadpool_limits

import streamlr
from streamlr.aggregates.moments import MomentsOf
from streamlr.direct.normal import solve_bytes, solve_normal
from streamlr.errors import NoRows, NumericalError, RankDeficient, RankWarning, UsageError


def fit(x: Array, y: Array, weights: Array | None = None, **options: Any) -> streamlr.FittedModel:
    return streamlr.fit(streamlr.Dataset(x, y, weights), **options)


def deficient(x: Array, y: Array, **options: Any) -> streamlr.FittedModel:
    with pytest.warns(RankWarning):
        return fit(x, y, **options)


def integers(seed: int, *shape: int) -> Array:
    """Small integers: sums and multiples of such columns are exact, so that what depends on others depends exactly."""
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(np.float64)


def least_norm(independent: Array, combination: Array, y: Array, *, fit_intercept: bool = True) -> list[Fraction]:
    """The b of least norm among all that fit y by [X, X A], in rational arithmetic: B'(BB')^-1 c with B = [I, A], c of X alone."""
    c = ExactFit(independent, y, fit_intercept=fit_intercept).coef
    r = independent.shape[1]
    b = [[Fraction(int(i == j)) for j in range(r)] + row for i, row in enumerate(fractions_of(combination))]
    gram = [[sum(u * v for u, v in zip(b[i], b[j], strict=True)) for j in range(r)] for i in range(r)]
    t = exact_solve(gram, c)
    return [sum(b[i][j] * t[i][0] for i in range(r)) for j in range(len(b[0]))]


# --- full rank -------------------------------------------------------------------------------------


@given(st.data())
def test_the_exact_fit_is_the_exact_fit(data: st.DataObject):
    p, k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    fit_intercept = data.draw(st.booleans())
    n = data.draw(st.integers(p + 2, 14))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((n, p)) + data.draw(st.sampled_from([0.0, 3.0]))
    y = rng.standard_normal((n, k))
    weights = rng.integers(0, 4, n).astype(np.float64) if data.draw(st.booleans()) else None
    assume(weights is None or np.count_nonzero(weights) > p + 1)
    ridge = data.draw(st.sampled_from([0.0, 0.25, 1e-3, 100.0]))
    model = fit(x, y, weights, fit_intercept=fit_intercept, ridge=ridge)
    exact = ExactFit(x, y, weights, fit_intercept=fit_intercept, ridge=Fraction(ridge))
    # the normal equations square the condition number; 16 digits less that, less one and a half for the rounding of the moments.
    # A coefficient near 0 beside the others is known to the digits of the largest: all are of one unit here
    floor = 10 ** -(14.5 - 2 * np.log10(model.condition))
    largest = max(abs(float(value)) for row in exact.coef for value in row)
    difference = np.array(
        [
            [float(Fraction(float(g)) - e) for g, e in zip(gr, er, strict=True)]
            for gr, er in zip(model.coef_matrix, exact.coef, strict=True)
        ]
    )
    assert np.abs(difference).max() <= floor * largest
    if ridge == 0 and exact.df > 0:
        assert model.df_resid == exact.df
        rss = np.array([float(value) for value in exact.rss])
        allowed = floor + 1e-15 * np.square(y).sum() / rss.min()  # moments hold squares, so residuals to the digits of y'y
        assert model.std_err.reshape(p, k) == pytest.approx(exact.std_err(), rel=10 * allowed)
        if fit_intercept:
            assert np.atleast_1d(model.intercept_std_err) == pytest.approx(exact.intercept_std_err(), rel=10 * allowed)
    elif ridge > 0:
        assert np.isnan(model.std_err).all()
        assert np.isnan(model.intercept_std_err).all()


def test_small_integers_come_out_exact():
    x = integers(11, 8, 2)  # eight rows: their means, and so their moments, round nothing
    model = fit(x, 3 * x[:, 0] - 2 * x[:, 1] + 5)
    assert (model.coef.tolist(), model.intercept) == ([3.0, -2.0], 5.0)
    line = fit(np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 5.0]))
    assert (line.coef.tolist(), line.intercept) == ([2.0], 1.0)


def test_the_intercept_of_columns_far_from_zero_keeps_what_their_means_have():
    # the means are no floats (sevenths beside 1e8) and cancel: an intercept from rounded means would be wrong by 1e-8
    exact = 0
    for seed in range(60):
        x = integers(seed, 7, 2) + 1e8
        model = fit(x, x[:, 0] - x[:, 1] + 5)
        if model.coef.tolist() == [1.0, -1.0]:  # else the last bit of a coefficient is as much as the means would lose
            exact += 1
            assert model.intercept == pytest.approx(5.0, rel=1e-14)
    assert exact >= 5


def test_ridge_is_on_the_columns_as_given_and_spares_the_intercept():
    # by hand: x = (-1, 0, 1), y = 10 + (-2, 0, 2): S_xx = 2, S_xy = 4, W = 3, so b = 4 / (2 + 3 ridge)
    model = fit(np.array([-1.0, 0.0, 1.0]), np.array([8.0, 10.0, 12.0]), ridge=2.0)
    assert model.coef[0] == pytest.approx(0.5, rel=1e-15)
    assert model.intercept == pytest.approx(10.0, rel=1e-15)


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e150, 1e-150])
def test_ridge_in_units_beyond_the_range_of_squares(scale: float):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((10, 2)) * [scale, 1.0], rng.standard_normal(10)
    exact = ExactFit(x, y, ridge=Fraction(0.5))
    model = fit(x, y, ridge=0.5)
    # with scale 1e-200 the first coefficient is about 1e-200 itself; with 1e200 the penalty vanishes
    assert digits_of(model.coef, exact.coef) >= 14
    assert digits_of([model.intercept], exact.intercept) >= 13.5  # it is small beside the means it is made of


def test_ridge_decides_where_the_columns_do_not():
    x = integers(1, 12, 2)
    x, y = np.column_stack([x, x[:, 0], np.ones(12)]), integers(2, 12)
    model = fit(x, y, ridge=0.5, solver=streamlr.Direct(rank="error"))  # no warning and no error: the minimiser is unique
    assert (dict(model.aliased), model.rank, model.coef[3]) == ({}, 4, 0.0)
    assert digits_of(model.coef[:3], ExactFit(x[:, :3], y, ridge=Fraction(0.5)).coef) >= 14


def test_a_vanishing_ridge_tends_to_the_least_norm():
    x = integers(1, 12, 2)
    x, y = np.column_stack([x, x[:, 0]]), integers(2, 12)
    tiny, none = deficient(x, y, ridge=1e-25), deficient(x, y)
    assert tiny.coef == pytest.approx(none.coef, rel=1e-13)


@given(st.integers(0, 1000), st.lists(st.integers(-400, 400), min_size=4, max_size=4))
def test_a_power_of_two_scales_a_coefficient_exactly(seed: int, exponents: list[int]):
    rng = np.random.default_rng(seed)
    columns = rng.standard_normal((15, 4))
    scale = np.ldexp(1.0, exponents)
    plain = fit(columns[:, :3], columns[:, 3])
    assume(max(exponents) - min(exponents) < 600)
    scaled = fit(columns[:, :3] * scale[:3], columns[:, 3] * scale[3])
    assert (scaled.coef == plain.coef * (scale[3] / scale[:3])).all()
    assert scaled.intercept == plain.intercept * scale[3]
    assert (scaled.std_err == plain.std_err * (scale[3] / scale[:3])).all()
    assert (scaled.rank, scaled.condition, scaled.cost.r2) == (plain.rank, plain.condition, plain.cost.r2)


@pytest.mark.parametrize("scale", [1e150, 1e-150, 1e200, 1e-200])
@pytest.mark.parametrize("column", ["feature", "target"])
def test_columns_in_units_beyond_the_range_of_squares(scale: float, column: str):
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((20, 2)), rng.standard_normal(20)
    if column == "feature":
        x[:, 0] *= scale
    else:
        y *= scale
    model, exact = fit(x, y), ExactFit(x, y)
    # the columns are random, so that the condition is about 1: 14 digits of 16 for everything
    assert digits_of(model.coef, exact.coef) >= 14
    assert digits_of([model.intercept], exact.intercept) >= 13.5
    assert digits_of([model.cost.r2], [1 - exact.rss[0] / ExactFit(x[:, :0], y).rss[0]]) >= 13.5
    # std_err**2 may be beyond float64 in the oracle too, so its root is taken of a number near 1
    for got, d, unit in ((model.std_err[0], exact.inverse_diagonal[1], scale if column == "target" else 1 / scale),):
        ratio = exact.rss[0] / exact.df * d / Fraction(unit) ** 2
        assert got / unit == pytest.approx(float(ratio) ** 0.5, rel=1e-13)


def test_a_coefficient_beyond_float64_is_an_error():
    rng = np.random.default_rng(3)
    with pytest.raises(NumericalError, match="larger unit"):
        fit(rng.standard_normal(20) * 1e-200, rng.standard_normal(20) * 1e200)


# --- LAPACK's ratio: ||X'r|| / (||X|| ||r|| eps n), as in TESTING/LIN/ddrvls.f, whose bound is 30 --


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("p", [1, 2, 3, 5, 10, 50])
@pytest.mark.parametrize("exponent", [0, 960, -960], ids=["normal", "near overflow", "near underflow"])
@pytest.mark.parametrize("kind", ["full", "deficient"])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_residuals_are_orthogonal_to_the_columns(k: int, p: int, exponent: int, kind: str, fit_intercept: bool):
    rng = np.random.default_rng(p * 10 + k)
    n = 2 * p + 3
    x, y = rng.standard_normal((n, p)), rng.standard_normal((n, k))
    if kind == "deficient":
        rank = max(p - max(p // 3, 1), 1)
        x[:, rank:] = x[:, :rank] @ rng.standard_normal((rank, p - rank))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if kind == "deficient" else "error", RankWarning)
        model = fit(np.ldexp(x, exponent), np.ldexp(y, exponent), fit_intercept=fit_intercept)
    residuals = y - x @ model.coef_matrix - np.ldexp(model.intercept_vector, -exponent)
    assert model.rank == (p if kind == "full" else min(rank, p))
    ratio = np.linalg.norm(x.T @ residuals, 1) / (np.linalg.norm(x, 1) * np.linalg.norm(residuals, 1) * EPS * n)
    assert ratio < 30
    if fit_intercept:
        assert np.abs(residuals.mean(axis=0)).max() <= 30 * EPS * np.abs(y).max() * model.condition


# --- short rank ------------------------------------------------------------------------------------


def test_a_duplicate_shares_the_coefficient():
    x = integers(1, 12, 2)
    y = integers(2, 12)
    model = deficient(np.column_stack([x, x[:, 0]]), y)
    exact = ExactFit(x, y)
    assert digits_of(model.coef, [exact.coef[0][0] / 2, exact.coef[1][0], exact.coef[0][0] / 2]) >= 14
    assert (model.rank, model.route, list(model.aliased)) == (2, "eigen", ["x2"])
    assert model.aliased["x2"] == pytest.approx({"x0": 1.0}, rel=1e-14)
    # what is not part of the dependence keeps its standard error, with the degrees of freedom of the rank
    assert model.df_resid == 12 - 2 - 1
    assert np.isnan(model.std_err).tolist() == [True, False, True]
    assert model.std_err[1] == pytest.approx(exact.std_err()[1, 0], rel=1e-13)


@pytest.mark.parametrize("factor", [1e-6, 1e3, 1e6, 1e9, 2.0**40])
def test_a_badly_scaled_duplicate_shares_in_the_users_units(factor: float):
    x, y = np.round(integers(3, 15, 2) * 1000), integers(4, 15)  # times 1e-6 rounds, so the oracle is told what float64 holds
    scaled = x[:, 0] * factor
    model = deficient(np.column_stack([x, scaled]), y)
    exact = least_norm(x, np.array([[factor], [0.0]]), y)
    assert digits_of(model.coef, exact) >= 13.5
    assert model.aliased == {"x2": pytest.approx({"x0": factor}, rel=1e-14)}


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [2.0, -1.0], [1000.0, 1.0], [0.0, 3.0]])
def test_a_sum_of_others_is_named_and_shared(fit_intercept: bool, weights: list[float]):
    x, y = integers(5, 20, 2), integers(6, 20)
    c = x @ weights
    model = deficient(np.column_stack([x, c]), y, fit_intercept=fit_intercept)
    assert model.rank == 2
    assert model.aliased == {"x2": pytest.approx({f"x{j}": w for j, w in enumerate(weights) if w}, rel=1e-12)}
    exact = least_norm(x, np.array(weights)[:, None], y, fit_intercept=fit_intercept)
    assert np.abs(model.coef - [float(value) for value in exact]).max() <= 1e-13 * max(abs(float(value)) for value in exact)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0, 1, 2], [2, 3, 1, 0], [1, 0, 3, 2]])
def test_the_later_column_is_the_one_that_is_named(order: list[int]):
    x = integers(7, 20, 3)
    columns = np.column_stack([x, x[:, 0] + x[:, 1]])[:, order]
    model = deficient(columns, integers(8, 20))
    # of 0, 1 and 3, which depend on each other, the one that stands last
    last = max(order.index(j) for j in (0, 1, 3))
    assert list(model.aliased) == [f"x{last}"]
    combination = model.aliased[f"x{last}"]
    assert set(combination) == {f"x{order.index(j)}" for j in (0, 1, 3)} - {f"x{last}"}
    rebuilt = sum(value * columns[:, int(name[1:])] for name, value in combination.items())
    assert rebuilt == pytest.approx(columns[:, last], abs=1e-12)


@pytest.mark.parametrize("value", [0.1, 1e9, 1e9 + 0.1, 0.0, 1e-200, 1e200])
@pytest.mark.parametrize("rows", [5, 3000])
def test_a_constant_column_gets_nothing(value: float, rows: int):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((rows, 2)), rng.standard_normal(rows)
    with_constant = np.column_stack([x[:, 0], np.full(rows, value), x[:, 1]])
    model, plain = deficient(with_constant, y), fit(x, y)
    assert (model.rank, model.route, dict(model.aliased)) == (2, "cholesky", {"x1": {}})
    assert model.coef[1] == 0.0
    assert np.isnan(model.std_err[1])
    # to rounding: a product of other width may take another path
    assert model.coef[[0, 2]] == pytest.approx(plain.coef, rel=1e-13)
    assert model.std_err[[0, 2]] == pytest.approx(plain.std_err, rel=1e-13)
    assert model.intercept == pytest.approx(plain.intercept, rel=1e-13)


def test_without_an_intercept_only_zeros_are_constant():
    x = np.column_stack([np.full(6, 0.1), np.arange(6.0), np.zeros(6)])
    y = integers(9, 6)
    model = deficient(x, y, fit_intercept=False)
    assert dict(model.aliased) == {"x2": {}}
    assert model.intercept == 0.0
    assert np.isnan(model.intercept_std_err)
    assert digits_of(model.coef[:2], ExactFit(x[:, :2], y, fit_intercept=False).coef) >= 13


@pytest.mark.parametrize(("n", "p"), [(2, 2), (3, 5), (5, 40), (4, 4)])
def test_fewer_rows_than_columns_have_a_solution_of_least_norm(n: int, p: int):
    rng = np.random.default_rng(n)
    x, y = rng.standard_normal((n, p)), rng.standard_normal(n)
    model = deficient(x, y)
    centred = x - x.mean(axis=0)
    assert model.rank == n - 1
    assert model.coef == pytest.approx(np.linalg.pinv(centred, rcond=1e-10) @ (y - y.mean()), rel=1e-11)
    assert model.predict(x) == pytest.approx(y, abs=1e-13)
    assert (model.df_resid, model.cost.r2) == (0, pytest.approx(1.0, abs=1e-14))
    assert np.isnan(model.std_err).all()


def test_one_row_has_a_mean_and_nothing_more():
    model = deficient(np.array([[3.0, 4.0]]), np.array([7.0]))
    assert (model.coef.tolist(), model.intercept, model.rank, model.df_resid) == ([0.0, 0.0], 7.0, 0, 0)
    assert dict(model.aliased) == {"x0": {}, "x1": {}}
    assert (model.cost.mse, model.cost.r2) == (0.0, 1.0)
    through_zero = deficient(np.array([[3.0, 4.0]]), np.array([7.0]), fit_intercept=False)
    assert through_zero.coef == pytest.approx([7 * 3 / 25, 7 * 4 / 25], rel=1e-15)


def test_rows_without_weight_do_not_count():
    x, y = integers(1, 8, 2), integers(2, 8)
    weights = np.array([1.0, 2.0, 0.0, 1.0, 0.0, 3.0, 1.0, 0.5])
    model, kept = fit(x, y, weights), fit(x[weights > 0], y[weights > 0], weights[weights > 0])
    assert digits_of(model.coef, ExactFit(x, y, weights).coef) >= 13
    assert model.coef == pytest.approx(kept.coef, rel=1e-14)
    assert (model.n_rows, model.df_resid) == (8, kept.df_resid)
    with pytest.raises(NoRows, match="weight above zero"):
        fit(x, y, np.zeros(8))


def test_dropping_is_leaving_out():
    x, y = integers(5, 20, 3), integers(6, 20)
    columns = np.column_stack([x, x[:, 0] + x[:, 1], np.ones(20), 2 * x[:, 2]])
    model = deficient(columns, y, solver=streamlr.Direct(rank="drop"))
    exact = ExactFit(x, y)
    assert set(model.aliased) == {"x3", "x4", "x5"}
    assert (model.coef[3:] == 0).all()
    assert digits_of(model.coef[:3], exact.coef) >= 13.5
    assert digits_of([model.intercept], exact.intercept) >= 13.5
    assert model.std_err[:3] == pytest.approx(exact.std_err()[:, 0], rel=1e-13)
    assert model.intercept_std_err == pytest.approx(exact.intercept_std_err()[0], rel=1e-13)
    assert np.isnan(model.std_err[3:]).all()


def test_an_error_where_that_was_asked_for():
    x = integers(5, 20, 2)
    with pytest.raises(RankDeficient, match=r"x2 = 1 x0 \+ 1 x1"):
        fit(np.column_stack([x, x.sum(axis=1)]), integers(6, 20), solver=streamlr.Direct(rank="error"))
    with pytest.raises(RankDeficient, match="x1 is constant"):
        fit(np.column_stack([x[:, 0], np.ones(20)]), integers(6, 20), solver=streamlr.Direct(rank="error"))
    fit(x, integers(6, 20), solver=streamlr.Direct(rank="error"))


@pytest.mark.parametrize("rank", ["min_norm", "drop"])
@pytest.mark.parametrize("n", [40, 30_000])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_dummies_and_sums_of_noisy_columns_are_dependent_at_any_size(rank: str, n: int, offset: float):
    rng = np.random.default_rng(n)
    level = rng.integers(0, 4, n)
    dummies = (level[:, None] == np.arange(4)).astype(np.float64)  # with an intercept one too many
    a = rng.standard_normal((n, 2)) + offset
    x = np.column_stack([dummies, a, a.sum(axis=1)])
    y = rng.standard_normal(n) + level
    model = deficient(x, y, solver=streamlr.Direct(rank=rank))
    assert (model.rank, list(model.aliased)) == (5, ["x3", "x6"])
    assert model.aliased["x3"] == pytest.approx({"x0": -1.0, "x1": -1.0, "x2": -1.0}, rel=1e-12)
    best = fit(x[:, [0, 1, 2, 4, 5]], y)
    # any minimiser predicts the same; the values lose what the offset takes from them
    assert model.predict(x) == pytest.approx(best.predict(x[:, [0, 1, 2, 4, 5]]), abs=1e-12 * (1 + offset))
    assert model.cost.mse == pytest.approx(best.cost.mse, rel=1e-13)


def test_a_dependence_beside_ill_conditioned_columns_names_only_its_own():
    t = np.arange(21.0)
    x = np.column_stack([t**i for i in range(1, 6)])  # Wampler's polynomial: condition 1e3 to 1e4
    x = np.column_stack([x, integers(3, 21), 3 * t])
    model = deficient(x, integers(4, 21))
    assert (model.rank, list(model.aliased)) == (6, ["x6"])
    assert model.aliased["x6"] == pytest.approx({"x0": 3.0}, rel=1e-6)


# --- the report ------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.0, 0.9, 1 - 1e-6])
def test_the_condition_is_that_of_the_equilibrated_columns(correlation: float):
    # two columns with this correlation: eigenvalues 1 + c and 1 - c
    x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]) @ np.array(
        [[1.0, correlation], [0.0, np.sqrt(1 - correlation**2)]]
    )
    model = fit(x * [1e-3, 1e5] + 7, np.arange(4.0))
    assert model.condition == pytest.approx(np.sqrt((1 + correlation) / (1 - correlation)), rel=1e-9)
    assert model.digits == pytest.approx(15.65 - 2 * np.log10(model.condition), abs=0.01)


@pytest.mark.parametrize("power", [2, 3, 4, 5, 6])
def test_the_digits_that_are_claimed_are_there(power: int):
    t = np.linspace(1, 3, 30)
    x = np.column_stack([t**i for i in range(1, power + 1)])
    y = np.cos(3 * t)
    model, exact = fit(x, y), ExactFit(x, y)
    size = x.std(axis=0)
    error = (model.coef - [float(row[0]) for row in exact.coef]) * size
    reached = -np.log10(
        np.linalg.norm(error) / np.linalg.norm([float(row[0]) * s for row, s in zip(exact.coef, size, strict=True)])
    )
    assert reached >= model.digits - 0.5  # the claim is an order of magnitude
    assert model.digits >= 0


def test_the_bits_do_not_depend_on_the_threads_of_blas():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 200))
    full = streamlr.accumulate(streamlr.Dataset(x, rng.standard_normal((2000, 2))))
    short = streamlr.accumulate(streamlr.Dataset(np.column_stack([x, x[:, :3]]), rng.standard_normal(2000)))
    for moments, expected in ((full, None), (short, RankWarning)):
        results = []
        for threads in (1, 2):
            with threadpool_limits(threads), warnings.catch_warnings():
                warnings.simplefilter("ignore" if expected else "error", RankWarning)
                results.append(streamlr.solve(moments))
        assert results[0].coef.tobytes() == results[1].coef.tobytes()
        assert results[0].std_err.tobytes() == results[1].std_err.tobytes()
        assert results[0].condition == results[1].condition


def test_the_moments_are_left_as_they_were():
    x = integers(1, 12, 2)
    for columns in (np.column_stack([x, integers(2, 12)]), np.column_stack([x, x[:, 0], integers(2, 12)])):
        moments = moments_of(columns)
        before = moments.copy()
        for ridge in (0.0, 1.0):
            for fit_intercept in (True, False):
                solve_normal(moments, streamlr.Direct(), fit_intercept=fit_intercept, ridge=ridge)
        assert same_bits(moments, before)


def test_what_cannot_be_solved_is_refused():
    moments = moments_of(integers(1, 12, 3))
    for ridge in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="ridge is"):
            streamlr.solve(moments, ridge=ridge)
    with pytest.raises(NoRows):
        streamlr.solve(MomentsOf(("a",), ("b",)).empty())
    with pytest.raises(UsageError, match="no target"):
        streamlr.solve(moments_of(integers(1, 12, 3), n_targets=0))
    with pytest.raises(UsageError, match="rank is 'some'"):
        streamlr.Direct(rank="some")
    with pytest.raises(UsageError, match="route is 'svd'"):
        streamlr.Direct("svd")


def test_the_memory_of_a_solution_is_at_most_what_is_planned():
    import tracemalloc

    rng = np.random.default_rng(0)
    x = rng.standard_normal((900, 300))
    moments = moments_of(np.column_stack([x, x[:, :20], rng.standard_normal(900)]))
    tracemalloc.start()
    solve_normal(moments, streamlr.Direct(), fit_intercept=True, ridge=0.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= solve_bytes(320, 1)
