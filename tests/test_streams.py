"""Streams that go down side by side: which rows each has, the mean of where they lead, and the same bits whoever runs them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import streamlr
from streamlr import Descent
from streamlr.dataset.blocks import Block
from streamlr.descent.mixing import mixed
from streamlr.descent.seen import Seen
from streamlr.descent.steps import Iterate
from streamlr.descent.updates import Average, MomentumState
from streamlr.errors import ChunkMissing, Diverged, MemoryLimitExceeded, UsageError
from streamlr.passes import order

N, P, CHUNK = 9_050, 6, 500  # 19 chunks, the last of 50 rows
Array = np.ndarray[Any, np.dtype[np.float64]]


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Each chunk is a unit."""
    monkeypatch.setattr(order, "UNIT_BYTES", 1)


@pytest.fixture(scope="module")
def rows() -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(3)
    X = rng.normal(size=(N, P)) @ rng.normal(size=(P, P)) + 5
    return X, X @ rng.normal(size=P) + rng.normal(size=N), rng.integers(0, 4, N).astype(float)


@pytest.fixture(scope="module")
def store(rows, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("streams") / "rows.zarr"
    group = zarr.open_group(path, mode="w")
    for name, values in zip("Xyw", rows, strict=True):
        group.create_array(name, data=values, chunks=(CHUNK, P) if name == "X" else (CHUNK,))
    return path


def fitted(store: Path, *, weights: str | None = None, threads: int = 2, **options: Any) -> Any:
    with dask.config.set(num_workers=threads):
        return streamlr.fit(streamlr.open_dataset(store, weights=weights), Descent(**{"streams": 4, "max_epochs": 3} | options))


def bits(model: Any) -> tuple[Any, ...]:
    history = [dataclasses.replace(record, seconds=0.0).to_dict() for record in model.history]
    return model.coef.tobytes(), model.intercept, model.cost.mse, history, model.stopped


# --- what it is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("streams", [2, 3, 19])
def test_it_is_the_loop_written_out(store, rows, streams, weighted):
    """Chunks dealt in turn, the textbook's steps within each stream, and the mean by rows."""
    X, y, w = rows
    size, rate, b = 32, 0.004, np.zeros(P + 1)
    design, scale = np.column_stack([X, np.ones(N)]), w.mean() if weighted else 1.0
    met = []
    for _ in range(2):
        ends, counts, squares, total = [], [], 0.0, 0.0
        for stream in range(streams):
            own = np.concatenate([np.arange(i * CHUNK, min((i + 1) * CHUNK, N)) for i in range(stream, 19, streams)])
            here = b.copy()
            for start in range(0, len(own), size):
                batch = own[start : start + size]
                factor = w[batch] / scale if weighted else np.ones(len(batch))
                residual = design[batch] @ here - y[batch]
                squares, total = squares + factor @ residual**2, total + factor.sum()
                here -= rate * 2 / size * design[batch].T @ (factor * residual)
            ends.append(here)
            counts.append(len(own))
        b = np.average(ends, axis=0, weights=counts)
        met.append(squares / total)
    model = fitted(
        store,
        weights="w" if weighted else None,
        streams=streams,
        shuffle=False,
        scale=None,
        learning_rate=rate,
        batch_size=size,
        average=False,
        max_epochs=2,
        tol=0,
    )
    np.testing.assert_allclose([*model.coef, model.intercept], b, rtol=1e-9)
    np.testing.assert_allclose([record.cost.mse for record in model.history], met, rtol=1e-9)
    assert [record.rows for record in model.history] == [N, 2 * N]
    longest = max(-(-sum(min(CHUNK, N - i * CHUNK) for i in range(s, 19, streams)) // size) for s in range(streams))
    assert [record.steps for record in model.history] == [longest, 2 * longest]


def test_one_stream_is_the_textbook(store):
    assert bits(fitted(store, streams=1)) == bits(streamlr.fit(streamlr.open_dataset(store), Descent(max_epochs=3)))


@pytest.mark.parametrize("update", ["plain", "momentum", "nesterov", "adam"])
@pytest.mark.parametrize("mode", ["minibatch", "sgd"])
def test_defaults_come_close_to_the_exact_fit(store, mode, update):
    exact = streamlr.fit(streamlr.open_dataset(store)).cost.mse
    settings: dict[str, Any] = {"max_epochs": 40, "tol": 0} if update == "adam" else {"max_epochs": 10}
    if mode == "minibatch":
        settings["batch_size"] = 16  # few rows are few steps
    for streams in (2, 8):
        assert fitted(store, mode=mode, update=update, streams=streams, **settings).cost.mse < exact * 1.001


def test_each_row_is_seen_once_in_another_order_each_epoch(store, rows):
    dataset, seen = streamlr.open_dataset(store), []
    for number in (0, 1):
        with dask.config.set(num_workers=1):
            streams = streams_of(dataset)
            seen.append(streams.epoch(number, list_of_rows))
    for parts in seen:
        found = np.concatenate(parts)
        np.testing.assert_array_equal(
            found[np.lexsort(found.T)], np.column_stack(rows[:2])[np.lexsort(np.column_stack(rows[:2]).T)]
        )
    assert not any(len(a) == len(b) and (a == b).all() for a, b in zip(*seen, strict=True))


def list_of_rows(stretches: Any) -> Array:
    return np.concatenate([rows.copy() for rows in stretches])


def as_read(rows: Block) -> Array:
    return np.hstack((rows.x, rows.y))


def streams_of(dataset: streamlr.Dataset) -> Any:
    from streamlr.passes.streams import ParallelStreams

    settings: dict[str, Any] = {"tasks_at_once": 1, "task": "t", "progress": None}
    return ParallelStreams(dataset, order.Order(16, 0, streams=4), as_read, **settings)


finite = st.floats(-1e3, 1e3).filter(lambda value: value == 0 or abs(value) > 1e-3)


@given(st.lists(st.tuples(finite, finite, st.floats(0.5, 4) | st.just(0.0)), min_size=1, max_size=30), st.data())
def test_what_streams_met_is_what_one_would_have(rows, data):
    residuals, targets, weights = (np.array(column)[:, None] for column in zip(*rows, strict=True))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    whole = Seen.nothing(1).of(residuals, targets, weights, 5)
    joined = Seen.nothing(1)
    for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        joined = joined.joined(Seen.nothing(1).of(residuals[a:b], targets[a:b], weights[a:b], 1))
    assert (joined.rows, joined.steps) == (len(rows), len(cuts) + 1)
    np.testing.assert_allclose(joined.weight, whole.weight)
    np.testing.assert_allclose(joined.squares, whole.squares, rtol=1e-9, atol=1e-6)


def test_the_mean_is_by_rows_and_of_all_that_a_descent_remembers():
    def end(value: float, step: int) -> Iterate:
        b = np.full((2, 1), value)
        return Iterate(b, np.eye(2) * value, MomentumState(b * 10), Average(b * 100, 1.0), b * 1000, step)

    start = end(0.0, 7)
    parts = [
        (end(1.0, 9), Seen.nothing(1)._replace(rows=30, weight=1.0)),
        (end(5.0, 8), Seen.nothing(1)._replace(rows=10, weight=9.0)),
    ]
    here, seen = mixed(start, parts)
    assert here.b[0, 0] == 2.0
    assert here.transform is not None
    assert here.transform[0, 0] == 2.0
    assert here.memory.velocity[0, 0] == 20.0
    assert here.average.b[0, 0] == pytest.approx(200 * 40 / 41)
    assert here.gradients[0, 0] == 6000.0
    assert (here.step, seen.rows) == (9, 40)
    assert mixed(start, [(end(1.0, 7), Seen.nothing(1))])[0] is start  # a stream without rows has no say


# --- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"mode": "sgd"}, {"validation": 0.2}, {"shuffle": False}, {"update": "adam", "max_epochs": 2}]
)
def test_the_same_bits_on_any_threads(store, options):
    expected = bits(fitted(store, threads=1, **options))
    for threads in (2, 4):
        assert bits(fitted(store, threads=threads, **options)) == expected
    assert bits(fitted(store, **options, streams=3)) != expected


def test_the_same_bits_under_any_memory_limit(store):
    dataset = streamlr.open_dataset(store)
    plan = streamlr.plan(dataset, Descent(streams=4))
    assert plan.tasks_at_once > 1
    least = plan.base_bytes + plan.result_bytes + plan.task_bytes + 50_000_000
    narrow = streamlr.fit(dataset, Descent(streams=4, max_epochs=3), memory_limit=least)
    assert bits(narrow) == bits(fitted(store))


def test_dask_arrays_have_the_bits_of_their_blocks(rows):
    X, y, _ = rows
    lazy = streamlr.Dataset(da.from_array(X, chunks=(CHUNK, P)), da.from_array(y, chunks=CHUNK))
    models = []
    for threads in (1, 3):
        with dask.config.set(num_workers=threads):
            models.append(streamlr.fit(lazy, Descent(streams=4, max_epochs=2)))
    assert bits(models[0]) == bits(models[1])


class Stop(BaseException):
    pass


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(store, tmp_path):
    expected, path = bits(fitted(store, max_epochs=4)), tmp_path / "run.checkpoint"
    dataset, told = streamlr.open_dataset(store), []

    def stop(event: Any) -> None:
        told.append(event)
        if sum(event.task == "minibatch" and event.rows == event.rows_total and not event.note for event in told) == 3:
            raise Stop

    with pytest.raises(Stop):
        streamlr.fit(dataset, Descent(streams=4, max_epochs=4), checkpoint=path, progress=stop)
    assert path.exists()
    assert bits(streamlr.fit(dataset, Descent(streams=4, max_epochs=4), checkpoint=path)) == expected
    with pytest.raises(UsageError, match="streams was 4 and is 2"):
        streamlr.fit(dataset, Descent(streams=2, max_epochs=4), checkpoint=path)


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_missing_chunk_is_named(store, rows, tmp_path):
    group = zarr.open_group(tmp_path / "s.zarr", mode="w")
    group.create_array("X", data=rows[0], chunks=(CHUNK, P))
    group.create_array("y", data=rows[1], chunks=(CHUNK,))
    dataset = streamlr.open_dataset(tmp_path / "s.zarr")

    def remove(event: Any) -> None:
        (tmp_path / "s.zarr" / "X" / "c" / "11" / "0").unlink(missing_ok=True)

    with pytest.raises(ChunkMissing, match=r"chunk 11\.0 of array 'X'"):
        streamlr.fit(dataset, Descent(streams=4), progress=remove)


@pytest.mark.parametrize("update", ["plain", "momentum"])
@pytest.mark.parametrize("rate", [10.0, 1e200])
def test_a_rate_that_is_too_high_diverges(store, update, rate):
    """Without a warning of NumPy's, also of what the rule remembers."""
    with pytest.raises(Diverged, match="choose a lower one"):
        fitted(store, learning_rate=rate, scale=None, update=update)


def test_each_stream_has_a_buffer_that_is_planned(store):
    dataset = streamlr.open_dataset(store)
    two, four = (streamlr.plan(dataset, Descent(streams=streams)) for streams in (2, 4))
    assert four.n_tasks == 5
    assert two.task_bytes - four.task_bytes >= (10 - 5) * CHUNK * (P + 2) * 8  # rows of a stream, which its buffer holds
    with pytest.raises(MemoryLimitExceeded, match="a smaller buffer_rows mixes less"):
        streamlr.fit(dataset, Descent(streams=4), memory_limit=four.base_bytes + 1000)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "gd", "streams": 2}, "streams is no option of mode 'gd'"),
        ({"log_every": 100, "streams": 2}, "log_every is for records within an epoch"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(UsageError, match=words):
        Descent(**options)


def test_more_streams_than_chunks(store):
    with pytest.raises(UsageError, match=r"streams is 20, and the rows are in 19 chunk\(s\)"):
        fitted(store, streams=20)


def test_small_chunks_are_shared_too(store, monkeypatch):
    """Which one stream would read in one piece."""
    monkeypatch.setattr(order, "UNIT_BYTES", 4 * 2**20)
    dataset = streamlr.open_dataset(store)
    assert [len(order.unit_spans(dataset, streams)) for streams in (1, 2, 4, 19, 20)] == [1, 3, 5, 19, 19]
    assert fitted(store, streams=19).history[-1].rows == 3 * N
    X = np.random.default_rng(0).normal(size=(100, 2))
    assert streamlr.fit(streamlr.Dataset(X, X[:, 0]), Descent(streams=4, batch_size=1, max_epochs=2)).history[-1].rows == 200


def test_time_that_is_used_up_ends_it_after_an_epoch(store):
    model = fitted(store, max_seconds=0.0, max_epochs=5)
    assert len(model.history) == 1
    assert model.stopped == "0 seconds were used (max_seconds)"
