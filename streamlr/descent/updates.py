"""Update rules as (init, update) pairs over NamedTuples of arrays: state in, state out, nothing is changed in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from streamlr.descent.ranges import number_above_zero, number_from_zero
from streamlr.errors import UsageError

Array = NDArray[np.float64]


class Update(Protocol):
    """A rule that turns gradients into steps."""

    @property
    def gain(self) -> float:
        """How many times its learning rate the rule steps, in the long run, along a gradient that stays the same."""
        ...

    def init(self, theta: Array) -> Any:
        """Return the state before the first step from coefficients `theta`."""
        ...

    def update(self, gradient: Array, state: Any, rate: Array | float) -> tuple[Array, Any]:
        """Return the step to add to the coefficients, and the next state."""
        ...


class PlainState(NamedTuple):
    """Nothing is remembered."""


@dataclass(frozen=True, slots=True)
class Plain:
    r"""The textbook's step.

    .. math:: \theta_{t+1} = \theta_t - \alpha_t g_t

    Examples
    --------
    >>> rule = Plain()
    >>> rule.update(np.array([2.0]), rule.init(np.zeros(1)), 0.1)[0]
    array([-0.2])
    """

    @property
    def gain(self) -> float:
        """One."""
        return 1.0

    def init(self, theta: Array) -> PlainState:
        """Return the empty state."""
        return PlainState()

    def update(self, gradient: Array, state: PlainState, rate: Array | float) -> tuple[Array, PlainState]:
        """Return -alpha g."""
        return -rate * gradient, state


class MomentumState(NamedTuple):
    """What is left of earlier steps.

    Attributes
    ----------
    velocity : array like theta, float64
        v.
    """

    velocity: Array


@dataclass(frozen=True, slots=True)
class Momentum:
    r"""Earlier steps fade slowly, so that those in one direction add up.

    .. math:: v_{t+1} = \beta v_t - \alpha_t g_t, \quad \theta_{t+1} = \theta_t + v_{t+1}

    Parameters
    ----------
    decay : float
        beta, from 0 to below 1.

    Raises
    ------
    UsageError
        beta is out of its range.

    References
    ----------
    Polyak (1964), Some methods of speeding up the convergence of iteration methods, equation 9; in the form of Sutskever, Martens,
    Dahl and Hinton (2013), equations 1 and 2.

    Examples
    --------
    >>> rule = Momentum(0.5)
    >>> step, state = rule.update(np.array([2.0]), rule.init(np.zeros(1)), 0.1)
    >>> rule.update(np.array([2.0]), state, 0.1)[0]
    array([-0.3])
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        _take_decays(self, "decay")

    @property
    def gain(self) -> float:
        """1 / (1 - beta)."""
        return 1 / (1 - self.decay)

    def init(self, theta: Array) -> MomentumState:
        """Return a velocity of zero."""
        return MomentumState(np.zeros_like(theta))

    def update(self, gradient: Array, state: MomentumState, rate: Array | float) -> tuple[Array, MomentumState]:
        """Return the new velocity."""
        velocity = self.decay * state.velocity - rate * gradient
        return velocity, MomentumState(velocity)


@dataclass(frozen=True, slots=True)
class Nesterov(Momentum):
    r"""Momentum whose gradient is taken where the velocity leads.

    .. math:: v_{t+1} = \beta v_t - \alpha_t \nabla J(\theta_t + \beta v_t), \quad \theta_{t+1} = \theta_t + v_{t+1}

    The coefficients here are the places phi = theta + beta v at which gradients are taken, so that one gradient at the current
    coefficients is all that is asked for: phi moves by beta v_{t+1} - alpha g.

    Parameters
    ----------
    decay : float
        beta, from 0 to below 1.

    Raises
    ------
    UsageError
        beta is out of its range.

    References
    ----------
    Nesterov (1983), A method of solving a convex programming problem with convergence rate O(1/k^2); in the form of Sutskever,
    Martens, Dahl and Hinton (2013), equations 3 and 4.

    Examples
    --------
    >>> rule = Nesterov(0.5)
    >>> rule.update(np.array([2.0]), rule.init(np.zeros(1)), 0.1)[0]
    array([-0.3])
    """

    def update(self, gradient: Array, state: MomentumState, rate: Array | float) -> tuple[Array, MomentumState]:
        """Return beta times the new velocity, less alpha g."""
        step = rate * gradient
        velocity = self.decay * state.velocity - step
        return self.decay * velocity - step, MomentumState(velocity)


class AdamState(NamedTuple):
    """Means of gradients, and of their squares.

    Attributes
    ----------
    mean, square : array like theta, float64
        m and v.
    fading : (2,) float64
        beta_1^t and beta_2^t, which tell how much of the means is still missing.
    """

    mean: Array
    square: Array
    fading: Array


@dataclass(frozen=True, slots=True)
class Adam:
    r"""A step for each coefficient by the sizes of its own gradients.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
        \theta_t = \theta_{t-1} - \alpha_t \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    Parameters
    ----------
    decay, square_decay : float
        beta_1 and beta_2, from 0 to below 1.
    epsilon : float
        Above zero.

    Raises
    ------
    UsageError
        A number is out of its range.

    References
    ----------
    Kingma and Ba (2015), Adam: a method for stochastic optimization, algorithm 1.

    Examples
    --------
    >>> rule = Adam()
    >>> rule.update(np.array([2.0, -7.0]), rule.init(np.zeros(2)), 0.1)[0].round(6)
    array([-0.1,  0.1])
    """

    decay: float = 0.9
    square_decay: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        _take_decays(self, "decay", "square_decay")
        object.__setattr__(self, "epsilon", number_above_zero("epsilon of Adam", self.epsilon))

    @property
    def gain(self) -> float:
        """NaN: the size of a step does not depend on that of the gradient."""
        return float("nan")

    def init(self, theta: Array) -> AdamState:
        """Return means of zero."""
        return AdamState(np.zeros_like(theta), np.zeros_like(theta), np.ones(2))

    def update(self, gradient: Array, state: AdamState, rate: Array | float) -> tuple[Array, AdamState]:
        """Return the step of algorithm 1."""
        mean = self.decay * state.mean + (1 - self.decay) * gradient
        square = self.square_decay * state.square + (1 - self.square_decay) * gradient**2
        fading = state.fading * (self.decay, self.square_decay)
        step = -rate * (mean / (1 - fading[0])) / (np.sqrt(square / (1 - fading[1])) + self.epsilon)
        return step, AdamState(mean, square, fading)


class Average(NamedTuple):
    """The mean of iterates, weighted by the rows of their steps (Polyak and Juditsky 1992, equation 4).

    Attributes
    ----------
    b : (d, k) float64
        The mean.
    rows : float
        Their weights.
    """

    b: Array
    rows: float

    def of(self, b: Array, rows: float) -> Average:
        """Return the average with one more iterate."""
        total = self.rows + rows
        return Average(self.b + (b - self.b) * (rows / total), total)


CLOSE = 1e-4  # as a share of a cost: by less, held-out rows cannot tell two epochs apart, and the later has seen more


class Best(NamedTuple):
    """The latest coefficients whose cost is the lowest so far, or close to it.

    Attributes
    ----------
    b : (d, k) float64
        The coefficients.
    cost : float
        The lowest cost.
    """

    b: Array
    cost: float

    def of(self, b: Array, cost: float) -> Best:
        """Return the better of these and later ones."""
        return Best(b.copy(), min(cost, self.cost)) if cost < np.inf and cost <= (1 + CLOSE) * self.cost else self


def as_update(update: Any) -> Update:
    """Return the rule that a word stands for, with its defaults; a rule stands for itself.

    Raises
    ------
    UsageError
        It is neither.
    """
    if isinstance(update, str) and update in UPDATES:
        return UPDATES[update]
    if not isinstance(update, Plain | Momentum | Nesterov | Adam):
        allowed = ", ".join(map(repr, UPDATES))
        raise UsageError(f"update is {update!r}; allowed are {allowed}, or a rule such as Momentum(0.8)")
    return update


def _take_decays(rule: Any, *names: str) -> None:
    """Make plain floats of numbers that must be from 0 to below 1."""
    for name in names:
        number = number_from_zero(f"{name} of {type(rule).__name__}", getattr(rule, name), 1.0)
        object.__setattr__(rule, name, number)


UPDATES: dict[str, Update] = {"plain": Plain(), "momentum": Momentum(), "nesterov": Nesterov(), "adam": Adam()}
