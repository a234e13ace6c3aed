"""Descent's options: each acts or is refused, in each mode; equal options are equal, and what differs is told apart on paper."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import streamlr
from streamlr.descent.options import DEFAULTS, MODES
from streamlr.descent.schedules import Constant, Cosine, Exponential, InverseScaling, Join, WarmUp
from streamlr.descent.updates import Adam, Momentum, Nesterov, Plain
from streamlr.errors import UsageError

Descent = streamlr.Descent

# of every option: values that each mean something else, and the modes that have it
VALUES: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "batch_size": ([None, 1, 32, 512], ("minibatch",)),
    "learning_rate": (
        [
            "auto",
            0.1,
            0.2,
            Constant(0.1),
            InverseScaling(0.1),
            InverseScaling(0.1, 0.75),
            Exponential(0.1, 0.5, 10),
            Cosine(0.1, 10),
            WarmUp(10, Constant(0.1)),
            WarmUp(10, Cosine(0.1, 10)),
            Join((Constant(0.1), Constant(0.2)), (5,)),
            Join((Constant(0.1), Constant(0.2)), (6,)),
        ],
        MODES,
    ),
    "update": (["plain", "momentum", Momentum(0.8), "nesterov", Nesterov(0.8), "adam", Adam(0.8), Adam(epsilon=1e-3)], MODES),
    "scale": (["auto", "standard", "whiten", None], MODES),
    "max_epochs": ([1, 7], MODES),
    "tol": ([0.0, 1e-3], MODES),
    "gradient_tol": ([0.0, 1e-3], MODES),
    "max_seconds": ([None, 0.0, 1.5], MODES),
    "validation": ([0.0, 0.1], MODES),
    "seed": ([0, 1, 2**40], MODES),
    "shuffle": ([True, False], ("minibatch", "sgd")),
    "average": ([True, False], ("minibatch", "sgd")),
    "buffer_rows": ([None, 1, 1000], ("minibatch", "sgd")),
    "log_every": ([None, 1, 1000], ("minibatch", "sgd")),
    "checkpoint_every": ([None, 1, 1000], MODES),
    "streams": ([1, 2, 7], ("minibatch", "sgd")),
}


@st.composite
def options(draw: st.DrawFn) -> Any:
    mode = draw(st.sampled_from(MODES))
    chosen = {}
    for name, (values, modes) in VALUES.items():
        if mode in modes and draw(st.booleans()):
            chosen[name] = draw(st.sampled_from(values))
    if chosen.get("shuffle") is False:
        chosen.pop("buffer_rows", None)
    if chosen.get("streams", 1) > 1:
        chosen.pop("log_every", None)
    descent = Descent(mode, **chosen)
    return dataclasses.replace(descent, patience=draw(st.integers(1, 9))) if descent.tol else descent


def test_every_option_is_tested_here():
    assert {*VALUES, "mode", "patience"} == {field.name for field in dataclasses.fields(Descent)}


# --- values ----------------------------------------------------------------------------------------


@given(options())
def test_options_are_values(descent: Any):
    again = pickle.loads(pickle.dumps(descent))
    assert again == descent
    assert hash(again) == hash(descent)
    assert dataclasses.replace(descent) == descent
    assert eval(repr(descent)) == descent
    assert again.to_dict() == descent.to_dict()
    with pytest.raises(AttributeError):
        descent.seed = 3


@given(options())
def test_options_as_json_are_plain_and_whole(descent: Any):
    found = descent.to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {field.name for field in dataclasses.fields(Descent)}


@given(options(), options())
def test_what_is_equal_on_paper_is_what_means_the_same(one: Any, other: Any):
    meaning = [dataclasses.replace(value, update=value.rule) for value in (one, other)]
    assert (one.to_dict() == other.to_dict()) == (meaning[0] == meaning[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VALUES)
def test_each_value_of_an_option_is_told_apart(mode: str, name: str):
    values, modes = VALUES[name]
    if mode in modes:
        papers = [json.dumps(Descent(mode, **{name: value}).to_dict(), sort_keys=True) for value in values]
        assert len(set(papers)) == len(values)


def test_the_mode_and_its_patience_are_told_apart():
    assert len({json.dumps(Descent(mode).to_dict()) for mode in MODES}) == 3
    assert Descent(patience=4).to_dict() != Descent().to_dict()


def test_numbers_of_numpy_become_plain_ones():
    descent = Descent(
        batch_size=np.int64(8),
        tol=np.float32(0.25),
        seed=np.uint8(3),
        validation=np.float64(0.5),
        max_seconds=np.int32(4),
        learning_rate=np.float64(0.5),
        update=Momentum(np.float32(0.5)),
    )
    plain = Descent(batch_size=8, tol=0.25, seed=3, validation=0.5, max_seconds=4.0, learning_rate=0.5, update=Momentum(0.5))
    assert descent == plain
    assert descent.to_dict() == plain.to_dict()
    json.dumps(descent.to_dict())
    assert "np." not in repr(descent)


def test_none_stands_for_what_the_mode_needs():
    for mode in MODES:
        descent = Descent(mode)
        for name, (full, stochastic) in DEFAULTS.items():
            assert getattr(descent, name) == (full if mode == "gd" else stochastic)
    assert [Descent(mode).max_epochs for mode in ("minibatch", "sgd", "gd")] == [10, 10, 10_000]


def test_the_average_is_kept_where_the_rate_does_not_fall_by_itself():
    assert Descent().average is False
    assert Descent(learning_rate=0.1).average is True
    assert Descent("sgd", learning_rate=Constant(0.1)).average is True
    assert Descent("gd", learning_rate=0.1).average is False
    assert Descent(average=True).average is True


def test_a_word_stands_for_its_rule():
    assert [Descent(update=word).rule for word in ("plain", "momentum", "nesterov", "adam")] == [
        Plain(),
        Momentum(),
        Nesterov(),
        Adam(),
    ]


# --- what a mode would ignore is refused -----------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "name", "value"),
    [
        (mode, name, values[-1 if name not in ("shuffle", "average") else 0])
        for name, (values, modes) in VALUES.items()
        for mode in MODES
        if mode not in modes
    ],
)
def test_options_of_another_mode_are_refused(mode: str, name: str, value: Any):
    with pytest.raises(UsageError, match=f"^{name} is no option of mode '{mode}'; leave it out, or choose mode 'minibatch'$"):
        Descent(mode, **{name: value})


def test_what_a_mode_does_anyway_may_be_said():
    assert Descent("gd", shuffle=False, average=False) == Descent("gd")


@pytest.mark.parametrize("mode", ["minibatch", "sgd"])
def test_a_buffer_is_for_shuffling(mode: str):
    with pytest.raises(
        UsageError, match="buffer_rows is how many rows are shuffled together, and shuffle is False; leave one of them"
    ):
        Descent(mode, shuffle=False, buffer_rows=100)


@pytest.mark.parametrize("chosen", [{"tol": 0.0}, {"mode": "gd"}])
def test_patience_is_for_a_cost_that_is_watched(chosen: dict[str, Any]):
    with pytest.raises(UsageError, match="patience is 5, and tol is 0: no cost is watched; give a tol above 0, or leave patience"):
        Descent(**chosen, patience=5)
    assert Descent("gd", tol=1e-3, patience=5).patience == 5


# --- bad values ------------------------------------------------------------------------------------

NO_NUMBERS: list[Any] = ["1", [1], True, 1j, np.ones(2), math.nan, math.inf, -1]


@pytest.mark.parametrize("value", [*NO_NUMBERS, 1.5, 0], ids=repr)
@pytest.mark.parametrize(
    "name", ["batch_size", "max_epochs", "patience", "buffer_rows", "log_every", "checkpoint_every", "streams"]
)
def test_counts_are_whole_numbers_from_one_on(name: str, value: Any):
    with pytest.raises(UsageError, match=f"^{name} is .*; allowed are whole numbers from 1 on"):
        Descent(**{name: value})


@pytest.mark.parametrize("value", [*NO_NUMBERS, 1.5, None], ids=repr)
def test_a_seed_is_a_whole_number_from_zero_on(value: Any):
    with pytest.raises(UsageError, match=r"^seed is .*; allowed are whole numbers from 0 on"):
        Descent(seed=value)


@pytest.mark.parametrize("value", [*NO_NUMBERS, 1, 1.0], ids=repr)
@pytest.mark.parametrize("name", ["tol", "gradient_tol", "validation"])
def test_shares_are_below_one(name: str, value: Any):
    with pytest.raises(UsageError, match=f"^{name} is .*; allowed are numbers from 0 to below 1$"):
        Descent(**{name: value})


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_seconds_are_finite(value: Any):
    with pytest.raises(UsageError, match=r"^max_seconds is .*; allowed are numbers from 0 on$"):
        Descent(max_seconds=value)


@pytest.mark.parametrize("value", [1, 0, "yes", np.ones(2), np.True_], ids=repr)
@pytest.mark.parametrize("name", ["shuffle", "average"])
def test_switches_are_true_or_false(name: str, value: Any):
    with pytest.raises(UsageError, match=f"^{name} is .*; allowed are True and False$"):
        Descent(**{name: value})


@pytest.mark.parametrize("value", ["", "SGD", "normal", None, 1, ["sgd"], np.array(["sgd", "gd"])], ids=repr)
def test_a_mode_is_one_of_three(value: Any):
    with pytest.raises(UsageError, match=r"^mode is .*; allowed are 'gd', 'minibatch', 'sgd'$"):
        Descent(value)


@pytest.mark.parametrize("value", ["none", "", 1, False, np.array(["auto", "auto"])], ids=repr)
def test_a_scale_is_one_of_four(value: Any):
    with pytest.raises(UsageError, match=r"^scale is .*; allowed are 'auto', 'standard', 'whiten', None$"):
        Descent(scale=value)


@pytest.mark.parametrize("value", ["Auto", "0.1", 0, -0.1, math.nan, math.inf, None, True, np.ones(2), Constant], ids=repr)
def test_a_learning_rate_is_auto_a_number_or_a_schedule(value: Any):
    with pytest.raises(
        UsageError, match=r"^learning_rate is .*; allowed are 'auto', a finite number above zero, and the schedules"
    ):
        Descent(learning_rate=value)


@pytest.mark.parametrize("value", ["sgd", None, Momentum, 0.9], ids=repr)
def test_an_update_is_a_word_or_a_rule(value: Any):
    with pytest.raises(UsageError, match=r"^update is .*; allowed are 'plain', 'momentum', 'nesterov', 'adam', or a rule"):
        Descent(update=value)


def test_an_option_that_does_not_exist_is_no_option():
    with pytest.raises(TypeError):
        Descent(epochs=2)


# --- batches ---------------------------------------------------------------------------------------


def test_a_batch_has_the_rows_that_were_asked_for_or_all_there_are():
    assert Descent("sgd").batch_rows(10**9, 1) == 1
    assert [Descent().batch_rows(n, 100) for n in (1, 255, 256, 10**9)] == [1, 255, 256, 512]
    assert [Descent(batch_size=8).batch_rows(n, 1) for n in (8, 9, 10**9)] == [8, 8, 8]


@given(st.integers(0, 10**10), st.integers(1, 2000))
def test_where_columns_are_few_and_rows_are_many_a_batch_is_higher(n, p):
    m = Descent().batch_rows(n, p)
    assert m == min(n, 256) or (m.bit_count() == 1 and m * p <= 65_536 and m * 4096 <= n)
    assert 2 * m < 256 or 2 * m * p > 65_536 or 2 * m * 4096 > n  # and no higher would be allowed


def test_a_batch_that_is_larger_than_the_data_is_refused():
    with pytest.raises(
        UsageError, match=r"^batch_size is 9,000 and there are 8,999 rows to train on; choose a smaller one, or mode"
    ):
        Descent(batch_size=9000).batch_rows(8999, 1)
