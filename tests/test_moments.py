"""Moments are a commutative monoid over rows, exact to rounding at any offset and in any unit."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import (
    EPS,
    Array,
    block_of,
    cuts,
    digits_of,
    exact_moments,
    fractions_of,
    matrices,
    moments_of,
    row_weights,
    same_bits,
)

from streamlr.aggregates import centred, moments
from streamlr.aggregates.centred import CONSTANT
from streamlr.aggregates.moments import Moments, MomentsOf
from streamlr.aggregates.spread import NO_SCALE
from streamlr.dataset.blocks import Block
from streamlr.dataset.buffers import Buffer
from streamlr.dataset.dataset import default_names
from streamlr.errors import NumericalError, UsageError

SHIPPED = {name: getattr(centred, name) for name in ("PIECE_BYTES", "COLUMNS_BYTES")}
SCALES = [1e150, 1e-150, 1e200, 1e-200]


@pytest.fixture(autouse=True, scope="module", params=["whole", "in pieces", "rows", "rows in pieces"])
def pieces(request):
    """Every law with few rows as one piece, and with a few of them at a time; with few columns, and as if they were many."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param.startswith("rows"):
            patch.setattr(centred, "FEW_COLUMNS", 0)
        if request.param.endswith("in pieces"):
            patch.setattr(centred, "PIECE_BYTES", 200)
            patch.setattr(centred, "COLUMNS_BYTES", 200)
            patch.setattr(moments, "STRIP", 2)
            patch.setattr(centred, "STRIP", 2)
        yield


def assert_close(a: Moments, b: Moments, tolerance: float = 1e-13) -> None:
    """To rounding: means beside the spread of their column (or its size), scatter beside the diagonal, exponents exactly."""
    assert (a.n, a.n_weighted) == (b.n, b.n_weighted)
    assert a.weight_sum == pytest.approx(b.weight_sum, rel=tolerance)
    assert (a.exponent == b.exponent).all()
    size = np.sqrt(a.weight_sum) * np.maximum(np.abs(a.mean), np.abs(b.mean))
    spread = np.sqrt(np.maximum(np.diagonal(a.scatter), np.diagonal(b.scatter)))
    # the product of two columns is known to the spread of both, and a mean only as far as float64 holds the values themselves
    allowed = spread + EPS * size
    assert (np.abs(a.scatter - b.scatter) <= tolerance * np.outer(allowed, allowed) + 5e-324).all()
    distance = (a.mean - b.mean) + (a.mean_rest - b.mean_rest)
    assert (np.sqrt(a.weight_sum) * np.abs(distance) <= tolerance * allowed).all()


def in_units_of(value: Moments, exponent: NDArray[np.int32]) -> Moments:
    shift = np.maximum(value.exponent - exponent, NO_SCALE)
    mean, rest = np.ldexp(value.mean, shift), np.ldexp(value.mean_rest, shift)
    scatter = np.ldexp(value.scatter, shift[:, None] + shift)
    return replace(value, mean=mean, mean_rest=rest, scatter=scatter, exponent=exponent)


@given(st.data())
def test_empty_is_a_true_identity(data: st.DataObject):
    columns = data.draw(matrices(min_columns=2))
    m = moments_of(columns, data.draw(row_weights(len(columns))))
    empty = MomentsOf(m.feature_names, m.target_names).empty()
    for total in (m + empty, empty + m):
        assert same_bits(total, m)
        assert not any(np.shares_memory(getattr(total, f), getattr(m, f)) for f in ("mean", "mean_rest", "scatter", "exponent"))
    assert same_bits(empty + empty, empty)


@given(st.data())
def test_the_sum_of_parts_is_the_value_of_the_whole(data: st.DataObject):
    columns = data.draw(matrices(min_rows=1, max_rows=60, min_columns=2))
    weights = data.draw(row_weights(len(columns)))
    edges = data.draw(cuts(len(columns)))
    whole = moments_of(columns, weights)
    parts = [moments_of(columns[a:b], None if weights is None else weights[a:b]) for a, b in itertools.pairwise(edges)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    if weights is not None and not weights.all():  # a row of weight zero may set the unit of a column where it is not alone
        unit = np.maximum(total.exponent, whole.exponent)
        total, whole = in_units_of(total, unit), in_units_of(whole, unit)
    assert_close(total, whole)


@given(st.data())
def test_sums_commute_and_associate_to_rounding(data: st.DataObject):
    columns = data.draw(matrices(min_rows=3, max_rows=60, min_columns=2))
    weights = data.draw(row_weights(len(columns)))
    third = len(columns) // 3
    a, b, c = (
        moments_of(columns[s], None if weights is None else weights[s])
        for s in (slice(0, third), slice(third, 2 * third), slice(2 * third, None))
    )
    assert_close(a + b, b + a)
    assert_close((a + b) + c, a + (b + c))


@given(st.data())
def test_what_absorbs_has_the_bits_of_a_sum_and_spares_the_other(data: st.DataObject):
    columns = data.draw(matrices(min_rows=1, max_rows=40, min_columns=2))
    weights, edge = data.draw(row_weights(len(columns))), data.draw(st.integers(0, len(columns)))
    left, right = (moments_of(columns[s], None if weights is None else weights[s]) for s in (slice(edge), slice(edge, None)))
    expected, before, memory = left + right, right.copy(), left.scatter
    total = left.absorb(right)
    assert same_bits(total, expected)
    assert same_bits(right, before)
    assert not np.shares_memory(total.scatter, right.scatter)
    assert np.shares_memory(total.scatter, memory) or not 0 < edge < len(columns)


@given(matrices(min_rows=1, max_rows=12, min_columns=2), st.integers(0, 2**32 - 1))
def test_a_weight_k_is_the_row_repeated_k_times(columns: Array, seed: int):
    times = np.random.default_rng(seed).integers(0, 4, len(columns))
    assume(times.any())
    weighted = moments_of(columns, times.astype(np.float64))
    repeated = moments_of(np.repeat(columns, times, axis=0))
    # a row of weight zero may set the unit of a column, so only columns of one unit can be compared number by number
    alike = replace(repeated, n=weighted.n, n_weighted=weighted.n_weighted)
    if (weighted.exponent == repeated.exponent).all():
        assert_close(weighted, alike)
    assert weighted.weight_sum == repeated.weight_sum == times.sum()
    assert weighted.n_weighted == np.count_nonzero(times)


@given(matrices(min_rows=1, min_columns=2, awkward=False), st.data())
def test_rows_without_weight_count_as_rows_and_leave_the_numbers_alone(columns: Array, data: st.DataObject):
    nothing = moments_of(columns * 7, np.zeros(len(columns)))
    m = moments_of(columns)
    for total in (m + nothing, nothing + m):
        assert total.n == 2 * len(columns)
        assert total.n_weighted == len(columns)
        for name in ("mean", "mean_rest", "scatter", "exponent"):
            assert (getattr(total, name) == getattr(m, name)).all()


@given(st.data())
def test_inputs_are_not_mutated_and_results_alias_nothing(data: st.DataObject):
    columns = data.draw(matrices(min_rows=1, min_columns=2))
    weights = data.draw(row_weights(len(columns)))
    before = columns.copy(), None if weights is None else weights.copy()
    a = moments_of(columns, weights)
    assert (columns == before[0]).all()
    assert weights is None or (weights == before[1]).all()
    b = moments_of(columns[::-1].copy(), weights)
    copies = a.copy(), b.copy()
    total = a + b
    assert same_bits(a, copies[0])
    assert same_bits(b, copies[1])
    held = [getattr(total, f.name) for f in fields(total) if isinstance(getattr(total, f.name), np.ndarray)]
    sources = [columns, *(getattr(m, f.name) for m in (a, b) for f in fields(m) if isinstance(getattr(m, f.name), np.ndarray))]
    assert not any(np.shares_memory(one, other) for one in held for other in sources)


@given(st.data())
def test_mean_and_scatter_against_exact_fractions(data: st.DataObject):
    columns = data.draw(matrices(min_rows=1, max_rows=20, min_columns=2, max_columns=3))
    weights = data.draw(row_weights(len(columns)))
    assume(weights is None or weights.any())
    half = len(columns) // 2
    parts = [moments_of(columns[s], None if weights is None else weights[s]) for s in (slice(0, half), slice(half, None))]
    mean, scatter = exact_moments(columns, weights)
    two = Fraction(2)
    total = sum(fractions_of(np.ones(len(columns)) if weights is None else weights))
    for m in (moments_of(columns, weights), parts[0] + parts[1]):
        unit = [two ** int(e) for e in m.units]
        largest = [max(abs(Fraction(float(v))) for v in columns[:, j]) for j in range(columns.shape[1])]
        for j in range(len(unit)):
            got = (Fraction(float(m.mean[j])) + Fraction(float(m.mean_rest[j]))) * unit[j]
            assert abs(got - mean[j]) <= Fraction(1e-14) * largest[j]
            for i in range(len(unit)):
                got = Fraction(float(m.scatter[i, j])) * unit[i] * unit[j]
                # 13 digits of the spread of both columns; what is below the last bit of a column's largest value may vanish
                spread = [Fraction(scatter[s][s]) + total * (largest[s] * Fraction(EPS)) ** 2 for s in (i, j)]
                assert (got - scatter[i][j]) ** 2 <= Fraction(1e-13) ** 2 * spread[0] * spread[1]


@pytest.mark.parametrize("offset", [1e4, 1e8, 1e12])
@pytest.mark.parametrize("ordered", [False, True], ids=["shuffled", "ordered"])
def test_an_offset_costs_no_digits_within_a_tile_or_across_tiles(offset: float, ordered: bool):
    # ordered rows make the tiles' means differ most, which is where a rounded mean would cost digits
    z = np.random.default_rng(0).standard_normal(512)
    columns = np.column_stack([np.sort(z) if ordered else z, z[::-1]]) + offset
    m = moments_of(columns[:16])
    for at in range(16, 512, 16):
        m = m + moments_of(columns[at : at + 16])
    _, exact = exact_moments(columns)
    assert digits_of(np.diagonal(m.scatter), [exact[0][0], exact[1][1]]) >= 14
    assert digits_of(np.diagonal(moments_of(columns).scatter), [exact[0][0], exact[1][1]]) >= 14


@pytest.mark.parametrize("scale", SCALES)
def test_columns_beyond_the_range_of_squares(scale: float):
    z = np.random.default_rng(1).standard_normal((40, 3))
    columns = z * [scale, 1.0, 1.0]
    _, exact = exact_moments(columns)
    for m in (moments_of(columns), moments_of(columns[:17]) + moments_of(columns[17:])):
        assert np.isfinite(m.scatter).all()
        unit = [Fraction(2) ** int(e) for e in m.units]
        for i in range(3):
            got = Fraction(float(m.scatter[i, i])) * unit[i] ** 2
            assert digits_of([float(got / exact[i][i])], [1]) >= 14
    assert moments_of(columns).exponent[1] == 0


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in [*SCALES, 1.0, 0.0] for b in [*SCALES, 1.0, 0.0] if a != b])
def test_scales_mixed_across_tiles_and_within_one_column(first: float, second: float):
    z = np.random.default_rng(2).standard_normal((20, 2))
    columns = z * 1.0
    columns[:10, 0] *= first
    columns[10:, 0] *= second
    _, exact = exact_moments(columns)
    for m in (
        moments_of(columns),
        moments_of(columns[:10]) + moments_of(columns[10:]),
        moments_of(columns[10:]) + moments_of(columns[:10]),
    ):
        unit = Fraction(2) ** int(m.units[0])
        got = Fraction(float(m.scatter[0, 0])) * unit**2
        assert digits_of([float(got / exact[0][0])], [1]) >= 14


def test_zeros_and_then_the_smallest_numbers():
    tiles = [np.zeros((5, 2)), np.zeros((5, 2)), np.column_stack([[1e-200, -1e-200, 3e-200], [1.0, 2.0, 3.0]])]
    m = moments_of(tiles[0]) + moments_of(tiles[1])
    assert (m.units == 0).all()
    m = m + moments_of(tiles[2])
    assert m.exponent[0] < -600
    _, exact = exact_moments(np.vstack(tiles))
    got = Fraction(float(m.scatter[0, 0])) * Fraction(2) ** (2 * int(m.units[0]))
    assert digits_of([float(got / exact[0][0])], [1]) >= 14


@pytest.mark.parametrize("value", [0.1, 1e9, 1e9 + 0.1, -1 / 3, 1e-200, 1e200, 0.0])
@pytest.mark.parametrize("rows", [1, 7, 1000, 65536])
def test_constants_are_known_for_what_they_are(value: float, rows: int):
    columns = np.column_stack([np.full(rows, value), np.arange(rows, dtype=np.float64)])
    m = moments_of(columns)
    for _ in range(3):
        m = m + m
    m = m + moments_of(columns[:1])
    assert m.constant[0]
    assert m.constant[1] == (rows == 1)


def test_values_that_differ_in_the_last_bits_are_one_constant():
    columns = np.column_stack([np.where(np.arange(10) % 2, 0.3, 0.1 + 0.2), np.arange(10.0)])
    assert columns[0, 0] != columns[1, 0]
    assert moments_of(columns).constant.tolist() == [True, False]


def test_a_column_that_varies_little_is_no_constant():
    columns = np.column_stack([1e9 + 1e-4 * np.arange(10.0), np.arange(10.0)])
    assert not moments_of(columns).constant.any()
    assert CONSTANT < 1e-14  # 1e-13 of the mean is data


@pytest.mark.parametrize(("p", "rows", "most"), [(2, 65_536, 1e-15), (4, 65_536, 1e-15), (10, 32_768, 1e-15), (10, 32_768, 3e-7)])
def test_long_sums_of_few_columns_keep_their_digits(p: int, rows: int, most: float, monkeypatch: pytest.MonkeyPatch):
    """As of a whole tile: products with a nearly exact target, which BLAS would sum row by row."""
    for name, number in SHIPPED.items():
        monkeypatch.setattr(centred, name, number)
    rng = np.random.default_rng(p)
    x = rng.normal(size=(rows, p))
    y = x @ rng.normal(size=(p, 1)) + 1e-3 * rng.normal(size=(rows, 1))
    names = default_names("x", p)
    found = MomentsOf(names, ("y",), "double" if most < 1e-9 else "single").of(Block(0, rows, x, y))
    z = np.column_stack([x, y]).astype(np.longdouble)
    z -= z.mean(axis=0)
    size = np.sqrt((z * z).sum(axis=0))
    assert (np.abs(found.scatter - z.T @ z) <= most * np.outer(size, size)).all()


@pytest.mark.parametrize("precision", ["double", "single"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("p", "k"), [(1, 1), (3, 1), (3, 2), (2, 3), (5, 4), (40, 1), (40, 4)])
def test_scatter_is_symmetric_to_the_last_bit(p: int, k: int, weighted: bool, precision: str):
    rng = np.random.default_rng(0)
    rows, weights = rng.normal(size=(5_001, p + k)), rng.uniform(size=5_001) if weighted else None
    block = Block(0, 5_001, np.ascontiguousarray(rows[:, :p]), np.ascontiguousarray(rows[:, p:]), weights)
    found = MomentsOf(default_names("x", p), default_names("y", k), precision).of(block)
    assert (found.scatter == found.scatter.T).all()
    share = np.ones(5_001) if weights is None else weights
    expected = np.cov(rows, rowvar=False, aweights=share, ddof=0) * share.sum()
    np.testing.assert_allclose(found.scatter, expected, rtol=0, atol=share.sum() * (1e-14 if precision == "double" else 1e-6))


def test_moments_of_different_columns_are_refused():
    a = moments_of(np.ones((2, 2)))
    b = MomentsOf(("other",), ("y0",)).of(block_of(np.ones((2, 2))))
    with pytest.raises(UsageError, match="other"):
        a + b
    assert a.__add__(3) is NotImplemented  # type: ignore[arg-type]


def test_weights_that_overflow_end_in_an_error():
    columns = np.arange(8.0).reshape(4, 2)
    with pytest.raises(NumericalError, match="rows 0 to 3"):
        moments_of(columns, np.full(4, 1e308))
    m = moments_of(columns, np.full(4, 1e306))
    for _ in range(3):
        m = m + m
    with pytest.raises(NumericalError, match="sum of the weights"):
        m + m


def test_bytes_of_a_value_are_those_promised():
    m = moments_of(np.random.default_rng(0).standard_normal((9, 7)), n_targets=2)
    held = sum(getattr(m, f.name).nbytes for f in fields(m) if isinstance(getattr(m, f.name), np.ndarray))
    assert held <= MomentsOf(default_names("x", 5), default_names("y", 2)).nbytes


@pytest.mark.parametrize(("p", "k"), [(1, 1), (7, 2), (40, 1), (40, 3)])
@pytest.mark.parametrize("rows", [1, 255, 4096])
def test_bits_do_not_depend_on_where_in_memory_rows_and_workspace_lie(rows, p, k):
    rng = np.random.default_rng(rows)
    x, y, w = rng.normal(size=(rows, p)), rng.normal(size=(rows, k)), rng.random(rows)
    statistic, room = MomentsOf(default_names("x", p), default_names("y", k)), Buffer()
    for weights in (None, w):
        expected = statistic.of(Block(0, rows, x, y, weights))
        for shift in range(1, 9):
            moved = []
            for array in (x, y):
                memory = np.empty(array.size + 8)[shift : shift + array.size].reshape(array.shape)
                memory[:] = array
                moved.append(memory)
            assert same_bits(statistic.of(Block(0, rows, *moved, weights, room)), expected)


class Measured(Buffer):
    """Knows the most that was taken of it."""

    most = 0

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        self.most = max(self.most, nbytes)
        return super().take(nbytes)


@pytest.mark.parametrize(("mean", "copied"), [(0.0, False), (0.5, False), (3.0, True)])
def test_many_features_near_zero_are_multiplied_where_they_lie(mean: float, copied: bool):
    x, y = mean + np.random.default_rng(7).normal(size=(512, 20)), np.arange(512.0)[:, None]
    room = Measured()
    found = MomentsOf(default_names("x", 20), ("y",)).of(Block(0, len(x), x, y, None, room))
    assert (room.most > 2 * y.nbytes) == copied
    _, scatter = exact_moments(np.hstack([x, y]), None)
    size = np.sqrt(np.diagonal(found.scatter))
    for i, j in itertools.combinations_with_replacement(range(21), 2):
        assert abs(Fraction(float(found.scatter[i, j])) - scatter[i][j]) <= 2e-15 * size[i] * size[j]


@pytest.mark.parametrize(("value", "weight"), [(1e17, 1e-50), (1e20, 1e-60), (1e25, 1e-70)])
def test_far_rows_of_hardly_any_weight_leave_no_trace_where_others_are_centred_by_them(value, weight):
    rng = np.random.default_rng(6)
    n, every = 4096, 64
    columns, weights = 3.0 + rng.normal(size=(n, 2)), np.ones(n)
    columns[::every, 0], weights[::every] = value, weight
    found = moments_of(columns, weights)
    mean, scatter = exact_moments(columns, weights)
    assert found.mean[0] == pytest.approx(float(mean[0]), rel=1e-14)
    assert found.scatter[0, 0] == pytest.approx(float(scatter[0][0]), rel=1e-12)
    assert found.scatter.flags.c_contiguous


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("others", [1e8, -3e5, 1e-7])
def test_rows_by_which_others_are_centred_may_say_nothing_about_them(others, weighted):
    rng = np.random.default_rng(5)
    n, every = 4096, 64
    columns = np.column_stack([others + rng.normal(size=n), 7.0 + np.zeros(n), rng.normal(size=n)])
    columns[::every, 0] = 0.0  # which are just the rows that a provisional mean is made of
    weights = np.where(np.arange(n) % every, 1.0, 1e-12) if weighted else None
    found = moments_of(columns, weights)
    _, scatter = exact_moments(columns, weights)
    size = np.sqrt(np.diagonal(found.scatter))
    for i in (0, 2):
        for j in (0, 2):
            assert abs(Fraction(float(found.scatter[i, j])) - scatter[i][j]) <= 1e-13 * size[i] * size[j]
    assert found.constant.tolist() == [False, True, False]
