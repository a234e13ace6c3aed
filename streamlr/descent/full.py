"""Full-batch descent: each step by the gradient of all rows, from moments or from a pass over the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamlr.aggregates.cost import Cost, Residuals, ResidualsOf, cost_of_moments
from streamlr.aggregates.moments import Moments
from streamlr.dataset.blocks import Block
from streamlr.descent.loop import GROWN, diverged, followed, grown
from streamlr.descent.options import Descent
from streamlr.descent.scaling import Coordinates
from streamlr.descent.steps import Iterate, Walk
from streamlr.descent.stopping import Record, verdict
from streamlr.descent.updates import Best

Array = NDArray[np.float64]


class Slope(NamedTuple):
    """What all rows say of some coefficients.

    Attributes
    ----------
    value : float
        J, penalised, summed over targets, in squared units of their scales.
    gradient : (d, k) float64
        Its gradient, by the coefficients of prepared rows.
    cost : Cost
        J in the user's units.
    """

    value: float
    gradient: Array
    cost: Cost


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Sums over rows from which the gradient follows; a commutative monoid.

    Attributes
    ----------
    products : (d, k) float64
        A'Wr of the prepared columns A and residuals r = y - Ab.
    squares : float
        sum w r^2, over targets.
    weight_sum : float
        W, in units of the sample's mean weight.
    residuals : Residuals
        In the user's units.
    """

    products: Array
    squares: float
    weight_sum: float
    residuals: Residuals

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.products + other.products,
            self.squares + other.squares,
            self.weight_sum + other.weight_sum,
            self.residuals + other.residuals,
        )

    def absorb(self, other: Sums) -> Sums:
        """Return the sum, in memory of its own."""
        return self + other


@dataclass(frozen=True, slots=True, eq=False)
class SumsOf:
    """The statistic whose values are the `Sums` of given coefficients.

    Attributes
    ----------
    coordinates : Coordinates
        What rows are prepared with.
    b : (d, k) float64
        Coefficients of prepared rows.
    """

    coordinates: Coordinates
    b: Array

    @property
    def nbytes(self) -> int:
        """Bytes of one value."""
        return self.b.nbytes + self._residuals.nbytes

    @property
    def row_bytes(self) -> int:
        """Predictions, residuals and these weighted."""
        return 3 * self.b[:1].nbytes

    @property
    def as_stored(self) -> bool:
        """Features come as float64."""
        return False

    def empty(self) -> Sums:
        """Return the sums over no rows."""
        return Sums(np.zeros_like(self.b), 0.0, 0.0, self._residuals.empty())

    def of(self, block: Block) -> Sums:
        """Return the sums over the rows of `block`."""
        with np.errstate(all="ignore"):  # what leaves the range of float64 is found in the sum
            rows = self.coordinates.prepared(block)
            residuals = rows.y - rows.times(self.b)
            weighted = residuals if rows.w is None else rows.w * residuals
            products, squares = rows.transposed_times(weighted), float((weighted * residuals).sum())
        if not np.isfinite(squares):
            block.confirm()
            return Sums(products, squares, 0.0, self._residuals.empty())
        return Sums(products, squares, float(len(rows) if rows.w is None else rows.w.sum()), self._residuals.of(block))

    @property
    def _residuals(self) -> ResidualsOf:
        return ResidualsOf(*self.coordinates.to_user(self.b))

    def slope(self, sums: Sums, ridge: float) -> Slope:
        """Return what the sums over all rows say."""
        gradient = sums.products * (-2 / sums.weight_sum) if sums.weight_sum else sums.products
        value = sums.squares / sums.weight_sum if sums.weight_sum else np.inf
        if ridge:
            penalty = self.coordinates.penalty(self.b, ridge)
            gradient, value = gradient + penalty, value + float((penalty * self.b).sum()) / 2
        return Slope(value, gradient, sums.residuals.cost())


class Quadratic:
    r"""The cost of all rows from their moments, in the coordinates of prepared rows.

    .. math:: J(b) = b'Hb - 2c'b + \overline{y^2}, \quad \nabla J = 2(Hb - c)

    Parameters
    ----------
    moments : Moments
        Of the rows.
    coordinates : Coordinates
        The coordinates; their centre need not be that of the rows.
    ridge : float
        lambda, on the coefficients in the user's units.
    """

    def __init__(self, moments: Moments, coordinates: Coordinates, ridge: float) -> None:
        self.moments, self.coordinates, self.ridge = moments, coordinates, ridge
        p, d, unit = moments.n_features, coordinates.n_trained, moments.units
        scale = np.ldexp(np.concatenate([coordinates.scale, coordinates.target_scale]), -unit)
        centre = np.ldexp(np.concatenate([coordinates.mean, coordinates.target_mean]), -unit)
        with np.errstate(all="ignore"):  # what leaves the range of float64 is found in the slope
            offset = ((moments.mean - centre) + moments.mean_rest) / scale
            second = moments.scatter / scale[:, None] / scale / moments.weight_sum + offset[:, None] * offset
        hessian = np.empty((d, d))
        product = np.empty((d, moments.n_targets))
        hessian[:p, :p], product[:p] = second[:p, :p], second[:p, p:]
        hessian[p:, :p], hessian[:p, p:] = offset[:p], offset[:p, None]
        hessian[p:, p:], product[p:] = 1.0, offset[p:]
        self._hessian, self._product, self._square = hessian, product, float(np.trace(second[p:, p:]))

    def slope(self, b: Array) -> Slope:
        """Return value, gradient and cost of some coefficients, reading nothing."""
        coordinates = self.coordinates
        ahead = self._hessian @ b - self._product
        gradient = 2 * ahead
        value = float((b * (ahead - self._product)).sum()) + self._square
        if self.ridge:
            penalty = coordinates.penalty(b, self.ridge)
            gradient, value = gradient + penalty, value + float((penalty * b).sum()) / 2
        coef, intercept = coordinates.to_user(b)
        return Slope(value, gradient, cost_of_moments(self.moments, coef, intercept))


class Curvature(NamedTuple):
    """The most curvature seen so far, for learning rates that are found.

    Attributes
    ----------
    move, gradient : (d, k) float64
        The last step, and the gradient before it, both in the coordinates that steps are taken in.
    most : (k,) float64
        The largest change of the gradient beside the step that made it: a lower bound of the largest eigenvalue of the Hessian.
    """

    move: Array
    gradient: Array
    most: Array

    def met(self, gradient: Array) -> Curvature:
        """Return the curvature with what the gradient behind the last step says."""
        moved = np.linalg.norm(self.move, axis=0)
        changed = np.linalg.norm(gradient - self.gradient, axis=0)
        found = np.divide(changed, moved, out=np.zeros_like(moved), where=moved > 0)
        return Curvature(self.move, gradient, np.maximum(self.most, found))


class FullState(NamedTuple):
    """Everything that a full-batch descent needs in order to go on.

    Attributes
    ----------
    here : Iterate
        Coefficients and the rule's memory.
    best : Best
        The coefficients of the least watched cost so far.
    curvature : Curvature
        For learning rates that are found.
    epoch : int
        Gradients seen.
    first : (2,) float64
        Value and gradient's norm at the start.
    seconds : float
        Time used.
    history : tuple of Record
        What was recorded.
    stopped : str
        Why it ended; empty while it runs.
    """

    here: Iterate
    best: Best
    curvature: Curvature
    epoch: int
    first: Array
    seconds: float
    history: tuple[Record, ...]
    stopped: str


@dataclass(frozen=True, slots=True)
class FullLoop:
    """A descent by gradients of all rows.

    Attributes
    ----------
    options : Descent
        When to record and when to stop.
    walk : Walk
        The rule and its learning rate; with `walk.promised` it is divided by the most curvature seen.
    slope : callable
        b -> Slope.
    optimum : (k,) float64 or None
        The penalised J of the exact solution, in the user's units, where it is known.
    validate, record, save : callable
        As for `Loop`.
    """

    options: Descent
    walk: Walk
    slope: Callable[[Array], Slope]
    optimum: Array | None
    validate: Callable[[Array, Array], Cost] | None
    record: Callable[[Record], None]
    save: Callable[..., None]

    def start(self) -> FullState:
        """Return the state before the first step; what the sample promises is a first guess of the curvature."""
        here = self.walk.start()
        curvature = Curvature(here.gradients, here.gradients, np.full(here.b.shape[1], self.walk.promised or 0.0))
        return FullState(here, Best(here.b, np.inf), curvature, 0, np.zeros(2), 0.0, (), "")

    def run(self, state: FullState) -> FullState:
        """Go down from a state until a rule says why to stop.

        Raises
        ------
        Diverged
            The coefficients left the range of float64, or with a given learning rate the cost grew tenfold; one that is found from
            the curvature may start too high, and then knows better after one step.
        """
        return followed(state, lambda now: (self._step(now) for _ in range(1)), self.save)

    def result(self, state: FullState) -> Array:
        """Return the coefficients that a state stands for: the best by held-out rows, else the last."""
        return state.best.b if self.validate else state.here.b

    def _step(self, state: FullState) -> FullState:
        """Look at the slope, record it, ask the rules, and take a step if none says stop."""
        walk = self.walk
        began = monotonic() - state.seconds
        here, best, curvature, epoch, first, _, history, _ = state
        finds = walk.promised is not None
        with np.errstate(all="ignore"):
            value, gradient, cost = self.slope(here.b)
            if here.transform is not None:
                gradient = here.transform.T @ gradient
            norm = float(np.linalg.norm(gradient))
        if epoch == 0:
            first = np.array([value, norm])
        if what := grown(value if np.isfinite(norm) else np.inf, first[0], np.inf if finds else GROWN):
            last = history[-1].learning_rate if history else None
            raise diverged(walk, here.step, best.b, history, what, last)
        curvature = curvature.met(gradient)
        rate = walk.schedule(here.step) / (curvature.most if finds else 1.0)
        coef, intercept = walk.objective.coordinates.to_user(here.b)
        epoch += 1
        record = Record(
            epoch=epoch,
            steps=here.step,
            rows=epoch * cost.n,
            learning_rate=float(np.max(rate)),
            cost=cost,
            validation=None if self.validate is None else self.validate(coef, intercept),
            gradient_norm=norm,
            gap=None if self.optimum is None else _difference(penalised(cost, coef, walk.objective.ridge), self.optimum),
            scale=walk.scale,
            seconds=monotonic() - began,
        )
        self.record(record)
        history = (*history, record)
        best = best.of(here.b, record.watched)
        stopped = verdict(history, float(first[1]), self.options)
        if not stopped:
            with np.errstate(all="ignore"):
                move, memory = walk.rule.update(gradient, here.memory, rate)
                ahead = move if here.transform is None else here.transform @ move
                here = here._replace(b=here.b + ahead, memory=memory, step=here.step + 1)
                curvature = curvature._replace(move=move)
        return FullState(here, best, curvature, epoch, first, monotonic() - began, history, stopped)


def penalised(cost: Cost, coef: Array, ridge: float) -> Array:
    """Return J with its penalty, (k,), in squared units of the targets."""
    with np.errstate(over="ignore"):
        return np.asarray(np.atleast_1d(cost.mse) + (ridge * (coef**2).sum(axis=0) if ridge else 0.0))


def _difference(values: Array, others: Array) -> float | Array:
    with np.errstate(invalid="ignore"):  # where both are beyond float64, nobody knows
        difference = values - others
    return float(difference[0]) if len(difference) == 1 else difference
