"""Learning rates: positive, never above what was asked for, the same one by one and all at once, and exact at their landmarks."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlr.descent.schedules import Constant, Cosine, Exponential, InverseScaling, Join, Schedule, WarmUp, as_schedule
from streamlr.errors import UsageError

rates = st.floats(1e-6, 10.0)
lengths = st.floats(0.5, 1e4)
simple = st.one_of(
    st.builds(Constant, rates),
    st.builds(InverseScaling, rates, st.floats(0.1, 2.0), lengths),
    st.builds(Exponential, rates, st.floats(0.1, 1.0), st.floats(2.0, 1e4)),
    st.builds(Cosine, rates, lengths, st.floats(0.01, 1.0)),
)
boundaries = st.lists(st.integers(1, 50), min_size=1, max_size=3, unique=True).map(sorted).map(tuple)


@st.composite
def joined(draw: st.DrawFn, parts: st.SearchStrategy[Any]) -> Join:
    edges = draw(boundaries)
    return Join(tuple(draw(parts) for _ in range(len(edges) + 1)), edges)


composed = st.one_of(simple, st.builds(WarmUp, lengths, simple), joined(simple), st.builds(WarmUp, lengths, joined(simple)))
schedules = st.one_of(composed, joined(composed))


def largest_rate(schedule: Any) -> float:
    if isinstance(schedule, Join):
        return max(largest_rate(one) for one in schedule.schedules)
    return largest_rate(schedule.then) if isinstance(schedule, WarmUp) else schedule.rate


def share_of(schedule: Any, t: int) -> float:
    """The rate by the formulas of the documentation, with Python's own arithmetic."""
    match schedule:
        case Constant(rate):
            return rate
        case InverseScaling(rate, power, steps):
            return rate / math.pow(1 + t / steps, power)
        case Exponential(rate, factor, steps):
            return rate * math.exp(math.log(factor) * t / steps)
        case Cosine(rate, steps, floor):
            return rate * (floor + (1 - floor) * math.cos(math.pi / 2 * min(t / steps, 1)) ** 2)  # the half-angle form
        case WarmUp(steps, then):
            return share_of(then, t) * (1 if t + 1 >= steps else (t + 1) / steps)
    raise AssertionError(schedule)


# --- laws of all of them ---------------------------------------------------------------------------


@given(schedules, st.lists(st.integers(0, 10_000), min_size=1, max_size=20))
def test_all_at_once_is_one_by_one(schedule: Schedule, steps: list[int]):
    together = schedule(np.array(steps))
    assert together.shape == (len(steps),)
    assert together.dtype == np.float64
    alone = [schedule(step) for step in steps]
    assert all(one.shape == () for one in alone)
    np.testing.assert_allclose(together, alone, rtol=1e-15)


@given(schedules)
def test_it_is_positive_and_at_most_what_was_asked_for(schedule: Schedule):
    found = schedule(np.arange(300))
    assert (found > 0).all()
    assert found.max() <= largest_rate(schedule) * (1 + 1e-15)


@given(st.one_of(simple, st.builds(WarmUp, lengths, simple)), st.integers(0, 10**6))
def test_it_is_the_formula_of_its_documentation(schedule: Schedule, step: int):
    expected = share_of(schedule, step)
    assert float(schedule(step)) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@given(simple)
def test_the_simple_ones_start_at_their_rate_and_never_rise(schedule: Any):
    assert float(schedule(0)) == pytest.approx(schedule.rate, rel=1e-15)
    assert (np.diff(schedule(np.arange(500))) <= 1e-15 * schedule.rate).all()


@given(schedules)
def test_the_steps_are_not_changed(schedule: Schedule):
    steps = np.arange(7)
    schedule(steps)
    assert (steps == np.arange(7)).all()


@given(schedules)
def test_it_is_a_value(schedule: Any):
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert eval(repr(schedule)) == schedule  # what is shown can be typed
    with pytest.raises(AttributeError):
        schedule.__class__.__setattr__(schedule, schedule.__slots__[0], 1.0)


# --- landmarks -------------------------------------------------------------------------------------


def test_a_power_of_one_halves_after_its_steps_and_falls_like_one_over_the_step():
    schedule = InverseScaling(0.5, power=1.0, steps=8)
    assert [float(schedule(step)) for step in (0, 8, 24)] == [0.5, 0.25, 0.125]
    assert 10**9 * float(schedule(10**9)) == pytest.approx(0.5 * 8, rel=1e-7)


def test_sums_of_rates_diverge_and_sums_of_squares_converge_as_robbins_and_monro_ask():
    found = InverseScaling(1.0, power=1.0, steps=1.0)(np.arange(10**6))
    assert found.sum() == pytest.approx(math.log(10**6) + 0.5772156649, rel=1e-6)  # harmonic numbers
    assert (found**2).sum() == pytest.approx(math.pi**2 / 6, rel=1e-5)


def test_an_exponential_keeps_its_factor_every_so_many_steps():
    found = Exponential(1.0, factor=0.25, steps=3)(np.arange(0, 30, 3))
    np.testing.assert_allclose(found[1:] / found[:-1], 0.25, rtol=1e-14)
    assert float(Exponential(1.0, factor=0.5, steps=1)(10**9)) == 0.0  # below the smallest number, and no warning


def test_a_cosine_ends_at_its_floor_exactly_and_stays():
    schedule = Cosine(0.25, steps=10, floor=0.125)
    assert set(schedule(np.array([10, 11, 10**12])).tolist()) == {0.25 * 0.125}
    assert float(schedule(5)) == pytest.approx(0.25 * (1 + 0.125) / 2, rel=1e-15)
    assert set(Cosine(0.25, steps=10, floor=1.0)(np.arange(20)).tolist()) == {0.25}


@given(st.integers(1, 50), simple)
def test_a_warm_up_is_the_other_schedule_from_its_end_on(steps: int, then: Schedule):
    here = np.arange(100)
    found = WarmUp(steps, then)(here)
    np.testing.assert_array_equal(found[steps - 1 :], then(here)[steps - 1 :])
    np.testing.assert_allclose(found[:steps], (here[:steps] + 1) / steps * then(here[:steps]), rtol=1e-15)


@given(joined(composed))
def test_each_joined_schedule_counts_from_where_it_starts(schedule: Join):
    edges = (0, *schedule.boundaries, 200)
    for one, start, stop in zip(schedule.schedules, edges, edges[1:], strict=False):
        np.testing.assert_array_equal(schedule(np.arange(start, stop)), one(np.arange(stop - start)))


def test_joins_within_joins_count_from_their_own_start():
    inner = Join((Constant(1.0), Constant(2.0)), (2,))
    assert Join((Constant(9.0), inner), (3,))(np.arange(7)).tolist() == [9.0, 9.0, 9.0, 1.0, 1.0, 2.0, 2.0]


# --- what is refused -------------------------------------------------------------------------------

NOT_POSITIVE = [0, -1.0, math.nan, math.inf, -math.inf, True, False, "0.1", None, 1j, np.complex128(1), [0.1], 10**400]


@pytest.mark.parametrize("value", NOT_POSITIVE, ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Constant, "rate"),
        (lambda v: InverseScaling(v), "rate"),
        (lambda v: InverseScaling(0.1, power=v), "power"),
        (lambda v: InverseScaling(0.1, steps=v), "steps"),
        (lambda v: Exponential(v, 0.5, 10), "rate"),
        (lambda v: Exponential(0.1, v, 10), "factor"),
        (lambda v: Exponential(0.1, 0.5, v), "steps"),
        (lambda v: Cosine(v, 10), "rate"),
        (lambda v: Cosine(0.1, v), "steps"),
        (lambda v: WarmUp(v, Constant(0.1)), "steps"),
    ],
)
def test_numbers_that_are_not_above_zero_are_refused_by_name(make: Any, name: str, value: Any):
    with pytest.raises(UsageError) as caught:
        make(value)
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)
    assert "allowed are finite numbers above zero" in str(caught.value)


@pytest.mark.parametrize("floor", [-0.1, 1.1, math.nan, "0", None, True])
def test_a_floor_is_a_share(floor: Any):
    with pytest.raises(UsageError, match=r"floor of Cosine is .*; allowed are numbers from 0 to 1$"):
        Cosine(0.1, 10, floor)


def test_a_factor_does_not_grow():
    with pytest.raises(UsageError, match=r"factor of Exponential is 1.5; allowed are numbers above 0 and at most 1"):
        Exponential(0.1, 1.5, 10)


@pytest.mark.parametrize("value", [0.1, None, "auto", Constant, lambda step: 0.1])
def test_only_schedules_can_be_composed(value: Any):
    with pytest.raises(UsageError, match=r"then of WarmUp is .*; allowed are the schedules Constant, InverseScaling"):
        WarmUp(4, value)
    with pytest.raises(UsageError, match=r"a schedule of Join is .*; allowed are the schedules Constant, InverseScaling"):
        Join((Constant(0.1), value), (2,))


@pytest.mark.parametrize("edges", [(), (1, 2), (0,), (-1,), (1.5,), ("2",), (True,), 2, None])
def test_boundaries_are_growing_whole_numbers_one_fewer_than_schedules(edges: Any):
    with pytest.raises(UsageError, match="allowed are"):
        Join((Constant(0.1), Constant(0.2)), edges)


def test_boundaries_grow():
    for edges in ((5, 5), (5, 4)):
        with pytest.raises(UsageError, match=r"3 schedules are joined at the steps \[5, [45]\]; allowed are growing steps above 0"):
            Join((Constant(0.1),) * 3, edges)


def test_a_schedule_alone_is_not_joined():
    with pytest.raises(UsageError, match=r"schedules of Join is Constant\(rate=0.1\); allowed are tuples"):
        Join(Constant(0.1), ())  # type: ignore[arg-type]


@pytest.mark.parametrize("value", NOT_POSITIVE, ids=repr)
def test_what_is_no_learning_rate_is_refused(value: Any):
    with pytest.raises(UsageError, match=r"learning_rate is .*; allowed are 'auto', a finite number above zero, and the schedules"):
        as_schedule(value)


def test_numbers_of_numpy_are_numbers():
    assert as_schedule(np.float32(0.25)) == as_schedule(0.25) == Constant(0.25)
    assert as_schedule(np.int64(2)) == Constant(2)
    assert repr(InverseScaling(np.float64(0.5))) == "InverseScaling(rate=0.5, power=0.5, steps=1.0)"
    assert Join([Constant(1.0), Constant(2.0)], np.array([3])) == Join((Constant(1.0), Constant(2.0)), (3,))  # type: ignore[arg-type]
