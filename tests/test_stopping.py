"""When a descent stops, and what it says of its way: rules as pure functions, and through whole fits."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import streamlr
from streamlr import Descent
from streamlr.aggregates.cost import Cost
from streamlr.descent.stopping import Record, chosen, falling, flat, level, spent, verdict


def record(r2: float, *, epoch: int = 1, norm: float = 1.0, held_out: float | None = None, seconds: float = 0.0, complete=True):
    def cost(share: float) -> Cost:
        return Cost(1 - share, share, 10, 0.5, 10.0)

    validation = None if held_out is None else cost(held_out)
    return Record(epoch, epoch, 10 * epoch, 0.1, cost(r2), validation, norm, None, "standard", seconds, complete)


def history_of(*watched: float) -> list[Record]:
    return [record(1 - value, epoch=epoch) for epoch, value in enumerate(watched, start=1)]


def test_flat_waits_for_its_patience():
    falling = history_of(1.0, 0.5, 0.4999, 0.4998)
    assert flat(falling, 1e-2, 3) is None  # the best of the last three is half of what was before
    assert flat([*falling, record(0.5002, epoch=5)], 1e-2, 3) == (
        "the training cost has not improved by more than 0.01 of itself for 3 epochs (learning rate 0.1)"
    )
    assert flat([*falling, record(0.5002, epoch=5)], 1e-5, 3) is None
    assert flat([*falling, record(0.5002, epoch=5)], 1e-2, 4) is None


@given(st.lists(st.floats(0.01, 1.0), max_size=12), st.floats(1e-6, 0.5), st.integers(1, 4))
def test_flat_means_that_no_late_cost_beat_the_early_ones(watched: list[float], tol: float, patience: int):
    history = history_of(*watched)
    seen = [entry.watched for entry in history]  # 1 - (1 - x) is not x to the last bit
    late = seen[-patience:]
    expected = len(seen) > patience and all(value >= (1 - tol) * min(seen[:-patience]) for value in late)
    assert bool(flat(history, tol, patience)) == expected
    assert flat(history, 0.0, patience) is None
    assert flat(history, None, patience) is None


def test_flat_looks_at_epochs_that_ended_and_at_held_out_rows_first():
    inside = [record(0.5, epoch=epoch, complete=False) for epoch in range(9)]
    assert flat(inside, 1e-3, 1) is None
    worse = [record(0.5 + 0.1 * epoch, epoch=epoch, held_out=0.4 - 0.01 * epoch) for epoch in range(4)]
    assert flat(worse, 1e-3, 3) == (
        "the validation cost has not improved by more than 0.001 of itself for 3 epochs (learning rate 0.1)"
    )
    assert flat([record(0.5 + 0.1 * epoch, epoch=epoch) for epoch in range(4)], 1e-3, 3) is None


def test_a_perfect_fit_is_flat():
    assert flat(history_of(0.5, 0.0, 0.0, 0.0), 1e-6, 2)


def test_level_compares_with_the_start():
    assert level([record(0.5, norm=1e-3)], 1.0, 1e-2) == "the gradient's norm has fallen to 0.01 of what it was at the start"
    assert level([record(0.5, norm=1e-3)], 1.0, 1e-4) is None
    assert level([record(0.5, norm=0.0)], 0.0, 1e-9)
    assert level([record(0.5, norm=0.0)], 1.0, 0.0) is None
    assert level([], 1.0, 0.5) is None


def test_spent_counts_epochs_and_seconds():
    options = Descent(max_epochs=1_000, max_seconds=2.5)
    assert spent(1_000, 0.0, options) == "all 1,000 epochs were used (max_epochs)"
    assert spent(3, 2.5, options) == "2.5 seconds were used (max_seconds)"
    assert spent(999, 2.4, options) is None


def test_the_verdict_is_the_first_reason():
    options = Descent(max_epochs=1, gradient_tol=0.5)
    assert "gradient" in verdict([record(0.5, norm=0.1)], 1.0, options)
    assert "epochs" in verdict([record(0.5, norm=0.9)], 1.0, options)
    assert verdict([record(0.5, norm=0.9)], 1.0, Descent(max_epochs=2, gradient_tol=0.5)) == ""


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3_000, 4))
    return x, x @ [1.0, -2.0, 0.5, 0.0] + 3 + rng.standard_normal(3_000)


@pytest.fixture(scope="module")
def dataset(rows):
    return streamlr.Dataset(*rows)


@pytest.mark.parametrize("mode", ["minibatch", "sgd", "gd"])
def test_each_reason_is_found_in_each_mode(mode: str, dataset):
    def stopped(**options) -> str:
        return streamlr.fit(dataset, Descent(mode, **options)).stopped

    assert re.fullmatch(
        r"all 2 epochs were used \(max_epochs\)(, and the last of them still lowered the cost by [0-9.]+%: allow more, or choose "
        r"solver='normal', which is exact)?",
        stopped(max_epochs=2, tol=0.0, gradient_tol=0.0),
    )
    assert re.fullmatch(
        r"the training cost has not improved by more than 0\.01 of itself for 2 epochs \(learning rate [0-9.e-]+\)",
        stopped(tol=1e-2, patience=2, gradient_tol=0.0),
    )
    assert stopped(gradient_tol=0.5, tol=0.0) == "the gradient's norm has fallen to 0.5 of what it was at the start"
    assert stopped(max_seconds=0.0, tol=0.0, gradient_tol=0.0) == "0 seconds were used (max_seconds)"


def test_a_cost_that_still_falls_is_told():
    assert falling(history_of(1.0, 0.5)).startswith(", and the last of them still lowered the cost by 50.0%: allow more")
    assert falling(history_of(1.0, 0.9995)) == ""
    assert falling(history_of(1.0)) == ""
    assert falling(history_of(*np.linspace(1, 0.98, 200))).startswith(", and the last of them still lowered the cost by 0.2%")


def test_the_chosen_record_is_the_last_of_the_best_behind_the_hold():
    history = history_of(1.0, 0.1, 0.5, 0.50001, 0.6)
    steps = history[1].steps
    assert chosen(history, steps) is history[3]
    assert chosen(history, 0) is history[1]
    assert chosen(history, 10**9) is history[-1]
    assert chosen([], 0) is None


def test_patience_is_the_number_of_epochs_that_are_waited(dataset):
    lengths = [len(streamlr.fit(dataset, Descent(tol=0.5, patience=patience)).history) for patience in (1, 2, 4)]
    # the first epoch meets the way down, the second does not: from there on nothing improves by half
    assert np.diff(lengths).tolist() == [1, 2]


def test_seconds_end_an_epoch_before_its_end():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60_000, 5))
    model = streamlr.fit(streamlr.Dataset(x, x[:, 0] + rng.standard_normal(60_000)), Descent(max_seconds=1e-9))
    assert model.stopped == "1e-09 seconds were used (max_seconds)"
    (only,) = model.history
    assert not only.complete
    assert 0 < only.rows == 256 * only.steps < 60_000
    assert only.cost.n == only.rows
    assert model.cost.r2 > 0.4  # what was learned from the rows that there was time for
    assert model.n_rows == 60_000


def test_what_a_checkpoint_and_a_model_keep_is_the_same_history(rows, tmp_path):
    x, y = rows
    two = streamlr.Dataset(x, np.column_stack([y, -y]))
    for dataset, options in (
        (streamlr.Dataset(x, y), Descent(max_epochs=2, log_every=1_000, validation=0.2)),
        (two, Descent("gd", max_epochs=3)),
        (two, Descent("sgd", max_epochs=2, validation=0.2)),
    ):
        model = streamlr.fit(dataset, options)
        path = tmp_path / "m.json"
        model.save(path, overwrite=True)
        again = streamlr.load_model(path)
        assert again.stopped == model.stopped
        assert len(again.history) == len(model.history) > 0
        for one, other in zip(model.history, again.history, strict=True):
            assert one.to_dict() == other.to_dict()
            for field in fields(Record):
                assert type(getattr(one, field.name)) is type(getattr(other, field.name)), field.name
            assert one.watched == other.watched
            assert str(one) == str(other)
        json.dumps(model.to_dict(), allow_nan=False)


def test_a_model_file_of_version_1_still_loads(dataset, tmp_path):
    from streamlr.dataset.tables.coding import MODEL_FORMAT
    from streamlr.files import write_json

    content = {
        "coef": [1.0, -2.0, 0.5, 0.0],
        "intercept": 3.0,
        "feature_names": ["x0", "x1", "x2", "x3"],
        "target_names": ["y"],
        "n_rows": 3_000,
        "rank": 4,
        "condition": 1.1,
        "digits": 15.5,
        "route": "cholesky",
        "aliased": {},
        "cost": {
            "n": 3_000,
            "weight_sum": 3_000.0,
            "n_dropped": 0,
            "chunks_missing": 0,
            "mse": 1.0,
            "rmse": 1.0,
            "r2": 0.8,
            "mae": None,
        },
        "fit_intercept": True,
        "ridge": 0.0,
        "std_err": [0.1, 0.1, 0.1, 0.1],
        "intercept_std_err": 0.1,
        "df_resid": 2_995,
        "n_dropped": 0,
        "dropped_by_column": {},
        "chunks_missing": 0,
        "fingerprint": None,
        "coding": {},
        "written_by": {"streamlr": "0.1.0", "numpy": "2.0.0"},
    }
    write_json(tmp_path / "old.json", MODEL_FORMAT, 1, content, overwrite=False)
    model = streamlr.load_model(tmp_path / "old.json")
    assert (model.history, model.stopped) == ((), "")
    assert model.predict([[1.0, 1.0, 2.0, 0.0]]).tolist() == [3.0]
    assert "rank 4, route cholesky" in str(model.summary())
    assert streamlr.evaluate(model, dataset).r2 > 0.8
