"""Rows that lack a value, rows that are not finite, weights, and parts of a split."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore

import streamlr
from streamlr.aggregates.cost import ResidualsOf
from streamlr.aggregates.moments import MomentsOf
from streamlr.aggregates.tree import Partial, Tree
from streamlr.dataset.blocks import Span
from streamlr.dataset.dataset import default_names
from streamlr.dataset.subset import Subset
from streamlr.descent.full import SumsOf
from streamlr.descent.scaling import Coordinates
from streamlr.errors import DataError, NonFiniteValue, NoRows, UsageError
from streamlr.passes.reduce import reduce

N, P = 9_000, 128  # tiles of 4,096 rows: three of them
NAN = np.nan


def make_rows(seed: int = 0, holes: int = 90) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, P)) + 5
    y = x.sum(axis=1) + rng.normal(size=N)
    weights = rng.uniform(0.5, 2, size=N)
    x[rng.integers(0, N, holes), rng.integers(0, P, holes)] = NAN
    y[rng.integers(0, N, 5)] = NAN
    weights[rng.integers(0, N, 5)] = NAN
    return x, y, weights


def stored(x, y, weights=None, *, chunks=1000, columns=P, y_chunks=700):
    group = zarr.open_group(MemoryStore(), mode="w")
    group.create_array("X", data=x, chunks=(chunks, columns))
    group.create_array("y", data=y, chunks=(y_chunks,))
    if weights is not None:
        group.create_array("w", data=weights, chunks=(y_chunks + 1,), config={"write_empty_chunks": True})
    return group


def opened(*arrays, missing="drop", **layout) -> streamlr.Dataset:
    weights = "w" if len(arrays) > 2 else None
    return streamlr.open_dataset(stored(*arrays, **layout), missing=missing, weights=weights)


def numbers(dataset: streamlr.Dataset) -> list[bytes]:
    moments = streamlr.accumulate(dataset)
    model = streamlr.fit(dataset)
    cost = streamlr.evaluate(model, dataset)
    return [np.asarray(a).tobytes() for a in (moments.n, moments.mean, moments.scatter, model.coef, cost.mse, cost.mae)]


def test_dropped_rows_are_those_that_lack_a_value():
    x, y, weights = make_rows()
    complete = ~(np.isnan(x).any(axis=1) | np.isnan(y) | np.isnan(weights))
    model = streamlr.fit(opened(x, y, weights))
    assert model.n_rows == complete.sum() < N
    assert model.n_dropped == N - complete.sum()
    expected = {f"x{j}": int(count) for j, count in enumerate(np.isnan(x).sum(axis=0)) if count}
    expected |= {"y": int(np.isnan(y).sum()), "weights": int(np.isnan(weights).sum())}
    assert model.dropped_by_column == expected
    root = np.sqrt(weights[complete])[:, None]
    design = np.column_stack([np.ones(N), x])[complete] * root
    oracle = np.linalg.lstsq(design, y[complete] * root[:, 0], rcond=None)[0]
    np.testing.assert_allclose(model.coef, oracle[1:], rtol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", [{"chunks": N}, {"chunks": 997, "columns": 7}, {"chunks": 64, "y_chunks": 4_000}])
def test_dropping_has_the_same_bits_for_any_layout(layout, weighted):
    arrays = make_rows()[: 3 if weighted else 2]
    assert numbers(opened(*arrays, **layout)) == numbers(opened(*arrays))


def test_dropping_has_the_same_bits_for_dask_arrays():
    x, y, _ = make_rows()
    expected = numbers(opened(x, y))
    dataset = streamlr.Dataset.of_rows(
        *(
            streamlr.Dataset(da.from_array(x, chunks=(1_300, 11)), da.from_array(y, chunks=450)).__dict__[k]
            for k in ("features", "targets")
        ),
        None,
        [f"x{j}" for j in range(P)],
        ["y"],
        missing="drop",
    )
    assert numbers(dataset) == expected


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(0, N - 1), min_size=1, max_size=20), chunks=st.integers(150, 3_000), seed=st.integers(0, 9))
def test_dropping_at_random_places_has_the_same_bits(rows, chunks, seed):
    rng = np.random.default_rng(seed)
    x = np.ones((N, 8)) + rng.normal(size=(N, 8))
    y = x @ rng.normal(size=8)
    x[rows, rng.integers(0, 8, len(rows))] = NAN
    assert numbers(opened(x, y, chunks=chunks, columns=3)) == numbers(opened(x, y, chunks=N, columns=8))


def leaf_nodes(dataset: streamlr.Dataset) -> dict[int, bytes]:
    """The value of every tile by itself."""
    rows = dataset.tile_rows
    values = {}
    for number, start in enumerate(range(0, N, rows)):
        partial = Partial(Tree(N, rows), MomentsOf(dataset.feature_names, dataset.target_names))
        for block in dataset.blocks(Span(start, min(start + rows, N)), lambda tally: None):
            partial.take(block)
        assert list(partial.nodes) == [(0, number)]
        values[number] = partial.nodes[0, number].scatter.tobytes()
    return values


def test_a_dropped_row_changes_no_other_tile():
    x, y, _ = make_rows(holes=0)
    y[np.isnan(y)] = 0.0
    before = leaf_nodes(opened(x, y))
    for row in (0, 4_095, 4_096, 8_191, N - 1):
        lacking = x.copy()
        lacking[row, 3] = NAN
        after = leaf_nodes(opened(lacking, y))
        assert {tile for tile in before if before[tile] != after[tile]} == {row // 4_096}


@pytest.mark.parametrize("value", [NAN, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["X", "y", "weights"])
def test_a_value_that_is_not_finite_is_named(place, value):
    x, y, weights = (np.nan_to_num(array, nan=1.0) for array in make_rows())
    row = 4_711
    {"X": x[:, 17], "y": y, "weights": weights}[place][row] = value
    name = {"X": "x17", "y": "y", "weights": "weights"}[place]
    with pytest.raises(NonFiniteValue, match=f"row 4,711, column '{name}'.*(missing='drop'|repair)") as caught:
        streamlr.fit(opened(x, y, weights, missing="error"))
    assert caught.value.exit_status == 3
    if np.isinf(value):
        with pytest.raises(NonFiniteValue, match=f"row 4,711, column '{name}'.*not a missing value"):
            streamlr.fit(opened(x, y, weights, missing="drop"))
    else:
        assert streamlr.fit(opened(x, y, weights, missing="drop")).dropped_by_column == {name: 1}


COORDINATES = Coordinates(np.zeros(P), np.ones(P), np.zeros(1), np.ones(1), True, 1.0)
STATISTICS = {
    "moments": lambda weighted: MomentsOf(default_names("x", P), ("y",)),
    "moments of single precision": lambda weighted: MomentsOf(default_names("x", P), ("y",), "single"),
    "residuals": lambda weighted: ResidualsOf(np.ones((P, 1)), np.zeros(1)),
    "residuals of zeros": lambda weighted: ResidualsOf(np.zeros((P, 1)), np.zeros(1)),
    "gradient": lambda weighted: SumsOf(COORDINATES, np.ones((P + 1, 1))),
    "gradient at zero": lambda weighted: SumsOf(COORDINATES, np.zeros((P + 1, 1))),
}


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("value", [NAN, np.inf, -np.inf])
@pytest.mark.parametrize("chunks", [N, 997])  # whole tiles, and tiles that come in parts
@pytest.mark.parametrize("weight", [None, 1.0, 0.0])
@pytest.mark.parametrize("place", ["X", "y"])
def test_sums_betray_every_value_that_is_not_finite(name, value, chunks, weight, place):
    """Nobody looks for such a value before the sums are made, so it must show in them: even in a row that weighs nothing."""
    x, y = (np.nan_to_num(array, nan=1.0) for array in make_rows()[:2])
    {"X": x[:, 17], "y": y}[place][8_500] = value
    weights = None if weight is None else np.where(np.arange(N) < 8_192, 1.0, weight)  # all of the last tile
    arrays = (x, y) if weights is None else (x, y, weights)
    with pytest.raises(NonFiniteValue, match=f"row 8,500, column '{'x17' if place == 'X' else 'y'}'"):
        reduce(opened(*arrays, missing="error", chunks=chunks), STATISTICS[name](weight is not None), task="sums")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["residuals", "residuals of zeros"])
@pytest.mark.parametrize("value", [NAN, -np.inf])
@pytest.mark.parametrize("weight", [None, 0.0])
def test_sums_of_shorter_numbers_betray_them_too(name, value, weight, dtype):
    x, y = (np.nan_to_num(array, nan=1.0) for array in make_rows()[:2])
    x[8_500, 17] = value
    arrays = (x.astype(dtype), y) if weight is None else (x.astype(dtype), y, np.where(np.arange(N) < 8_192, 1.0, weight))
    with pytest.raises(NonFiniteValue, match="row 8,500, column 'x17'"):
        reduce(opened(*arrays, missing="error", chunks=997), STATISTICS[name](weight is not None), task="sums")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dropping_rows_of_shorter_numbers_has_the_same_bits_for_any_layout(dtype):
    x, y, weights = make_rows()
    arrays = x.astype(dtype), y, weights
    expected = numbers(opened(*arrays))
    for layout in ({"chunks": 997, "columns": 7}, {"chunks": 64, "y_chunks": 4_000}):
        assert numbers(opened(*arrays, **layout)) == expected


def test_values_at_the_edge_of_float64_are_not_taken_for_infinities():
    x = np.array([[1e308], [1e308], [-1e308], [1.5e308]])
    dataset = streamlr.Dataset(x, np.arange(4.0))
    assert streamlr.accumulate(dataset).n == 4


def test_a_negative_weight_is_named():
    x, y, weights = (np.nan_to_num(array, nan=1.0) for array in make_rows())
    weights[1_234] = -0.5
    with pytest.raises(DataError, match=r"row 1,234.*the weight -0\.5; allowed.*from 0 on"):
        streamlr.fit(opened(x, y, weights))


@pytest.mark.parametrize("column", [0, P - 1])
def test_no_row_is_left(column):
    x, y, _ = make_rows()
    x[:, column] = NAN
    with pytest.raises(NoRows, match="row") as caught:
        streamlr.fit(opened(x, y))
    assert caught.value.exit_status == 3


def test_a_masked_value_is_missing_and_not_a_number():
    x = np.ma.array(np.arange(20.0).reshape(10, 2), mask=False)
    x[4, 1] = np.ma.masked
    y = np.arange(10.0)
    with pytest.raises(NonFiniteValue, match="row 4, column 'x1'"):
        streamlr.fit(streamlr.Dataset(x, y))
    with pytest.raises(NonFiniteValue, match="row 4, column 'x1'"):
        streamlr.fit(streamlr.Dataset(da.from_array(x, chunks=(3, 2), asarray=False), y))


def test_missing_has_two_policies():
    with pytest.raises(UsageError, match=r"'zero'.*'error' and 'drop'"):
        opened(np.ones((N, P)), np.ones(N), missing="zero")


def test_a_split_is_a_partition():
    x, y, weights = make_rows()
    dataset = opened(x, y, weights)
    train, test = dataset.split(0.2, seed=7)
    assert train.n_rows + test.n_rows == N
    assert abs(test.n_rows - 0.2 * N) < 5 * np.sqrt(N * 0.16)
    chosen = test.subsets[0].holds(0, N)
    complete = ~(np.isnan(x).any(axis=1) | np.isnan(y) | np.isnan(weights))
    for part, rows in ((train, ~chosen), (test, chosen)):
        model = streamlr.fit(part)
        assert part.n_rows == rows.sum()
        assert model.n_rows == (rows & complete).sum()
        assert model.n_dropped == (rows & ~complete).sum()
        assert streamlr.evaluate(model, part).n == model.n_rows
    whole = streamlr.accumulate(train) + streamlr.accumulate(test)
    np.testing.assert_allclose(whole.scatter, streamlr.accumulate(dataset).scatter, rtol=1e-9, atol=1e-6)


def test_a_split_is_reproducible_for_any_layout():
    x, y, _ = make_rows()
    parts = [opened(x, y, **layout).split(0.3, seed=3) for layout in ({}, {"chunks": 333, "columns": 9}, {"chunks": N})]
    for one, other in zip(parts[0], parts[1], strict=True):
        assert numbers(one) == numbers(other)
    assert numbers(parts[0][0]) == numbers(parts[2][0])
    again = opened(x, y).split(0.3, seed=4)
    assert numbers(again[1]) != numbers(parts[0][1])


def test_a_part_can_be_split_again():
    dataset = streamlr.Dataset(np.random.default_rng(0).normal(size=(N, 2)), np.zeros(N))
    train, test = dataset.split(0.5, seed=1)
    first, second = train.split(0.5, seed=2)
    assert first.n_rows + second.n_rows == train.n_rows
    assert abs(first.n_rows - N / 4) < 300
    assert streamlr.accumulate(first).n == first.n_rows
    assert dataset.n_rows == N
    assert len({part.fingerprint for part in (dataset, train, test, first, second)}) == 5


def test_a_part_is_split_by_another_hash_than_the_one_that_made_it():
    dataset = streamlr.Dataset(np.zeros((100_000, 1)), np.zeros(100_000))
    for seed in (0, 1, 2**63):
        train, test = dataset.split(0.1, seed=seed)
        assert abs(test.n_rows - 10_000) < 500  # more than five standard deviations
        inner, held_out = train.split(0.1, seed=seed)
        assert abs(held_out.n_rows - 9_000) < 500
        assert inner.n_rows + held_out.n_rows == train.n_rows


def test_another_seed_is_no_shift_of_the_rows():
    chosen = [Subset(0.5, seed, 0, complement=False).holds(0, 5000) for seed in range(3)]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        for shift in range(-3, 4):
            agreement = (chosen[a][10 + shift : 4000 + shift] == chosen[b][10:4000]).mean()
            assert abs(agreement - 0.5) < 0.05


def test_a_part_without_rows_is_an_error():
    with pytest.raises(NoRows):
        streamlr.fit(streamlr.Dataset(np.zeros((2, 1)), np.zeros(2)).split(1e-9, seed=0)[1])


def test_a_value_that_is_missing_outside_the_part_does_not_matter():
    x, y = np.random.default_rng(0).normal(size=(100, 2)), np.ones(100)
    dataset = streamlr.Dataset(x, y)
    train, _ = dataset.split(0.5, seed=0)
    outside = int(np.argmin(train.subsets[0].holds(0, 100)))
    x[outside, 0] = NAN
    assert streamlr.accumulate(train).n == train.n_rows
    with pytest.raises(NonFiniteValue, match=f"row {outside}, column 'x0'"):
        streamlr.accumulate(dataset)


@pytest.mark.parametrize(("fraction", "seed"), [(0, 0), (1, 0), (-1, 0), (NAN, 0), (0.5, -1)])
def test_a_split_that_is_none(fraction, seed):
    with pytest.raises(UsageError, match="allowed"):
        streamlr.Dataset(np.ones((3, 1))).split(fraction, seed=seed)
