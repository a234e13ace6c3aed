"""Coordinates of prepared rows, and the objective in them: round trips, and gradients, against exact fractions."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import EPS, Array, ExactFit, fractions_of, matrices, row_weights

from streamlr.dataset.blocks import Block
from streamlr.descent.objective import Objective
from streamlr.descent.scaling import Coordinates, Prepared, plain_coordinates, standard_coordinates
from streamlr.errors import NumericalError

UNITS = [1.0, 1e-8, 1e6, 1e-150, 1e150]


@st.composite
def tables(draw: st.DrawFn) -> tuple[Array, Array | None, int]:
    """Columns [x y], weights, and the number of features; k is 1 or 2."""
    columns = draw(matrices(min_rows=3, max_rows=20, min_columns=2, max_columns=4))
    weights = draw(row_weights(len(columns)))
    return columns, weights, columns.shape[1] - draw(st.integers(1, columns.shape[1] - 1).map(lambda k: min(k, 2)))


def prepared(coordinates: Coordinates, columns: Array, weights: Array | None) -> Prepared:
    p = coordinates.n_features
    return coordinates.prepared(Block(0, len(columns), columns[:, :p], columns[:, p:], weights))


# --- coordinates -----------------------------------------------------------------------------------


@given(tables(), st.booleans())
def test_a_sample_is_centred_and_of_unit_deviation_in_its_own_coordinates(table: tuple[Array, Array | None, int], intercept: bool):
    columns, weights, p = table
    coordinates = standard_coordinates(columns, weights, p, intercept=intercept)
    rows = prepared(coordinates, columns, weights)
    a, y, w = rows.design, rows.y, rows.w
    assert (a.shape[1], y.shape[1]) == (coordinates.n_trained, coordinates.n_targets)
    share = np.full(len(a), 1 / len(a)) if weights is None or not weights.any() else weights / weights.sum()
    if w is not None and weights is not None and weights.any():
        np.testing.assert_allclose(w[:, 0] / w.sum(), share, rtol=1e-12)
        assert w.mean() == pytest.approx(1.0)
    means = np.concatenate([coordinates.mean, coordinates.target_mean])
    scales = np.concatenate([coordinates.scale, coordinates.target_scale])
    for j, z in enumerate(np.hstack([a[:, :p], y]).T):
        rounding = 16 * EPS * (np.abs(means[j]) / scales[j] + np.abs(z).max())
        if intercept:
            assert abs(share @ z) <= rounding
        second = math.sqrt(share @ z**2)
        constant = intercept and second <= rounding
        assert constant or not columns[:, j].any() or abs(second - 1) <= 1e-10 + rounding or share @ np.abs(columns[:, j]) == 0
    if intercept:
        assert (a[:, p] == 1).all()
    else:
        assert not means.any()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("value", [0.1, 3.0, -7e8])
def test_a_constant_column_is_measured_by_its_size_and_never_by_rounding(unit: float, value: float):
    rng = np.random.default_rng(0)
    columns = np.column_stack([np.full(101, value * unit), rng.standard_normal(101)])
    weights = rng.uniform(0.1, 3.0, 101)
    coordinates = standard_coordinates(columns, weights, 1, intercept=True)
    assert coordinates.scale[0] == pytest.approx(abs(value * unit), rel=1e-12)
    z = prepared(coordinates, columns, weights).z[:, 0]
    assert np.abs(z).max() <= 4 * EPS


def test_a_column_that_varies_by_rounding_alone_is_constant():
    column = np.full(100, 0.1)
    column[::2] *= 1 + 4 * EPS
    coordinates = standard_coordinates(np.column_stack([column, np.arange(100.0)]), None, 1, intercept=True)
    assert coordinates.scale[0] == pytest.approx(0.1)


def test_a_column_that_varies_beyond_rounding_is_not_constant_however_far_from_zero():
    values = 1e9 + np.random.default_rng(0).standard_normal(200) * 1e-3  # relative deviation 1e-12, of which 3 digits are stored
    columns = np.column_stack([values, values])
    coordinates = standard_coordinates(columns, None, 1, intercept=True)
    assert coordinates.scale[0] == pytest.approx(1e-3, rel=0.1)
    assert np.ptp(prepared(coordinates, columns, None).z[:, 0]) > 1


def test_a_column_of_zeros_is_left_as_it_is():
    columns = np.column_stack([np.zeros(5), np.arange(5.0)])
    for intercept in (True, False):
        coordinates = standard_coordinates(columns, None, 1, intercept=intercept)
        assert (coordinates.mean[0], coordinates.scale[0]) == (0.0, 1.0)
        unseen = np.array([[3.0, 0.0]])  # a row that the sample did not meet still counts
        assert prepared(coordinates, unseen, None).z[0, 0] == 3.0


@given(tables(), st.booleans(), st.integers(0, 1000))
def test_to_the_user_and_back_is_the_identity_to_rounding(table: tuple[Array, Array | None, int], intercept: bool, seed: int):
    columns, weights, p = table
    coordinates = standard_coordinates(columns, weights, p, intercept=intercept)
    b = np.random.default_rng(seed).standard_normal((coordinates.n_trained, coordinates.n_targets))
    exponents = np.log10(coordinates.target_scale)[None, :] - np.log10(coordinates.scale)[:, None]
    assume(np.abs(exponents).max() < 290)  # else coefficients leave float64: see below
    coef, user_intercept = coordinates.to_user(b)
    again = coordinates.of_user(coef, user_intercept)
    np.testing.assert_allclose(again[:p], b[:p], rtol=4 * EPS)
    if intercept:  # its digits are those of the sum in the user's units
        size = (
            np.abs(user_intercept)
            + np.abs(coordinates.target_mean)
            + np.abs(b[p]) * coordinates.target_scale
            + np.abs(coordinates.mean[:, None] * coef).sum(axis=0)
        )
        assert (np.abs(again[p] - b[p]) * coordinates.target_scale <= 8 * EPS * size).all()
    else:
        assert not user_intercept.any()


@given(st.integers(0, 1000), st.booleans(), st.sampled_from([0.0, 1e3, -1e9]), st.sampled_from(UNITS), st.sampled_from(UNITS))
def test_predictions_are_the_same_in_both_coordinates(seed: int, intercept: bool, offset: float, unit: float, target_unit: float):
    rng = np.random.default_rng(seed)
    columns = rng.standard_normal((12, 4)) + offset
    columns[:, :2] *= unit
    columns[:, 2:] *= target_unit
    coordinates = standard_coordinates(columns, None, 2, intercept=intercept)
    b = rng.standard_normal((coordinates.n_trained, 2))
    assume(target_unit / unit < 1e290)
    coef, user_intercept = coordinates.to_user(b)
    ours = prepared(coordinates, columns, None).times(b) * coordinates.target_scale + coordinates.target_mean
    for i in range(len(columns)):
        for j in range(2):
            terms = [Fraction(x) * Fraction(c) for x, c in zip(columns[i, :2].tolist(), coef[:, j].tolist(), strict=True)]
            exact = sum(terms, Fraction(float(user_intercept[j])))
            size = sum(map(abs, terms)) + abs(Fraction(float(user_intercept[j])))
            assert abs(Fraction(float(ours[i, j])) - exact) <= 32 * Fraction(EPS) * size


@given(tables(), st.booleans())
@example((np.array([[1e200, 1e-200], [-1e200, 3e-200], [5e199, 0.0]]), np.array([1e308, 1e307, 1e308]), 1), True)
@example((np.array([[5e-324, 1e-310], [0.0, 2e-310], [1e-320, 0.0]]), np.array([5e-324, 1e-320, 0.0]), 1), True)
def test_nothing_overflows_on_the_way_in(table: tuple[Array, Array | None, int], intercept: bool):
    columns, weights, p = table
    coordinates = standard_coordinates(columns, weights, p, intercept=intercept)  # a warning is an error here
    for values in (coordinates.mean, coordinates.target_mean, coordinates.mean_weight):
        assert np.isfinite(values).all()
    for scale in (coordinates.scale, coordinates.target_scale):
        assert np.isfinite(scale).all()
        assert (scale > 0).all()
    assert coordinates.mean_weight > 0
    rows = prepared(coordinates, columns, weights)
    numbers = np.concatenate([part.ravel() for part in (rows.z, rows.y, rows.w) if part is not None])
    assert np.isfinite(numbers).all()
    assert np.abs(numbers).max() <= 2 * max(len(columns), 1e13 if weights is None else 1e30)


@pytest.mark.parametrize("n", [1, 2])
def test_a_sample_of_one_row_or_of_equal_rows_has_coordinates(n: int):
    columns = np.tile([3.0, 0.0, -2.0], (n, 1))
    coordinates = standard_coordinates(columns, None, 2, intercept=True)
    np.testing.assert_array_equal(coordinates.scale, [3.0, 1.0])
    np.testing.assert_array_equal(coordinates.target_scale, [2.0])
    assert not prepared(coordinates, columns, None).z.any()


def test_a_sample_of_no_rows_or_no_weight_has_coordinates_too():
    for columns, weights in ((np.empty((0, 2)), None), (np.empty((0, 2)), np.empty(0)), (np.ones((3, 2)), np.zeros(3))):
        coordinates = standard_coordinates(columns, weights, 1, intercept=True)
        assert (coordinates.scale[0], coordinates.mean_weight) == (1.0, 1.0)


def test_coefficients_beyond_the_users_float64_are_an_error_and_no_infinity():
    columns = np.array([[1e-200, 1e200], [2e-200, 3e200], [4e-200, 0.0]])
    coordinates = standard_coordinates(columns, None, 1, intercept=True)
    with pytest.raises(NumericalError, match="a coefficient is beyond the range of float64; measure that column, or the target"):
        coordinates.to_user(np.ones((2, 1)))
    for bad in (np.inf, np.nan, 1e308):
        with pytest.raises(NumericalError):
            plain_coordinates(None, 2, 1, intercept=True).to_user(np.array([[bad], [0.0], [-np.inf]]))


@given(tables(), st.booleans())
def test_plain_coordinates_change_nothing(table: tuple[Array, Array | None, int], intercept: bool):
    columns, weights, p = table
    k = columns.shape[1] - p
    coordinates = plain_coordinates(weights, p, k, intercept=intercept)
    rows = prepared(coordinates, columns, weights)
    np.testing.assert_array_equal(np.hstack([rows.z, rows.y]), columns)
    b = np.random.default_rng(0).standard_normal((p + intercept, k))
    coef, user_intercept = coordinates.to_user(b)
    np.testing.assert_array_equal(coef, b[:p])
    np.testing.assert_array_equal(user_intercept, b[p] if intercept else np.zeros(k))


@given(tables(), st.booleans())
def test_inputs_are_not_changed(table: tuple[Array, Array | None, int], intercept: bool):
    columns, weights, p = table
    before, before_weights = columns.copy(), None if weights is None else weights.copy()
    coordinates = standard_coordinates(columns, weights, p, intercept=intercept)
    prepared(coordinates, columns, weights)
    b = coordinates.start()
    coordinates.penalty(b, 1.0)
    assert not b.any()
    np.testing.assert_array_equal(columns, before)
    if weights is not None:
        np.testing.assert_array_equal(weights, before_weights)


@given(tables(), st.booleans(), st.sampled_from([1, 20, 1_000, 3_000, 8_192]))
def test_a_row_is_prepared_alike_wherever_it_stands(table: tuple[Array, Array | None, int], intercept: bool, n: int):
    """Many rows are prepared together: by the definition, to the bit."""
    columns, weights, p = table
    coordinates = standard_coordinates(columns, weights, p, intercept=intercept)
    tall, w = np.resize(columns, (n, columns.shape[1])), None if weights is None else np.resize(weights, n)
    x, y = tall[:, :p].copy(), tall[:, p:].copy()
    where_they_lie = Block(0, n, x, y, None if w is None else w.copy())
    apart, here = prepared(coordinates, tall, w), coordinates.prepare(where_they_lie)
    assert np.shares_memory(here.z, x)
    assert np.shares_memory(here.y, y)
    for rows in (apart, here):
        np.testing.assert_array_equal(rows.z, (tall[:, :p] - coordinates.mean) * (1 / coordinates.scale))
        np.testing.assert_array_equal(rows.y, (tall[:, p:] - coordinates.target_mean) * (1 / coordinates.target_scale))
        assert rows.design.shape == (n, p + intercept)
        if w is not None:
            np.testing.assert_array_equal(rows.w, w[:, None] * (1 / coordinates.mean_weight))


@given(tables(), st.booleans())
def test_features_near_zero_may_stay_as_they_are(table: tuple[Array, Array | None, int], intercept: bool):
    columns, weights, p = table
    coordinates = standard_coordinates(columns, weights, p, intercept=intercept)
    rows, block = (
        prepared(coordinates, columns, weights),
        Block(0, len(columns), columns[:, :p].copy(), columns[:, p:].copy(), weights),
    )
    near = np.abs(coordinates.mean) <= 0.7 * coordinates.scale
    assert (coordinates.units is not None) == (near.all() and ((coordinates.scale > 1e-100) & (coordinates.scale < 1e100)).all())
    left = coordinates.prepare(replace(block, weights=None if weights is None else weights.copy()), coordinates.units)
    if coordinates.units is None:
        np.testing.assert_array_equal(left.z, rows.z)
        return
    assert left.z is block.x
    np.testing.assert_array_equal(left.z, columns[:, :p])
    rng, part = np.random.default_rng(0), slice(1, len(columns))
    b, r = rng.normal(size=(coordinates.n_trained, 2)), rng.normal(size=(len(columns) - 1, 2))
    size = np.abs(rows.design[part]) + 1  # of a feature as it is, in its scale, and of its mean
    np.testing.assert_allclose(left.design, rows.design, rtol=0, atol=8 * EPS * size.max())
    difference = np.abs(left[part].times(b) - rows[part].times(b))
    assert (difference <= 8 * EPS * len(b) * (size @ np.abs(b))).all()
    difference = np.abs(left[part].transposed_times(r) - rows[part].transposed_times(r))
    assert (difference <= 8 * EPS * len(r) * (size.T @ np.abs(r))).all()
    for name in ("y", "w"):
        np.testing.assert_array_equal(getattr(left, name), getattr(rows, name))


@pytest.mark.parametrize(
    ("batch", "p", "mean", "left"), [(256, 40, 0.5, True), (256, 40, 2.0, False), (256, 4, 0.5, False), (8, 4096, 0.5, False)]
)
def test_features_stay_as_they_are_in_large_batches_and_near_zero(batch: int, p: int, mean: float, left: bool):
    coordinates = replace(plain_coordinates(None, p, 1, intercept=True), mean=np.full(p, mean), scale=np.full(p, 2.0))
    x = np.random.default_rng(0).normal(size=(batch, p))
    rows = Objective(coordinates, batch, 0.0).preparation()(Block(0, batch, x.copy(), np.ones((batch, 1))))
    np.testing.assert_array_equal(rows.z, x if left else (x - mean) * 0.5)


# --- the objective ---------------------------------------------------------------------------------


class Problem:
    """A batch with everything that an objective knows, in small integers, so that fractions of it are exact."""

    def __init__(self, seed: int, *, intercept: bool, weighted: bool, ridge: float, rows: int = 7, k: int = 2) -> None:
        rng = np.random.default_rng(seed)
        self.columns = rng.integers(-9, 10, (rows, 2 + k)).astype(float)
        self.weights = rng.integers(0, 4, rows).astype(float) if weighted else None
        # units that are powers of two, so that prepared rows are exact as well
        self.coordinates = Coordinates(
            np.array([1.0, -2.0]) * intercept,
            np.array([0.5, 8.0]),
            np.array([3.0, -1.0])[:k] * intercept,
            np.array([2.0, 0.25])[:k],
            intercept,
            2.0 if weighted else 1.0,
        )
        self.ridge, self.k = ridge, k
        self.b = rng.integers(-9, 10, (2 + intercept, k)).astype(float) / 4

    def rows(self, start: int = 0, stop: int | None = None) -> Prepared:
        return prepared(self.coordinates, self.columns, self.weights)[start:stop]

    def cost(self, b: list[list[Fraction]], batch_rows: int) -> list[Fraction]:
        """J_B of each target by its definition in the user's units: what a row is, and what is penalised."""
        c = self.coordinates
        costs = []
        for j in range(self.k):
            unit = Fraction(float(c.target_scale[j]))
            coef = [b[i][j] * unit / Fraction(float(c.scale[i])) for i in range(2)]
            base = Fraction(float(c.target_mean[j])) - sum(m * v for m, v in zip(fractions_of(c.mean), coef, strict=True))
            base += b[2][j] * unit if c.intercept else 0
            total = Fraction(0)
            for i, row in enumerate(fractions_of(self.columns)):
                weight = Fraction(1) if self.weights is None else Fraction(float(self.weights[i])) / 2
                total += weight * (row[2 + j] - base - row[0] * coef[0] - row[1] * coef[1]) ** 2
            penalty = Fraction(self.ridge) * sum(v * v for v in coef) * Fraction(len(self.columns), batch_rows)
            costs.append((total / batch_rows + penalty) / unit**2)
        return costs


problems = st.builds(
    Problem, st.integers(0, 1000), intercept=st.booleans(), weighted=st.booleans(), ridge=st.sampled_from([0.0, 0.25, 8.0])
)


@given(problems, st.sampled_from([7, 16]))
def test_gradient_and_curvature_are_the_exact_differences_of_the_cost(problem: Problem, batch_rows: int):
    """Of a quadratic, central differences are the derivative and second differences the curvature, exactly."""
    objective = Objective(problem.coordinates, batch_rows, problem.ridge)
    gradient, residuals = objective.gradient(problem.rows(), problem.b)
    b = fractions_of(problem.b)
    middle = problem.cost(b, batch_rows)
    directions = np.random.default_rng(1).integers(-4, 5, (len(b), problem.k)).astype(float)
    directions[:, 0] = np.eye(len(b))[0]
    curvature = objective.curvature(problem.rows(), directions)
    steps = fractions_of(directions)

    def at(sign: int, change: list[list[Fraction]]) -> list[Fraction]:
        moved = [[v + sign * d for v, d in zip(row, more, strict=True)] for row, more in zip(b, change, strict=True)]
        return problem.cost(moved, batch_rows)

    for j in range(problem.k):
        second = at(1, steps)[j] - 2 * middle[j] + at(-1, steps)[j]
        assert curvature[j] == pytest.approx(float(second), rel=1e-13)
        for i in range(len(b)):
            unit = [[Fraction(int((row, column) == (i, j))) for column in range(problem.k)] for row in range(len(b))]
            slope = (at(1, unit)[j] - at(-1, unit)[j]) / 2
            assert gradient[i, j] == pytest.approx(float(slope), rel=1e-13, abs=1e-13 * float(1 + middle[j]))
    np.testing.assert_array_equal(residuals, problem.rows().y - problem.rows().design @ problem.b)


@given(problems, st.integers(1, 6))
def test_short_batches_weigh_each_row_alike(problem: Problem, cut: int):
    """Gradients of the pieces of a batch, each divided by its nominal size, add up to that of the whole; penalties as well."""
    objective = Objective(problem.coordinates, 7, problem.ridge)
    whole, _ = objective.gradient(problem.rows(), problem.b)
    first, _ = objective.gradient(problem.rows(0, cut), problem.b)
    second, _ = objective.gradient(problem.rows(cut), problem.b)
    np.testing.assert_allclose(first + second, whole, rtol=1e-12, atol=1e-10)
    bends = [objective.curvature(problem.rows(*part), problem.b) for part in ((0, None), (0, cut), (cut, None))]
    np.testing.assert_allclose(bends[1] + bends[2], bends[0], rtol=1e-12, atol=1e-10)


@given(st.integers(0, 1000), st.booleans(), st.booleans())
def test_where_the_gradient_is_zero_is_the_closed_form_of_ridge_in_the_users_units(seed: int, intercept: bool, weighted: bool):
    problem = Problem(seed, intercept=intercept, weighted=weighted, ridge=0.5, rows=9)
    if problem.weights is not None:
        problem.weights = problem.weights + 1
        problem.coordinates = standard_coordinates(problem.columns, problem.weights, 2, intercept=intercept)
    x, y = problem.columns[:, :2], problem.columns[:, 2:]
    # lambda W of the closed form, X'WX + lambda W I: ours divides by rows times their mean weight, which is the same
    exact = ExactFit(x, y, problem.weights, fit_intercept=intercept, ridge=Fraction(1, 2))
    b = problem.coordinates.of_user(np.array(exact.coef, dtype=float), np.array(exact.intercept, dtype=float))
    gradient, _ = Objective(problem.coordinates, 9, 0.5).gradient(problem.rows(), b)
    unpenalised, _ = Objective(problem.coordinates, 9, 0.0).gradient(problem.rows(), b)
    assert np.abs(gradient).max() <= 1e-12 * max(np.abs(unpenalised).max(), 1.0)
    assert np.abs(unpenalised[:2]).max() > 1e-6  # so that the penalty is what makes it zero
    if intercept:
        np.testing.assert_array_equal(gradient[2], unpenalised[2])


@given(problems)
def test_several_targets_are_each_as_if_alone(problem: Problem):
    objective = Objective(problem.coordinates, 7, problem.ridge)
    gradient, residuals = objective.gradient(problem.rows(), problem.b)
    curvature = objective.curvature(problem.rows(), problem.b)
    c, rows = problem.coordinates, prepared(problem.coordinates, problem.columns, problem.weights)
    for j in range(problem.k):
        single = Coordinates(c.mean, c.scale, c.target_mean[[j]], c.target_scale[[j]], c.intercept, c.mean_weight)
        alone = Objective(single, 7, problem.ridge)
        of_one = replace(rows, y=rows.y[:, [j]])
        own, met = alone.gradient(of_one, problem.b[:, [j]])
        np.testing.assert_allclose(own[:, 0], gradient[:, j], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(met[:, 0], residuals[:, j], rtol=1e-12, atol=1e-12)
        assert alone.curvature(of_one, problem.b[:, [j]])[0] == pytest.approx(curvature[j], rel=1e-12)


@given(problems)
def test_the_objective_changes_nothing(problem: Problem):
    objective = Objective(problem.coordinates, 7, problem.ridge)
    rows, b = problem.rows(), problem.b.copy()
    parts = [part for part in (rows.z, rows.y, rows.w) if part is not None]
    before = [part.copy() for part in parts]
    gradient, residuals = objective.gradient(rows, b)
    objective.curvature(rows, b)
    for part, copied in zip(parts, before, strict=True):
        np.testing.assert_array_equal(part, copied)
    np.testing.assert_array_equal(b, problem.b)
    assert not any(np.shares_memory(result, given_array) for result in (gradient, residuals) for given_array in (*parts, b))
