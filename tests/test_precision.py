"""Products in single precision: their digits, their range, and where they are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import same_bits

import streamlr
from streamlr import Direct
from streamlr.errors import RankWarning, UsageError

SINGLE = Direct(precision="single")


def make_rows(n: int, p: int, seed: int = 0, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, p)) + offset).astype(np.float32)
    return x, x @ rng.normal(size=p) + rng.normal(size=n), rng.uniform(0.5, 1.5, n)


@given(seed=st.integers(0, 99), offset=st.sampled_from([0.0, 30.0, 1e4]), weighted=st.booleans())
def test_six_digits_of_independent_columns(seed, offset, weighted):
    x, y, w = make_rows(9_000, 40, seed, offset)
    dataset = streamlr.Dataset(x, y, w if weighted else None)
    exact, found = streamlr.fit(dataset), streamlr.fit(dataset, SINGLE)
    assert np.abs(found.coef - exact.coef).max() < 1e-6 * np.abs(exact.coef).max()
    assert found.intercept == pytest.approx(exact.intercept, abs=1e-6 * (1 + abs(offset)) * np.abs(exact.coef).sum())
    assert found.cost.mse == pytest.approx(exact.cost.mse, abs=1e-6 * y.var())
    assert (found.coef != exact.coef).any()  # it acts
    assert 4 < found.digits < 6 < exact.digits


def test_moments_say_how_they_were_made():
    x, y, _ = make_rows(5_000, 5)
    single = streamlr.accumulate(streamlr.Dataset(x[:2_000], y[:2_000]), precision="single")
    double = streamlr.accumulate(streamlr.Dataset(x[2_000:], y[2_000:]))
    assert (single.precision, double.precision) == ("single", "double")
    assert (single + double).precision == (double + single).precision == "single"
    assert streamlr.solve(single + double).digits < 6
    with pytest.raises(UsageError, match="double: give it to `accumulate`"):
        streamlr.solve(double, SINGLE)


def test_the_same_bits_for_any_chunks():
    import dask.array as da

    x, y, w = make_rows(9_000, 40)
    whole = streamlr.accumulate(streamlr.Dataset(x, y, w), precision="single")
    for rows in (1_000, 777):
        parts = (da.from_array(array, chunks=(rows, *array.shape[1:])) for array in (x, y, w))
        assert same_bits(streamlr.accumulate(streamlr.Dataset(*parts), precision="single"), whole)


@pytest.mark.parametrize("factor", [1e-30, 1e-15, 1e15, 1e30])
def test_columns_and_weights_beyond_what_squares_of_float32_hold(factor):
    x, y, w = make_rows(3_000, 4)
    exact = streamlr.fit(streamlr.Dataset(x, y, w)).coef
    scaled = streamlr.fit(streamlr.Dataset((x * np.float32(factor)).astype(np.float32), y * factor, w), SINGLE)
    np.testing.assert_allclose(scaled.coef, exact, atol=1e-5)
    for power in (2, 5):
        weighted = streamlr.fit(streamlr.Dataset(x, y, w * factor**power), SINGLE)
        np.testing.assert_allclose(weighted.coef, exact, atol=1e-5)


def test_columns_too_nearly_dependent_are_told():
    x, y, _ = make_rows(3_000, 4)
    x[:, 3] = x[:, 2] + 1e-4 * x[:, 3]
    with pytest.warns(RankWarning, match="x3"):
        assert streamlr.fit(streamlr.Dataset(x, y), SINGLE).rank == 3
    assert streamlr.fit(streamlr.Dataset(x, y)).rank == 4


@pytest.mark.parametrize("dtype", ["float64", "int32", "int64", "uint64"])
def test_wider_numbers_are_refused(dtype):
    x, y, _ = make_rows(100, 2)
    for call in (lambda data: streamlr.fit(data, SINGLE), lambda data: streamlr.accumulate(data, precision="single")):
        with pytest.raises(UsageError, match=f"would round the {dtype} numbers of 'X'; allowed are.*leave precision"):
            call(streamlr.Dataset(x.astype(dtype), y))


@pytest.mark.parametrize("dtype", ["float16", "int8", "int16", "uint16", "bool"])
def test_narrower_numbers_are_welcome(dtype):
    x, y, _ = make_rows(1_000, 2)
    dataset = streamlr.Dataset((10 * x > 0 if dtype == "bool" else 10 * np.abs(x)).astype(dtype), y)
    exact = streamlr.fit(dataset).coef
    np.testing.assert_allclose(streamlr.fit(dataset, SINGLE).coef, exact, atol=1e-5 * np.abs(exact).max())


def test_another_word_is_refused():
    with pytest.raises(UsageError, match="precision is 'half'; allowed are 'double', 'single'"):
        Direct(precision="half")
    with pytest.raises(UsageError, match="precision is 'half'"):
        streamlr.accumulate(streamlr.Dataset(*make_rows(10, 2)[:2]), precision="half")
