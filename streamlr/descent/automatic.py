"""What needs no tuning: coordinates and learning rate from a sample of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import Block
from streamlr.dataset.buffers import Buffer
from streamlr.descent.objective import Objective
from streamlr.descent.options import Descent
from streamlr.descent.scaling import Coordinates, Prepared, plain_coordinates, standard_coordinates
from streamlr.descent.schedules import Constant, Steps, as_schedule
from streamlr.descent.steps import Walk
from streamlr.descent.updates import Adam
from streamlr.errors import NumericalError, UsageError

Array = NDArray[np.float64]
SAMPLE_ROWS = 32_768
SAMPLE_BYTES = 64 * 2**20
MOST_WHITENED = 1_000  # features; beyond, p^2 numbers and the eigenvectors cost more than they save
SPREAD = 5.0  # of eigenvalues, up to which descent is as quick without whitening
FEW_STEPS = 1_000  # below which every step counts more than what whitening costs
FLOOR = 1e-12  # of the largest eigenvalue of a sample: below is rounding
ADAM_RATE = 0.02
HOLD = 5  # times the steps in which a descent forgets its start


@dataclass(frozen=True, slots=True)
class Automatic:
    r"""A rate that holds, and then falls like the weight of one more number in a mean.

    .. math:: \alpha_t = \min(\alpha_0, c / \max(1, t - \mathrm{hold}))

    Where the Hessian is twice the identity, which is what whitening makes of it, the last iterate is then a mean of those that
    single steps would lead to, with weights that grow like t.

    Attributes
    ----------
    rate : float
        alpha_0.
    hold : int
        Steps before the fall begins.
    share : float
        c.
    """

    rate: float
    hold: int
    share: float = 1.0

    def __call__(self, step: Steps) -> Array:
        """Return alpha at `step`."""
        return np.minimum(self.rate, self.share / np.maximum(np.asarray(step, dtype=np.float64) + 1 - self.hold, 1.0))


def sample_rows(width: int) -> int:
    """Return how many rows a sample has."""
    return max(min(SAMPLE_ROWS, SAMPLE_BYTES // (8 * width)), 1)


def sample_bytes(width: int, n_rows: int = SAMPLE_ROWS, *, whitens: bool = True) -> int:
    """Return what a sample of so many rows takes: itself, its prepared rows, as much to work with, and the whitening."""
    whitening = 6 * 8 * width**2 if whitens and width <= MOST_WHITENED else 0
    return 4 * 8 * width * min(sample_rows(width), n_rows) + whitening


def walk_of(
    sample: Array,
    options: Descent,
    *,
    n_features: int,
    n_targets: int,
    weighted: bool,
    fit_intercept: bool,
    ridge: float,
    n_rows: int,
    n_kept: int | None = None,
) -> Walk:
    """Return how to go down: in which coordinates, by which rule, at which rate.

    With scale="auto" the columns are whitened where the eigenvalues of the sample's correlations spread by more than five or there
    are fewer than 1,000 steps, p is at most 1,000, and the sample has 3p rows or is everything; else they are standardised.

    Parameters
    ----------
    sample : (m, p + k), or (m, p + k + 1) float64
        Rows [x y w].
    options : Descent
        What was asked for.
    n_features, n_targets, weighted : int, int, bool
        What the columns of the sample are.
    fit_intercept, ridge
        As for `fit`.
    n_rows : int
        Rows to train on.
    n_kept : int or None
        About how many of them lack no value; None for all.

    Raises
    ------
    UsageError
        Whitening was asked for, of too many columns.
    NumericalError
        The rows, or their squares, leave the range of float64.

    References
    ----------
    Bach and Moulines (2013), Non-strongly-convex smooth stochastic approximation with convergence rate O(1/n), theorem 1, for the
    constant R^2; Jain, Kakade, Kidambi, Netrapalli and Sidford (2018), Parallelizing stochastic gradient descent for least squares
    regression, section 3.1, for batches.
    """
    kept = n_rows if n_kept is None else n_kept
    columns, weights = (sample[:, :-1], sample[:, -1]) if weighted else (sample, None)
    if options.scale is None:
        coordinates = plain_coordinates(weights, n_features, n_targets, intercept=fit_intercept)
    else:
        coordinates = standard_coordinates(columns, weights, n_features, intercept=fit_intercept)
        # a penalty curves the cost as the square of a column does: measured in both, every column curves it alike
        coordinates = replace(coordinates, scale=np.hypot(coordinates.scale, np.sqrt(ridge)))
    if options.scale == "whiten" and n_features > MOST_WHITENED:
        raise UsageError(
            f"scale is 'whiten' and there are {n_features:,} features; allowed are up to {MOST_WHITENED:,}: use 'standard'"
        )
    enough = n_features <= MOST_WHITENED and len(sample) >= min(kept, 3 * n_features)
    considered = options.scale == "whiten" or (options.scale == "auto" and options.mode != "gd" and enough)
    objective = Objective(coordinates, options.batch_rows(n_rows, n_features), ridge)
    m = objective.batch_rows
    steps = -(-kept // (m * options.streams)) * (options.max_epochs or 1)
    always = options.scale == "whiten" or steps < FEW_STEPS
    x, y = (Buffer().array((len(sample), width)) for width in (n_features, n_targets))  # given back before windows need as much
    x[:], y[:] = columns[:, :n_features], columns[:, n_features:]
    rows = coordinates.prepare(Block(0, len(sample), x, y, None if weights is None else weights.copy()))
    with np.errstate(all="ignore"):  # what leaves the range of float64 is found
        for numbers in (rows.z, rows.y) if rows.w is None else (rows.z, rows.y, rows.w):
            _check_finite(numbers)
        transform = whitening(coordinates, rows, kept, ridge, always=always) if considered else None
    average, rule = bool(options.average), options.rule
    if options.learning_rate != "auto":
        return Walk(objective, transform, rule, as_schedule(options.learning_rate), None, average)
    with np.errstate(all="ignore"):
        most, heavy = curvature(coordinates, rows, transform, ridge)
    if options.mode == "gd":
        return Walk(objective, transform, rule, Constant(1.0), 2 * most, average)
    hold = steps // (2 if transform is None else 10)
    if isinstance(rule, Adam):  # its steps have a size of their own
        return Walk(objective, transform, rule, Automatic(ADAM_RATE, hold), None, average)
    rate = m / (2 * (heavy + (m - 1) * most))
    fading = int(HOLD * 2 * (rule.gain - 1))  # steps in which the oscillations of a rule that remembers fade
    hold = max(hold, min(fading, steps // 2))
    return Walk(objective, transform, rule, Automatic(rate / rule.gain, hold, 1 / rule.gain), kept * most, average)


def whitening(coordinates: Coordinates, rows: Prepared, n_rows: int, ridge: float, *, always: bool) -> Array | None:
    r"""Return T (d, d) in which the penalised cost of a sample curves alike in all directions of the features.

    .. math:: T'(\tfrac1m Z'WZ + \lambda D^{-2})T = I

    Without a penalty the columns are then uncorrelated and of unit variance. The column of ones is left alone, and a direction that
    the sample does not show is given the variance that one row among all may have. None where there is little to gain, unless
    `always` is asked for.
    """
    p = coordinates.n_features
    z = _weighted(rows.z, rows.w)
    gram = z.T @ z / max(len(z), 1) + np.diag(stiffness(coordinates, ridge)[:p])
    _check_finite(gram)
    values, vectors = np.linalg.eigh(gram)
    top = float(values[-1]) if values[-1] > 0 else 1.0
    if not always and values[0] * SPREAD >= top:
        return None
    transform = np.eye(coordinates.n_trained)
    transform[:p, :p] = vectors / np.sqrt(np.where(values > FLOOR * top, values, top / n_rows))
    return transform


def curvature(coordinates: Coordinates, rows: Prepared, transform: Array | None, ridge: float) -> tuple[float, float]:
    """Return how the penalised cost of a sample of Z = AT curves: half its Hessian's largest eigenvalue, and what one row adds.

    The second is the mean of w |z|^2, weighted by w |z|^2, and the penalty. Without T the penalty's part in the first is a bound,
    at most twice too large.
    """
    z = rows.design if transform is None else rows.times(transform, Buffer().array((len(rows), transform.shape[1])))
    z = _weighted(z, rows.w)
    squares, penalty = np.einsum("ij,ij->i", z, z), stiffness(coordinates, ridge)
    gram = z.T @ z if transform is not None or len(z) >= z.shape[1] else z @ z.T
    gram = gram / max(len(z), 1)
    stiffest = float(penalty.max(initial=0.0))
    if ridge and transform is not None:
        held = transform.T @ (penalty[:, None] * transform)
        _check_finite(held)
        gram, stiffest = gram + held, float(np.linalg.eigvalsh(held)[-1])
    total = float(squares.sum())
    heavy = float(squares @ (squares / total)) if total else 1.0
    _check_finite(np.append(gram, [heavy, stiffest]))
    most = float(np.linalg.eigvalsh(gram).max(initial=0.0)) + (stiffest if transform is None else 0.0)
    return max(most, float(np.finfo(np.float64).tiny)), heavy + stiffest


def stiffness(coordinates: Coordinates, ridge: float) -> Array:
    """Return half of what the penalty adds to the Hessian's diagonal, (d,)."""
    with np.errstate(all="ignore"):
        return coordinates.penalty(np.ones((coordinates.n_trained, 1)), ridge)[:, 0] / 2


def _weighted(z: Array, w: Array | None) -> Array:
    """Return rows times the roots of their weights: themselves where they have none."""
    return z if w is None else np.multiply(z, np.sqrt(w), out=Buffer().array(z.shape))


def _check_finite(values: Array) -> None:
    if not np.isfinite(values).all():
        raise NumericalError(
            "the columns, or their squares, leave the range of float64 in the coordinates of the descent; measure them "
            "and the target in units in which they are nearer to 1, or choose scale='auto'"
        )
