"""The cost: from residuals and from moments the same number, defined for constant targets, never negative."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Array, block_of, fractions_of, matrices, moments_of, row_weights, same_bits

import streamlr
from streamlr.aggregates import cost as costs
from streamlr.aggregates.cost import BUFFER, LONG_ROW, PIECE_ROWS, ResidualsOf, cost_of_moments, predictions
from streamlr.dataset.blocks import Block
from streamlr.dataset.buffers import Buffer
from streamlr.errors import NoRows, RankWarning


def of_rows(columns: Array, weights: Array | None, coef: Array, intercept: Array) -> streamlr.Cost:
    k = coef.shape[1]
    return ResidualsOf(coef, intercept).of(block_of(columns, weights, n_targets=k)).cost()


@given(st.data())
def test_from_moments_and_from_residuals_it_is_the_same(data: st.DataObject):
    columns = data.draw(matrices(min_rows=1, min_columns=3, max_columns=4, awkward=False))
    weights = data.draw(row_weights(len(columns)))
    assume(weights is None or weights.any())
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    coef, intercept = rng.standard_normal((columns.shape[1] - 2, 2)), rng.standard_normal(2)
    a = of_rows(columns, weights, coef, intercept)
    b = cost_of_moments(moments_of(columns, weights, n_targets=2), coef, intercept)
    size = np.square(np.abs(columns).max() * 4 + 4)  # of the squares from which moments must recover the residuals
    assert np.abs(a.mse - b.mse).max() <= 1e-14 * size
    assert a.mae is not None
    assert b.mae is None
    assert (a.n, a.weight_sum) == (b.n, pytest.approx(b.weight_sum))


@given(st.data())
def test_from_residuals_it_is_the_definition(data: st.DataObject):
    columns = data.draw(matrices(min_rows=2, max_rows=12, min_columns=2, max_columns=3))
    weights = data.draw(row_weights(len(columns)))
    assume(weights is None or weights.any())
    coef = np.zeros((columns.shape[1] - 1, 1))
    cost = of_rows(columns, weights, coef, np.zeros(1))
    w = fractions_of(np.ones(len(columns)) if weights is None else weights)
    y, total = fractions_of(columns[:, -1]), sum(w)
    mean = sum(a * b for a, b in zip(w, y, strict=True)) / total
    squares = sum(a * b * b for a, b in zip(w, y, strict=True))
    spread = sum(a * (b - mean) ** 2 for a, b in zip(w, y, strict=True))
    assert cost.mae == pytest.approx(float(sum(a * abs(b) for a, b in zip(w, y, strict=True)) / total), rel=1e-13)
    if squares / total < Fraction(10) ** 300 and (squares / total > Fraction(10) ** -300 or not squares):
        assert cost.mse == pytest.approx(float(squares / total), rel=1e-13)
    if spread * 10**20 > squares:  # else the target is as good as constant, and the 16 digits of r2 see nothing
        assert cost.r2 == pytest.approx(float(1 - squares / spread), rel=1e-12, abs=1e-12)


@given(st.data())
def test_sums_add_up_and_empty_is_their_identity(data: st.DataObject):
    columns = data.draw(matrices(min_rows=2, min_columns=2))
    statistic = ResidualsOf(np.ones((columns.shape[1] - 1, 1)), np.ones(1))
    value = statistic.of(block_of(columns))
    assert same_bits(value + statistic.empty(), value)
    assert same_bits(statistic.empty() + value, value)
    half = len(columns) // 2
    parts = statistic.of(block_of(columns[:half])) + statistic.of(block_of(columns[half:]))
    assert parts.cost().mse == pytest.approx(value.cost().mse, rel=1e-13)
    assert parts.cost().mae == pytest.approx(value.cost().mae, rel=1e-13)
    spread = value.spread
    held = sum(a.nbytes for a in (spread.squares, spread.mean, spread.mean_rest, spread.exponent, value.magnitudes))
    assert held <= statistic.nbytes


@given(matrices(min_rows=2, min_columns=3, max_columns=3, awkward=False), st.sampled_from([0.0, 1e4, 1e8]))
def test_a_perfect_fit_has_no_negative_cost(columns: Array, offset: float):
    x = columns[:, :2] + offset
    columns = np.column_stack([x, x @ [1.0, 2.0]])
    coef, intercept = np.array([[1.0], [2.0]]), np.zeros(1)
    m = moments_of(columns)
    assert (m.cost_sums(coef, intercept)[0] >= 0).all()
    for cost in (cost_of_moments(m, coef, intercept), of_rows(columns, None, coef, intercept)):
        assert cost.mse >= 0
        # 14 digits of the squares that moments hold, and twice 14 of the values themselves
        allowed = 1e-14 * np.var(columns, axis=0).sum() + 1e-28 * np.square(columns).max()
        assert cost.mse <= allowed
        assert cost.r2 <= 1.0
        assert np.var(columns[:, 2]) * (1 - cost.r2) <= allowed


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9, -1 / 3, 1e200, 1e-200])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_r2_of_a_constant_target_is_1_when_met_and_else_0(value: float, rows: int):
    columns = np.column_stack([np.arange(rows, dtype=np.float64), np.full(rows, value)])
    m = moments_of(columns) + moments_of(columns)
    coef = np.zeros((1, 1))
    for intercept, expected in ((value, 1.0), (value * 1.001 + (value == 0), 0.0)):
        assert cost_of_moments(m, coef, np.array([intercept])).r2 == expected
        assert of_rows(columns, None, coef, np.array([intercept])).r2 == expected


@pytest.mark.parametrize("value", [0.1, 7.0])
def test_a_fit_to_a_constant_target_says_so(value: float):
    model = streamlr.fit(streamlr.Dataset(np.arange(10.0), np.full(10, value)))
    assert (model.coef[0], model.intercept, model.cost.r2) == (0.0, value, 1.0)
    assert model.cost.mse <= (1e-16 * value) ** 2


@pytest.mark.parametrize("scale", [1e150, 1e-150, 1e200, 1e-200])
def test_r2_of_targets_beyond_the_range_of_squares(scale: float):
    rng = np.random.default_rng(0)
    columns = np.column_stack([rng.standard_normal(30), rng.standard_normal(30)])
    coef, intercept = np.array([[0.3]]), np.array([0.1])
    plain = of_rows(columns, None, coef, intercept)
    scaled = columns * [1.0, scale]
    coef, intercept = coef * scale, intercept * scale
    for cost in (of_rows(scaled, None, coef, intercept), cost_of_moments(moments_of(scaled), coef, intercept)):
        assert cost.r2 == pytest.approx(plain.r2, rel=1e-13)
        assert cost.mse == pytest.approx(plain.mse * scale**2 if scale < 1e154 else math.inf, rel=1e-13)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("p", "k"), [(1, 1), (10, 1), (3, 2), (3, 20)])
@pytest.mark.parametrize("rows", [1, 255, PIECE_ROWS, 3 * PIECE_ROWS + 5])
def test_residuals_of_a_tile_do_not_depend_on_the_memory_they_are_made_in(rows: int, p: int, k: int, weighted: bool):
    rng = np.random.default_rng(rows)
    x, coef, intercept = rng.normal(size=(rows, p)), rng.normal(size=(p, k)), rng.normal(size=k)
    y, weights = 1e3 + rng.normal(size=(rows, k)), rng.random(rows) if weighted else None
    statistic, room = ResidualsOf(coef, intercept), Buffer()
    value = statistic.of(Block(0, rows, x, y, weights))
    for _ in range(2):  # in fresh memory, and in the same again
        assert same_bits(statistic.of(Block(0, rows, x, y, weights, room)), value)
    residuals, share = y - intercept - x @ coef, np.ones(rows) if weights is None else weights
    np.testing.assert_allclose(value.magnitudes, share @ np.abs(residuals), rtol=1e-13)
    np.testing.assert_allclose(value.cost().mse, share @ residuals**2 / share.sum(), rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint16", "bool", ">f4"])
@pytest.mark.parametrize("rows", [3, 2 * PIECE_ROWS + 5])
def test_features_as_they_are_stored_have_the_residuals_of_their_float64(rows: int, dtype: str):
    rng = np.random.default_rng(rows)
    x = rng.uniform(0, 100, size=(rows, LONG_ROW)).astype(dtype)
    y, coef = rng.normal(size=(rows, 1)), rng.normal(size=(LONG_ROW, 1))
    statistic = ResidualsOf(coef, np.ones(1))
    assert statistic.as_stored
    found, expected = (statistic.of(Block(0, rows, features, y)).cost() for features in (x, x.astype(np.float64)))
    assert (found.mse, found.mae) == (pytest.approx(expected.mse, rel=1e-13), pytest.approx(expected.mae, rel=1e-13))
    assert found.mse == pytest.approx(np.square(y - 1 - x.astype(np.float64) @ coef).mean(), rel=1e-13)


def test_features_come_as_they_are_stored_where_they_are_promoted_in_one_go():
    assert not ResidualsOf(np.ones((LONG_ROW - 1, 1)), np.ones(1)).as_stored
    assert not ResidualsOf(np.ones((LONG_ROW, 2)), np.ones(2)).as_stored


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e200])
@pytest.mark.parametrize("far", [1e9, -3e5, 1e-7])
def test_targets_near_which_they_are_centred_may_say_nothing_about_the_others(far: float, scale: float, weighted: bool):
    rows = 64 * 100
    rng = np.random.default_rng(0)
    y = rng.normal(size=rows)
    y[:: rows // 64] = far + 1e-3 * y[:: rows // 64]  # the rows that are looked at first
    weights = rng.random(rows) if weighted else None
    found = of_rows(np.column_stack([np.zeros(rows), y * scale]), weights, np.ones((1, 1)), np.array([0.5 * scale]))
    share = np.ones(rows) if weights is None else weights
    around = share @ (y - share @ y / share.sum()) ** 2
    assert found.r2 == pytest.approx(1 - share @ (y - 0.5) ** 2 / around, rel=1e-12)
    assert found.mae == pytest.approx(share @ np.abs(y - 0.5) / share.sum() * scale, rel=1e-12)


@pytest.mark.parametrize(("y", "times"), [(7.0, 1), (0.0, 1), (1e200, 2)])
def test_rows_of_a_constant_target_are_gone_through_once(monkeypatch, y: float, times: int):
    made, sums_in = [], costs._sums_in
    monkeypatch.setattr(costs, "_sums_in", lambda *given: made.append(1) or sums_in(*given))
    value = ResidualsOf(np.ones((1, 1)), np.zeros(1)).of(Block(0, 9, np.arange(9.0)[:, None], np.full((9, 1), y)))
    assert len(made) == times
    assert value.cost().mse == pytest.approx(np.mean((y - np.arange(9.0)) ** 2) if y < 1e154 else math.inf)


def test_sums_share_no_memory_with_what_they_are_of():
    statistic = ResidualsOf(np.ones((1, 1)), np.zeros(1))
    value = statistic.of(Block(0, 9, np.arange(9.0)[:, None], np.ones((9, 1))))
    arrays = [value.magnitudes, *(getattr(value.spread, name) for name in ("mean", "mean_rest", "squares", "exponent"))]
    for total in (value + statistic.empty(), statistic.empty() + value, value + value):
        others = [total.magnitudes, *(getattr(total.spread, name) for name in ("mean", "mean_rest", "squares", "exponent"))]
        assert not any(np.shares_memory(a, b) for a in arrays for b in others)


@given(st.integers(0, 999), st.integers(1, 2_000), st.integers(0, 2))
def test_bits_know_nothing_of_the_columns_beside_a_target(seed: int, m: int, column: int):
    rows = np.random.default_rng(seed).normal(size=(m, 3))
    statistic, x = ResidualsOf(np.ones((1, 1)), np.zeros(1)), rows[:, :1].copy()
    alone, beside = (statistic.of(Block(0, len(x), x, y)) for y in (rows[:, [column]].copy(), rows[:, column : column + 1]))
    assert alone.magnitudes.tobytes() == beside.magnitudes.tobytes()
    for name in ("mean", "mean_rest", "squares", "exponent"):
        assert getattr(alone.spread, name).tobytes() == getattr(beside.spread, name).tobytes()


@pytest.mark.parametrize("m", [PIECE_ROWS, 8 * PIECE_ROWS])
def test_long_sums_of_squares_keep_their_digits(m: int):
    y = np.where(np.arange(m) % 2, 0.1, -0.1)[:, None]
    found = ResidualsOf(np.zeros((1, 1)), np.zeros(1)).of(Block(0, m, np.zeros((m, 1)), y)).cost()
    assert found.mse == pytest.approx(0.1**2, rel=2e-15)
    assert found.r2 == pytest.approx(0, abs=1e-14)


@given(st.data())
def test_the_spread_of_parts_is_the_diagonal_of_their_moments(data: st.DataObject):
    columns = data.draw(matrices(min_rows=2, min_columns=2))
    weights = data.draw(row_weights(len(columns)))
    half = len(columns) // 2
    parts = [moments_of(columns[part], None if weights is None else weights[part]) for part in (slice(half), slice(half, None))]
    found, expected = parts[0].spread + parts[1].spread, (parts[0] + parts[1]).spread
    assert same_bits(found, expected)


def test_without_weight_there_is_no_cost():
    with pytest.raises(NoRows, match="weight above zero"):
        of_rows(np.ones((3, 2)), np.zeros(3), np.zeros((1, 1)), np.zeros(1))


@pytest.mark.parametrize("p", [1, 2, 3, 7, 8, 17, 100, BUFFER - 1, BUFFER, BUFFER + 1, 2 * BUFFER, 2 * BUFFER + 1])
@pytest.mark.parametrize("layout", ["rows", "columns", "reversed", "every other"])
def test_a_prediction_does_not_depend_on_other_rows(p: int, layout: str):
    rng = np.random.default_rng(p)
    m = min(300, 400_000 // p)
    wide = rng.standard_normal((m, 2 * p))
    some, alternate = wide[:, :p], wide[:, ::2]
    x = {"rows": some, "columns": np.asfortranarray(some), "reversed": some[:, ::-1], "every other": alternate}[layout]
    assert x.shape == (m, p)
    coef, intercept = rng.standard_normal((p, 2)), rng.standard_normal(2)
    together = predictions(x, coef, intercept)
    for i in range(0, m, max(m // 25, 1)):
        assert predictions(x[i : i + 1], coef, intercept).tobytes() == together[i].tobytes()
        assert predictions(np.ascontiguousarray(x[i : i + 3]), coef, intercept)[0].tobytes() == together[i].tobytes()
    assert np.abs(together - (x @ coef + intercept)).max() <= 1e-14 * p


def test_the_dictionary_and_the_text_hold_the_numbers():
    cost = of_rows(np.array([[0.0, 1.0], [1.0, 3.0]]), None, np.array([[1.0]]), np.array([0.0]))
    assert cost.to_dict() == {
        "n": 2,
        "weight_sum": 2.0,
        "n_dropped": 0,
        "chunks_missing": 0,
        "mse": 2.5,
        "rmse": math.sqrt(2.5),
        "r2": -1.5,
        "mae": 1.5,
    }
    assert str(cost) == "mse 2.5  rmse 1.58114  mae 1.5  r2 -1.5  (n = 2)"
    assert (
        str(replace(cost, n_dropped=3)) == "mse 2.5  rmse 1.58114  mae 1.5  r2 -1.5  (n = 2, 3 rows with missing values left out)"
    )


@pytest.mark.parametrize("noise", [0.0, 1e-10, 1e-8, 1e-7, 1e-6, 1e-3])
def test_residuals_too_small_for_moments_give_a_bound_and_no_errors(noise: float):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 3))
    y = x @ [1.0, 2.0, 3.0] + noise * rng.normal(size=1000)
    model = streamlr.fit(streamlr.Dataset(x, y))
    seen = streamlr.evaluate(model, streamlr.Dataset(x, y))
    assert model.cost.mse >= seen.mse * (1 - 1e-3)
    if noise >= 1e-6:
        assert model.cost.mse == pytest.approx(seen.mse, rel=1e-2)
        assert model.std_err == pytest.approx(noise / math.sqrt(1000), rel=0.15)
    if noise <= 1e-8:
        assert np.isnan(model.std_err).all()
        assert "mse is a bound" in str(model.summary())


def test_evaluate_needs_no_luck_with_ranks():
    with pytest.warns(RankWarning):
        model = streamlr.fit(streamlr.Dataset(np.ones((4, 1)), np.arange(4.0)))
    assert streamlr.evaluate(model, streamlr.Dataset(np.ones((4, 1)), np.arange(4.0))).mse == pytest.approx(
        model.cost.mse, rel=1e-15
    )
