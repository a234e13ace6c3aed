"""Update rules against the published formulas, written out again here; memory that is given back and never changed."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Array, fractions_of

from streamlr.descent.updates import UPDATES, Adam, Average, Best, Momentum, Nesterov, Plain, as_update
from streamlr.errors import UsageError

decays = st.floats(0.0, 0.99)
rules = st.one_of(
    st.just(Plain()),
    st.builds(Momentum, decays),
    st.builds(Nesterov, decays),
    st.builds(Adam, decays, decays, st.sampled_from([1e-8, 0.1])),
)


class Bowl:
    """J(theta) = (theta - low)' H (theta - low), of which every rule sees the gradient."""

    def __init__(self, seed: int, d: int, k: int) -> None:
        rng = np.random.default_rng(seed)
        root = rng.standard_normal((d, d))
        self.hessian, self.low, self.start = root @ root.T / d, rng.standard_normal((d, k)), rng.standard_normal((d, k))

    def gradient(self, theta: Array) -> Array:
        return 2 * self.hessian @ (theta - self.low)


bowls = st.builds(Bowl, st.integers(0, 1000), st.integers(1, 4), st.integers(1, 2))
rate_lists = st.lists(st.floats(1e-3, 0.2), min_size=1, max_size=12)


def walked(rule: Any, bowl: Bowl, rates: list[float]) -> tuple[list[Array], list[Any]]:
    theta, memory = bowl.start, rule.init(bowl.start)
    thetas, memories = [theta], [memory]
    for rate in rates:
        move, memory = rule.update(bowl.gradient(theta), memory, rate)
        theta = theta + move
        thetas.append(theta)
        memories.append(memory)
    return thetas, memories


# --- the published forms ---------------------------------------------------------------------------


@given(bowls, rate_lists)
def test_the_plain_rule_is_the_textbook(bowl: Bowl, rates: list[float]):
    theta = bowl.start
    for rate in rates:
        theta = theta - rate * bowl.gradient(theta)
    np.testing.assert_allclose(walked(Plain(), bowl, rates)[0][-1], theta, rtol=1e-12, atol=1e-14)


@given(bowls, rate_lists, decays)
def test_momentum_is_equations_1_and_2_of_sutskever_and_others(bowl: Bowl, rates: list[float], mu: float):
    theta, v = bowl.start, np.zeros_like(bowl.start)
    for rate in rates:
        v = mu * v - rate * bowl.gradient(theta)
        theta = theta + v
    np.testing.assert_allclose(walked(Momentum(mu), bowl, rates)[0][-1], theta, rtol=1e-12, atol=1e-13)


@given(bowls, st.integers(1, 12), st.floats(1e-3, 0.2), decays)
def test_momentum_at_a_constant_rate_is_polyaks_heavy_ball(bowl: Bowl, count: int, rate: float, beta: float):
    before = here = bowl.start
    for _ in range(count):
        here, before = here - rate * bowl.gradient(here) + beta * (here - before), here
    np.testing.assert_allclose(walked(Momentum(beta), bowl, [rate] * count)[0][-1], here, rtol=1e-9, atol=1e-10)


@given(bowls, rate_lists, decays)
def test_nesterov_is_equations_3_and_4_of_sutskever_and_others(bowl: Bowl, rates: list[float], mu: float):
    """Their iterates theta, with the look ahead spelled out; ours are the places where they take gradients."""
    theta, v = bowl.start, np.zeros_like(bowl.start)
    places = []
    for rate in rates:
        places.append(theta + mu * v)
        v = mu * v - rate * bowl.gradient(theta + mu * v)
        theta = theta + v
    places.append(theta + mu * v)
    found, memories = walked(Nesterov(mu), bowl, rates)
    for one, other in zip(found, places, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(memories[-1].velocity, v, rtol=1e-9, atol=1e-10)


@given(bowls, rate_lists, decays, st.floats(0.5, 0.9999), st.sampled_from([1e-8, 1e-3]))
def test_adam_is_algorithm_1_of_kingma_and_ba(bowl: Bowl, rates: list[float], beta1: float, beta2: float, epsilon: float):
    theta, m, v = bowl.start, np.zeros_like(bowl.start), np.zeros_like(bowl.start)
    for t, alpha in enumerate(rates, start=1):
        g = bowl.gradient(theta)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        theta = theta - alpha * m_hat / (np.sqrt(v_hat) + epsilon)
    found, memories = walked(Adam(beta1, beta2, epsilon), bowl, rates)
    np.testing.assert_allclose(found[-1], theta, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(memories[-1].fading, [beta1 ** len(rates), beta2 ** len(rates)], rtol=1e-12)


def test_three_steps_by_hand_in_fractions():
    """J = theta^2 from theta = 1 at alpha = 1/4, where every number is a fraction of powers of two."""
    half = Fraction(1, 2)

    def three(rule: Any) -> list[Fraction]:
        theta, memory, seen = np.ones(1), rule.init(np.ones(1)), []
        for _ in range(3):
            move, memory = rule.update(2 * theta, memory, 0.25)
            theta = theta + move
            seen += fractions_of(theta)
        return seen

    assert three(Plain()) == [half, half**2, half**3]
    # v = v/2 - theta/2: -1/2, -1/4 - 1/4, -1/4 - 0
    assert three(Momentum(0.5)) == [half, Fraction(0), -half / 2]
    # v = v/2 - theta/2, step = v/2 - theta/2: v -1/2, step -3/4; v -3/8, step -5/16; v -5/32, step -5/64 + 1/32
    assert three(Nesterov(0.5)) == [Fraction(1, 4), Fraction(-1, 16), Fraction(-7, 64)]


@given(bowls, rate_lists)
def test_without_memory_momentum_and_nesterov_are_plain(bowl: Bowl, rates: list[float]):
    plain = walked(Plain(), bowl, rates)[0][-1]
    np.testing.assert_array_equal(walked(Momentum(0.0), bowl, rates)[0][-1], plain)
    np.testing.assert_array_equal(walked(Nesterov(0.0), bowl, rates)[0][-1], plain)


@given(st.integers(-9, 9), st.floats(1e-3, 10.0))
def test_adams_first_step_is_its_rate_whatever_the_gradients_size(power: int, rate: float):
    gradient = np.array([[3.0], [-0.5]]) * 10.0**power
    rule = Adam(epsilon=1e-30)
    move, _ = rule.update(gradient, rule.init(gradient), rate)
    np.testing.assert_allclose(move, [[-rate], [rate]], rtol=1e-12)


@given(st.one_of(st.just(Plain()), st.builds(Momentum, st.floats(0, 0.9)), st.builds(Nesterov, st.floats(0, 0.9))))
def test_the_gain_is_the_step_that_a_gradient_that_stays_leads_to_in_the_end(rule: Any):
    memory, move = rule.init(np.zeros(1)), np.zeros(1)
    for _ in range(600):
        move, memory = rule.update(np.ones(1), memory, 0.5)
    assert -move[0] / 0.5 == pytest.approx(rule.gain, rel=1e-12)


def test_adam_has_no_gain():
    assert math.isnan(Adam().gain)


# --- laws ------------------------------------------------------------------------------------------


@given(rules, bowls, rate_lists)
def test_nothing_given_is_changed_or_given_back(rule: Any, bowl: Bowl, rates: list[float]):
    theta, memory = bowl.start, rule.init(bowl.start)
    for rate in rates:
        gradient = bowl.gradient(theta)
        given_arrays = [theta, gradient, *memory]
        before = [array.copy() for array in given_arrays]
        move, behind = rule.update(gradient, memory, rate)
        for array, copy in zip(given_arrays, before, strict=True):
            np.testing.assert_array_equal(array, copy)
            assert not any(np.shares_memory(array, result) for result in (move, *behind))
        theta, memory = theta + move, behind


@given(rules, bowls, rate_lists)
def test_each_target_goes_as_if_alone(rule: Any, bowl: Bowl, rates: list[float]):
    together = walked(rule, bowl, rates)[0][-1]
    for j in range(bowl.low.shape[1]):
        memory, theta = rule.init(bowl.start[:, [j]]), bowl.start[:, [j]]
        for rate in rates:
            move, memory = rule.update(2 * bowl.hessian @ (theta - bowl.low[:, [j]]), memory, rate)
            theta = theta + move
        np.testing.assert_allclose(together[:, [j]], theta, rtol=1e-8, atol=1e-9)


@given(rules, bowls)
def test_a_rate_for_each_target_is_that_rate_for_each(rule: Any, bowl: Bowl):
    k = bowl.low.shape[1]
    rates = np.linspace(0.1, 0.2, k)
    move, _ = rule.update(bowl.gradient(bowl.start), rule.init(bowl.start), rates)
    for j in range(k):
        alone, _ = rule.update(bowl.gradient(bowl.start), rule.init(bowl.start), float(rates[j]))
        np.testing.assert_array_equal(move[:, j], alone[:, j])


@given(rules, bowls)
def test_a_gradient_of_zero_moves_nothing_at_the_start(rule: Any, bowl: Bowl):
    move, memory = rule.update(np.zeros_like(bowl.start), rule.init(bowl.start), 0.1)
    assert not move.any()
    assert all(np.isfinite(array).all() for array in memory)


@given(st.lists(st.tuples(st.integers(-100, 100), st.integers(1, 64)), min_size=1, max_size=12))
def test_the_average_is_the_weighted_mean_of_the_iterates(iterates: list[tuple[int, int]]):
    average = Average(np.full((1, 1), 7.0), 0.0)  # what was there before counts for nothing
    for value, rows in iterates:
        before = average.b.copy()
        following = average.of(np.full((1, 1), float(value)), rows)
        np.testing.assert_array_equal(average.b, before)
        assert not np.shares_memory(following.b, average.b)
        average = following
    total = sum(rows for _, rows in iterates)
    exact = sum(Fraction(value) * rows for value, rows in iterates) / total
    assert average.rows == total
    assert float(average.b[0, 0]) == pytest.approx(float(exact), rel=1e-13, abs=1e-13)


@given(st.lists(st.sampled_from([3.0, 2.0, 1.0, 0.0, math.nan, math.inf]), min_size=1, max_size=10))
def test_the_best_is_the_last_that_is_as_good_as_the_least_cost(costs: list[float]):
    best = Best(np.full((1, 1), -1.0), math.inf)
    for i, cost in enumerate(costs):
        b = np.full((1, 1), float(i))
        best = best.of(b, cost)
        b[:] = np.nan  # whoever goes on with it changes nothing here
    finite = [cost for cost in costs if cost < math.inf]
    assert best.cost == min(finite, default=math.inf)
    last, lowest = -1, math.inf
    for i, cost in enumerate(costs):
        if cost < math.inf and cost <= lowest * (1 + 1e-4):
            last, lowest = i, min(cost, lowest)
    assert best.b[0, 0] == last


@given(rules)
def test_a_rule_is_a_value(rule: Any):
    again = pickle.loads(pickle.dumps(rule))
    assert again == rule
    assert hash(again) == hash(rule)
    assert eval(repr(rule)) == rule


# --- what is refused -------------------------------------------------------------------------------


def test_words_stand_for_rules_with_their_defaults():
    assert {word: as_update(word) for word in UPDATES} == {
        "plain": Plain(),
        "momentum": Momentum(0.9),
        "nesterov": Nesterov(0.9),
        "adam": Adam(0.9, 0.999, 1e-8),
    }
    assert as_update(Momentum(0.8)) == Momentum(0.8)


@pytest.mark.parametrize("value", ["sgd", "Adam", None, Momentum, 0.9, ["adam"], np.array(["adam"])], ids=repr)
def test_what_is_no_rule_is_refused(value: Any):
    with pytest.raises(UsageError, match=r"update is .*; allowed are 'plain', 'momentum', 'nesterov', 'adam', or a rule such as"):
        as_update(value)


@pytest.mark.parametrize("value", [-0.1, 1.0, 2, math.nan, math.inf, "0.9", None, True, 1j, np.ones(2)], ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Momentum, "decay of Momentum"),
        (Nesterov, "decay of Nesterov"),
        (Adam, "decay of Adam"),
        (lambda v: Adam(square_decay=v), "square_decay of Adam"),
    ],
)
def test_a_decay_is_from_0_to_below_1(make: Any, name: str, value: Any):
    with pytest.raises(UsageError, match=f"^{name} is .*; allowed are numbers from 0 to below 1$"):
        make(value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "1e-8", None])
def test_epsilon_is_above_zero(value: Any):
    with pytest.raises(UsageError, match=r"epsilon of Adam is .*; allowed are finite numbers above zero"):
        Adam(epsilon=value)
