"""Steps: what is solved in blocks, or capped, is the plain loop written out; nothing is changed, and no number hangs it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Array, cuts

from streamlr.descent.objective import Objective
from streamlr.descent.scaling import Coordinates, Prepared
from streamlr.descent.schedules import Constant, Exponential, InverseScaling, Join, Schedule, WarmUp
from streamlr.descent.steps import SURPRISE, Iterate, Walk, block_rows, shortened
from streamlr.descent.updates import Adam, Average, Momentum, Nesterov, Plain

SCHEDULES = [
    Constant(0.01),
    InverseScaling(0.05, 0.5, 10),
    WarmUp(20, Exponential(0.03, 0.5, 50)),
    Join((Constant(0.02),) * 2, (9,)),
]
PLAIN = Plain()
TRANSFORMS = ["none", "identity", "any"]


class Course(NamedTuple):
    """A walk and prepared rows to take it over."""

    walk: Walk
    rows: Prepared
    a: Array
    y: Array
    w: Array


def course(
    seed: int = 0,
    n: int = 150,
    p: int = 3,
    *,
    k: int = 1,
    weights: str = "none",
    intercept: bool = True,
    batch: int = 1,
    ridge: float = 0.0,
    transform: str = "none",
    rule: Any = PLAIN,
    schedule: Schedule = SCHEDULES[0],
    promised: float | None = None,
    average: bool = True,
) -> Course:
    rng = np.random.default_rng(seed)
    d = p + intercept
    a = rng.standard_normal((n, d))
    if intercept:
        a[:, p] = 1.0
    y = a @ rng.standard_normal((d, k)) + rng.standard_normal((n, k))
    w = rng.uniform(0.1, 2.0, (n, 1)) * (rng.random((n, 1)) > (0.4 if weights == "some zero" else 0.0))
    if weights == "none":
        w = np.ones((n, 1))
    scale = np.exp(rng.standard_normal(p))
    coordinates = Coordinates(np.zeros(p), scale, np.zeros(k), np.ones(k), intercept, 1.0)
    matrix = {"none": None, "identity": np.eye(d), "any": np.eye(d) + 0.3 * rng.standard_normal((d, d))}[transform]
    rows = Prepared(a[:, :p].copy(), y.copy(), w.copy() if weights != "none" else None, intercept)
    return Course(Walk(Objective(coordinates, batch, ridge), matrix, rule, schedule, promised, average), rows, a, y, w)


courses = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "n": st.sampled_from([1, 2, 63, 64, 65, 130, 200]),
        "p": st.sampled_from([1, 3, 40]),
        "k": st.integers(1, 3),
        "weights": st.sampled_from(["none", "ordinary", "some zero"]),
        "intercept": st.booleans(),
        "transform": st.sampled_from(TRANSFORMS),
        "schedule": st.sampled_from(SCHEDULES),
        "average": st.booleans(),
    }
)


def step_by_step(c: Course) -> tuple[Iterate, Array]:
    """The definition, one batch at a time, with caps where they were promised, but no T made shorter."""
    walk, size = c.walk, c.walk.objective.batch_rows
    k, d = c.y.shape[1], c.a.shape[1]
    t = np.eye(d) if walk.transform is None else walk.transform
    penal = np.zeros((d, 1))
    penal[: walk.objective.coordinates.n_features, 0] = walk.objective.ridge / walk.objective.coordinates.scale**2
    b, memory, mean, gradients = np.zeros((d, k)), walk.rule.init(np.zeros((d, k))), np.zeros((d, k)), np.zeros((d, k))
    met, step = np.empty_like(c.y), 0
    for start in range(0, len(c.a), size):
        a, y, w = (x[start : start + size] for x in (c.a, c.y, c.w))
        met[start : start + size] = y - a @ b
        hessian = 2 * a.T @ (w * a) / size + 2 * np.diag(penal[:, 0]) * len(a) / size
        gradient = -2 * a.T @ (w * met[start : start + size]) / size + 2 * penal * b * len(a) / size
        g = t.T @ gradient
        rates = np.full(k, float(walk.schedule(step)))
        if walk.promised is not None:
            for j in range(k):
                bend = g[:, j] @ t.T @ hessian @ t @ g[:, j]
                if bend > 0:
                    rates[j] = min(rates[j], g[:, j] @ g[:, j] / bend / walk.rule.gain)
        move, memory = walk.rule.update(g, memory, rates)
        b = b + t @ move
        gradients = gradients + g
        mean = mean + b * len(a)
        step += 1
    average = Average(mean / len(c.a), len(c.a)) if walk.average else Average(np.zeros((d, k)), 0.0)
    return Iterate(b, walk.transform, memory, average, gradients, step), met


def taken(c: Course, edges: list[int] | None = None) -> tuple[Iterate, Array]:
    here, met = c.walk.start(), []
    for start, stop in zip(edges or [0], (edges or [0, len(c.rows)])[1:], strict=False):
        here, residuals = c.walk.over(c.rows[start:stop], here)
        met.append(residuals)
    return here, np.concatenate(met)


def assert_close(one: tuple[Iterate, Array], other: tuple[Iterate, Array], digits: float = 1e-10) -> None:
    (here, met), (there, expected) = one, other
    assert here.step == there.step
    assert here.average.rows == there.average.rows
    size = 1 + np.abs(expected).max()
    np.testing.assert_allclose(met, expected, rtol=0, atol=digits * size)
    for found, wanted in ((here.b, there.b), (here.average.b, there.average.b)):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=digits * (1 + np.abs(there.b).max()))
    np.testing.assert_allclose(here.gradients, there.gradients, rtol=0, atol=digits * size * len(met) * 10)


def bits(value: Any) -> list[bytes]:
    if isinstance(value, tuple):
        return [one for part in value for one in bits(part)]
    return [np.asarray(value).tobytes() if value is not None else b""]


# --- single rows -----------------------------------------------------------------------------------


@given(courses, st.data())
def test_single_rows_through_triangular_systems_are_the_loop_written_out(settings: dict[str, Any], data: st.DataObject):
    c = course(**settings)
    expected = step_by_step(c)
    assume(np.isfinite(expected[1]).all())
    assert_close(taken(c), expected)
    assert_close(taken(c, data.draw(cuts(len(c.rows)))), expected)


@given(courses, st.data())
def test_single_rows_are_capped_each_by_its_own_length(settings: dict[str, Any], data: st.DataObject):
    """At a rate that would overshoot nearly every time, a step goes exactly to the plane where its row is fitted."""
    c = course(**{**settings, "schedule": data.draw(st.sampled_from([Constant(0.4), InverseScaling(2.0, 0.5, 10)]))}, promised=1e9)
    expected = step_by_step(c)
    squares = np.square(c.a if c.walk.transform is None else c.a @ c.walk.transform).sum(axis=1)
    uncapped = 2 * c.walk.schedule(np.arange(len(c.a))) * c.w[:, 0]
    assume((uncapped > 1 / squares).any())
    assert np.isfinite(expected[1]).all()
    assert_close(taken(c), expected, 1e-8)
    assert_close(taken(c, data.draw(cuts(len(c.rows)))), expected, 1e-8)


def test_a_capped_step_fits_its_row():
    c = course(n=1, schedule=Constant(100.0), promised=1e9)
    here, _ = taken(c)
    np.testing.assert_allclose(c.a @ here.b, c.y, rtol=1e-14)


@given(courses)
def test_rows_of_zeros_and_rows_without_weight_move_nothing(settings: dict[str, Any]):
    for promised in (None, 1e9):
        c = course(**{**settings, "weights": "ordinary"}, promised=promised)
        c.rows.w[::2] = 0.0
        (c.rows.w if c.rows.intercept else c.rows.z)[1::2] = 0.0  # where there is an intercept, no row is zeros
        here, met = taken(c)
        assert not here.b.any()
        assert not here.gradients.any()
        np.testing.assert_array_equal(met, c.y)


@given(courses)
def test_blocks_do_what_batches_of_one_row_do(settings: dict[str, Any]):
    c = course(**settings, promised=1e9)
    with np.errstate(all="ignore"):
        assert_close(c.walk._over_single_rows(c.rows, c.walk.start()), c.walk._over_batches(c.rows, c.walk.start()), 1e-8)


@pytest.mark.parametrize("p", [10, 100, 300])
def test_blocks_of_every_height_are_the_loop_written_out(p: int):
    c = course(n=3 * block_rows(p + 1) + 5, p=p, k=2, schedule=InverseScaling(0.3 / p, 0.5, 10))
    assert_close(taken(c), step_by_step(c))


def test_wider_rows_are_solved_in_lower_blocks():
    heights = [block_rows(width) for width in (1, 10, 100, 1000, 10_000)]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] > heights[-1] > 1


# --- batches ---------------------------------------------------------------------------------------


@given(
    courses,
    st.sampled_from([1, 7, 64]),
    st.sampled_from([Plain(), Momentum(0.5), Nesterov(0.7), Adam()]),
    st.sampled_from([0.0, 0.1]),
    st.booleans(),
)
def test_batches_are_the_loop_written_out(settings: dict[str, Any], batch: int, rule: Any, ridge: float, capped: bool):
    c = course(**settings, batch=batch, rule=rule, ridge=ridge, promised=1e9 if capped and not isinstance(rule, Adam) else None)
    expected = step_by_step(c)
    assume(np.isfinite(expected[1]).all() and np.abs(expected[1]).max() < 1e3)
    found = taken(c)
    assert_close(found, expected, 1e-8)
    for one, other in zip(found[0].memory, expected[0].memory, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-7 * (1 + np.abs(other).max()))


@given(courses, st.sampled_from([1, 7]), st.sampled_from([Momentum(0.5), Nesterov(0.7), Adam()]), st.data())
def test_batches_have_the_same_bits_however_rows_are_cut_into_stretches(
    settings: dict[str, Any], batch: int, rule: Any, data: st.DataObject
):
    promised = data.draw(st.sampled_from([None, 2.0, 1e9])) if not isinstance(rule, Adam) else None
    c = course(**settings, batch=batch, rule=rule, promised=promised)
    count = -(-len(c.rows) // batch)
    edges = [min(edge * batch, len(c.rows)) for edge in data.draw(cuts(count))]
    whole, pieces = taken(c), taken(c, edges)
    assert bits(whole) == bits(pieces)


def test_rows_that_come_in_the_same_stretches_leave_the_same_bits():
    c = course(n=200, k=2, weights="ordinary", transform="any", promised=3.0)
    edges = [0, 70, 140, 200]
    assert bits(taken(c, edges)) == bits(taken(c, edges))


def test_steps_are_counted_over_stretches():
    schedule = Join((Constant(0.01), Constant(1e-300)), (100,))
    c = course(n=150, schedule=schedule)
    early, late = taken(c, [0, 100])[0], taken(c, [0, 60, 150])[0]
    np.testing.assert_allclose(early.b, late.b, rtol=1e-12)
    assert late.step == 150


# --- a sample that was wrong -----------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 5), st.floats(1e-6, 1.0))
def test_shortening_changes_curvature_along_the_direction_alone(seed: int, d: int, share: float):
    rng = np.random.default_rng(seed)
    transform, v = rng.standard_normal((d, d)), rng.standard_normal(d)
    v /= np.linalg.norm(v)
    across = rng.standard_normal(d)
    across -= v * (v @ across)
    found = shortened(transform, v, share)
    np.testing.assert_allclose(found @ v, np.sqrt(share) * (transform @ v), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found @ across, transform @ across, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("weights", ["none", "ordinary"])
def test_rows_with_more_leverage_than_all_were_promised_shorten_the_transform(batch: int, k: int, weights: str):
    c = course(n=40, batch=batch, k=k, weights=weights, transform="identity", promised=100.0)
    calm, _ = taken(c)
    np.testing.assert_array_equal(calm.transform, np.eye(4))
    c.rows.z[20] = 1e4  # |z|^2 is 3e8: of 40 rows, these alone curve the cost 3e8 / 40, not 100
    here, _ = taken(c)
    assert not same_transform(here.transform, np.eye(4))
    for target in range(k if batch > 1 else 1):
        # along the direction of the heavy row, all that it proves is now what was promised, and across it nothing has changed
        row = c.rows.design[20] @ here.transform
        weight = c.rows.w[20, 0] if weights != "none" else 1.0
        assert weight * row @ row <= SURPRISE * 100.0 * batch * 1.001, target
    across = np.array([1.0, -1.0, 0.0, 0.0])
    if batch == 1:
        np.testing.assert_allclose(here.transform @ across, across, atol=1e-10)
    assert np.isfinite(here.b).all()


def same_transform(one: Array | None, other: Array | None) -> bool:
    return one is not None and other is not None and bool((one == other).all())


def test_without_a_promise_or_without_a_transform_nothing_is_shortened():
    for batch in (1, 4):
        c = course(n=40, batch=batch, transform="identity", schedule=Constant(1e-12))
        c.rows.z[20] = 1e4
        assert same_transform(taken(c)[0].transform, np.eye(4))
        c = course(n=40, batch=batch, promised=1.0)
        c.rows.z[20] = 1e4
        assert taken(c)[0].transform is None


# --- numbers that are too large --------------------------------------------------------------------


def within(seconds: float, function: Any) -> Any:
    """What a function returns; a failure if it has not come back by then, rather than a run that hangs."""
    results: list[Any] = []

    def run() -> None:
        with np.errstate(all="ignore"):  # as the loop over epochs does
            results.append(function())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    assert results, "it raised"
    return results[0]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("transform", ["none", "identity", "any"])
@pytest.mark.parametrize("promised", [None, 5e-324, 1e-3, 1e300])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e154, 1e200, 1e308, 1e-170, 1e-320, 0.0])
@pytest.mark.parametrize("where", ["a row", "a target", "everything"])
def test_no_number_hangs_it_or_raises(batch: int, transform: str, promised: float | None, value: float, where: str):
    c = course(n=40, batch=batch, k=2, transform=transform, promised=promised, schedule=Constant(0.1))
    if where == "a row":
        c.rows.z[20] = value
    elif where == "a target":
        c.rows.y[20, 0] = value
    else:
        c.rows.z[:], c.rows.y[:] = value, value
    here, met = within(20, lambda: taken(c))
    assert here.step == -(-40 // batch)
    assert met.shape == (40, 2)
    if where == "a row" and not np.isfinite(value):
        assert not np.isfinite(here.b).all()  # nothing hides it from whoever looks for it
    if value == 0.0 and where == "everything":
        assert not here.b.any()


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("rule", [Plain(), Momentum(), Nesterov()])
def test_a_rate_that_is_too_high_ends_beyond_float64_without_an_exception(batch: int, rule: Any):
    c = course(n=4000, batch=batch, rule=rule, schedule=Constant(50.0))
    here, met = within(20, lambda: taken(c))
    assert not np.isfinite(here.b).any()
    assert not np.isfinite(met[-1]).any()


def test_a_target_that_diverges_leaves_the_others_alone():
    for batch in (1, 8):
        c = course(n=40, batch=batch, k=2, promised=1e9)
        expected, _ = taken(c)
        c.rows.y[3, 0] = np.inf
        here, _ = within(20, lambda c=c: taken(c))
        np.testing.assert_allclose(here.b[:, 1], expected.b[:, 1], rtol=1e-9)


# --- laws ------------------------------------------------------------------------------------------


@given(courses, st.sampled_from([1, 7]), st.sampled_from([Plain(), Momentum(0.5)]))
def test_several_targets_are_each_as_if_alone(settings: dict[str, Any], batch: int, rule: Any):
    c = course(**settings, batch=batch, rule=rule, promised=1e9)
    together, met = taken(c)
    k, coordinates = c.y.shape[1], c.walk.objective.coordinates
    for j in range(k):
        single = Coordinates(coordinates.mean, coordinates.scale, np.zeros(1), np.ones(1), coordinates.intercept, 1.0)
        walk = Walk(Objective(single, batch, 0.0), c.walk.transform, rule, c.walk.schedule, 1e9, c.walk.average)
        alone, residuals = walk.over(replace(c.rows, y=c.rows.y[:, [j]]), walk.start())
        np.testing.assert_allclose(alone.b[:, 0], together.b[:, j], rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(alone.average.b[:, 0], together.average.b[:, j], rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(residuals[:, 0], met[:, j], rtol=1e-8, atol=1e-8)


@given(courses, st.sampled_from([1, 7]), st.sampled_from([Plain(), Momentum(0.5)]), st.sampled_from([None, 2.0, 1e9]))
def test_nothing_given_is_changed_or_given_back(settings: dict[str, Any], batch: int, rule: Any, promised: float | None):
    c = course(**settings, batch=batch, rule=rule, promised=promised)
    here, _ = taken(c)
    parts = [part for part in (c.rows.z, c.rows.y, c.rows.w) if part is not None]
    before, rows = bits(here), [part.copy() for part in parts]
    following, met = c.walk.over(c.rows, here)
    assert bits(here) == before
    assert all((part == copied).all() for part, copied in zip(parts, rows, strict=True))
    assert not any(np.shares_memory(met, part) for part in parts)
    moved = [following.b, following.gradients, following.average.b if c.walk.average else following.b]
    held = [here.b, here.gradients, here.average.b, *parts, met]
    assert not any(np.shares_memory(one, other) for one in moved for other in held)


def test_the_average_counts_rows_and_starts_anew_where_it_is_told_to():
    c = course(n=70, batch=32, average=True)
    first, _ = c.walk.over(c.rows[:64], c.walk.start())
    anew = first._replace(average=Average(first.b, 0.0))
    last, _ = c.walk.over(c.rows[64:], anew)
    np.testing.assert_allclose(last.average.b, last.b, rtol=1e-12)
    assert last.average.rows == 6


def test_without_averaging_there_is_no_average():
    for batch in (1, 8):
        here, _ = taken(course(n=40, batch=batch, average=False))
        assert here.average.rows == 0


def test_a_walk_over_no_rows_leads_nowhere():
    for batch in (1, 8):
        c = course(n=8, batch=batch, average=False)
        here, met = c.walk.over(c.rows[:0], c.walk.start())
        assert not here.b.any()
        assert (here.step, met.shape) == (0, (0, 1))


def test_the_coordinates_have_a_name():
    assert course(transform="any").walk.scale == "whiten"
    assert course().walk.scale == "standard"
    c = course()
    plain = Coordinates(np.zeros(3), np.ones(3), np.zeros(1), np.ones(1), True, 1.0, "none")
    assert Walk(Objective(plain, 1, 0.0), None, Plain(), c.walk.schedule, None, False).scale == "none"
