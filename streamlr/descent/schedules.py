"""Learning rates as functions of the step, which counts from 0."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streamlr.descent.ranges import number_above_zero, number_from_zero, real_number, whole_number
from streamlr.errors import UsageError

Array = NDArray[np.float64]
Steps = int | NDArray[np.int64]


class Schedule(Protocol):
    """A learning rate for every step."""

    def __call__(self, step: Steps) -> Array:
        """Return alpha at one step, or at each of an array of steps."""
        ...


@dataclass(frozen=True, slots=True)
class Constant:
    r"""The same rate always.

    .. math:: \alpha_t = \alpha

    Parameters
    ----------
    rate : float
        alpha, above zero.

    Raises
    ------
    UsageError
        The rate is not a finite number above zero.

    Examples
    --------
    >>> float(Constant(0.1)(7))
    0.1
    """

    rate: float

    def __post_init__(self) -> None:
        _take_positive(self, "rate")

    def __call__(self, step: Steps) -> Array:
        """Return alpha."""
        return np.full(np.shape(step), self.rate)


@dataclass(frozen=True, slots=True)
class InverseScaling:
    r"""A rate that falls like a power of the step.

    .. math:: \alpha_t = \alpha (1 + t / \mathrm{steps})^{-\mathrm{power}}

    Parameters
    ----------
    rate : float
        alpha, at step 0.
    power : float
        With a power in (1/2, 1] the last iterate converges (Robbins and Monro 1951, equation 6).
    steps : float
        Steps until 1 + t / steps has doubled.

    Raises
    ------
    UsageError
        A number is not above zero.

    Examples
    --------
    >>> float(InverseScaling(0.1, power=1.0, steps=10)(10))
    0.05
    """

    rate: float
    power: float = 0.5
    steps: float = 1.0

    def __post_init__(self) -> None:
        _take_positive(self, "rate", "power", "steps")

    def __call__(self, step: Steps) -> Array:
        """Return alpha at `step`."""
        return np.asarray(self.rate * (1.0 + np.asarray(step, dtype=np.float64) / self.steps) ** -self.power)


@dataclass(frozen=True, slots=True)
class Exponential:
    r"""A rate that is multiplied by the same factor every so many steps.

    .. math:: \alpha_t = \alpha \, \mathrm{factor}^{t / \mathrm{steps}}

    Parameters
    ----------
    rate : float
        alpha, at step 0.
    factor : float
        What is left of it after `steps`, above 0 and at most 1.
    steps : float
        Steps.

    Raises
    ------
    UsageError
        A number is out of its range.

    Examples
    --------
    >>> float(Exponential(0.1, factor=0.5, steps=100)(200))
    0.025
    """

    rate: float
    factor: float
    steps: float

    def __post_init__(self) -> None:
        _take_positive(self, "rate", "factor", "steps")
        if self.factor > 1:
            raise UsageError(f"factor of Exponential is {self.factor!r}; allowed are numbers above 0 and at most 1: rates fall")

    def __call__(self, step: Steps) -> Array:
        """Return alpha at `step`."""
        return np.asarray(self.rate * self.factor ** (np.asarray(step, dtype=np.float64) / self.steps))


@dataclass(frozen=True, slots=True)
class Cosine:
    r"""A rate that falls along half a cosine, and then stays.

    .. math:: \alpha_t = \alpha (f + (1 - f) (1 + \cos(\pi \min(t / \mathrm{steps}, 1))) / 2)

    Parameters
    ----------
    rate : float
        alpha, at step 0.
    steps : float
        Steps until the rate has fallen to its floor.
    floor : float
        f, the share of alpha that stays, from 0 to 1.

    Raises
    ------
    UsageError
        A number is out of its range.

    References
    ----------
    Loshchilov and Hutter (2017), SGDR: stochastic gradient descent with warm restarts, equation 5.

    Examples
    --------
    >>> Cosine(0.1, steps=100)(np.array([0, 50, 100, 200])).round(12).tolist()
    [0.1, 0.05, 0.0, 0.0]
    """

    rate: float
    steps: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        _take_positive(self, "rate", "steps")
        object.__setattr__(self, "floor", number_from_zero("floor of Cosine", self.floor, 1.0, included=True))

    def __call__(self, step: Steps) -> Array:
        """Return alpha at `step`."""
        done = np.minimum(np.asarray(step, dtype=np.float64) / self.steps, 1.0)
        return np.asarray(self.rate * (self.floor + (1 - self.floor) * (1 + np.cos(np.pi * done)) / 2))


@dataclass(frozen=True, slots=True)
class WarmUp:
    r"""A straight rise over the first steps to what another schedule says there; that schedule counts from the first step.

    .. math:: \alpha_t = \min((t + 1) / \mathrm{steps}, 1) \, \beta_t

    Parameters
    ----------
    steps : float
        Steps of the rise.
    then : Schedule
        beta.

    Raises
    ------
    UsageError
        `steps` is not above zero, or `then` is no schedule.

    Examples
    --------
    >>> WarmUp(4, Constant(1.0))(np.arange(6)).tolist()
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """

    steps: float
    then: Schedule

    def __post_init__(self) -> None:
        _take_positive(self, "steps")
        _check_schedule("then of WarmUp", self.then)

    def __call__(self, step: Steps) -> Array:
        """Return alpha at `step`."""
        return np.asarray(np.minimum((np.asarray(step, dtype=np.float64) + 1) / self.steps, 1.0) * self.then(step))


@dataclass(frozen=True, slots=True)
class Join:
    r"""One schedule after another, each counting from where it starts.

    Parameters
    ----------
    schedules : tuple of Schedule
        One more than there are boundaries.
    boundaries : tuple of int
        Steps at which the next one starts, growing.

    Raises
    ------
    UsageError
        The numbers of schedules and boundaries do not fit, or the boundaries do not grow.

    Examples
    --------
    >>> Join((Constant(1.0), Constant(0.1)), (2,))(np.arange(4)).tolist()
    [1.0, 1.0, 0.1, 0.1]
    """

    schedules: tuple[Schedule, ...]
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("schedules", "boundaries"):
            if not np.iterable(getattr(self, name)):
                raise UsageError(f"{name} of Join is {getattr(self, name)!r}; allowed are tuples")
        object.__setattr__(self, "schedules", tuple(self.schedules))
        object.__setattr__(self, "boundaries", tuple(whole_number("a boundary of Join", step, 1) for step in self.boundaries))
        for schedule in self.schedules:
            _check_schedule("a schedule of Join", schedule)
        growing = all(a < b for a, b in pairwise(self.boundaries))
        if len(self.schedules) != len(self.boundaries) + 1 or not growing:
            raise UsageError(
                f"{len(self.schedules)} schedules are joined at the steps {list(self.boundaries)}; "
                "allowed are growing steps above 0, one fewer than schedules"
            )

    def __call__(self, step: Steps) -> Array:
        """Return alpha at `step`."""
        steps = np.asarray(step, dtype=np.int64)
        rates = np.asarray(self.schedules[0](steps))
        for schedule, boundary in zip(self.schedules[1:], self.boundaries, strict=True):
            rates = np.where(steps >= boundary, schedule(np.maximum(steps - boundary, 0)), rates)
        return rates


def as_schedule(rate: Any) -> Schedule:
    """Return a number as a constant schedule, and a schedule as it is.

    Raises
    ------
    UsageError
        It is neither.

    Examples
    --------
    >>> as_schedule(0.1)
    Constant(rate=0.1)
    """
    if 0 < real_number(rate) < np.inf:
        return Constant(rate)
    _check_schedule("learning_rate", rate)
    schedule: Schedule = rate
    return schedule


def _check_schedule(name: str, schedule: Any) -> None:
    if not isinstance(schedule, SCHEDULES):
        names = ", ".join(kind.__name__ for kind in SCHEDULES)
        number = "'auto', a finite number above zero, and " if name == "learning_rate" else ""
        raise UsageError(f"{name} is {schedule!r}; allowed are {number}the schedules {names}")


def _take_positive(schedule: Any, *names: str) -> None:
    """Make plain floats of numbers that must be above zero."""
    for name in names:
        number = number_above_zero(f"{name} of {type(schedule).__name__}", getattr(schedule, name))
        object.__setattr__(schedule, name, number)


SCHEDULES = (Constant, InverseScaling, Exponential, Cosine, WarmUp, Join)
