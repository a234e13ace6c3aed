"""Steps over prepared rows: batch by batch, or row by row at the speed of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamlr.descent.objective import Objective, column_squares
from streamlr.descent.scaling import SMALLEST, Prepared
from streamlr.descent.schedules import Schedule
from streamlr.descent.updates import Average, Plain, Update

Array = NDArray[np.float64]
SURPRISE = 1.5  # times what a sample promises of all rows: a batch with more curvature than that proves the sample wrong


class Iterate(NamedTuple):
    """Where a descent stands.

    Attributes
    ----------
    b : (d, k) float64
        Coefficients of prepared rows.
    transform : (d, d) float64 or None
        T: steps are taken in coefficients theta with b = T theta; None for b itself.
    memory : NamedTuple of arrays
        What the update rule remembers, of theta.
    average : Average
        Of the iterates b since its last start.
    gradients : (d, k) float64
        Sum of the gradients of theta met in this epoch.
    step : int
        Steps taken.
    """

    b: Array
    transform: Array | None
    memory: Any
    average: Average
    gradients: Array
    step: int


@dataclass(frozen=True, slots=True)
class Walk:
    r"""How steps are taken.

    .. math:: b \leftarrow b - \alpha T T' \nabla J_B(b)

    Attributes
    ----------
    objective : Objective
        What goes down.
    transform : (d, d) float64 or None
        T at the start.
    rule : Update
        What a gradient does.
    schedule : Schedule
        alpha at each step.
    promised : float or None
        The curvature of all rows that a sample promises in any direction; None where the learning rate was given. With it a step
        is capped where all that it sets in motion leads to the least cost of its batch along the gradient, so that rows with heavy
        leverage cannot overshoot.
    average : bool
        Whether the mean of the iterates is kept.
    origin : tuple of (p, k) and (k,) float64, or None
        Coefficients and intercepts, in the user's units, where the descent begins; None for coefficients of zero.
    """

    objective: Objective
    transform: Array | None
    rule: Update
    schedule: Schedule
    promised: float | None
    average: bool
    origin: tuple[Array, Array] | None = None

    @property
    def scale(self) -> str:
        """What the coordinates are called in the history."""
        return "whiten" if self.transform is not None else self.objective.coordinates.name

    @property
    def hold(self) -> int:
        """Steps for which the learning rate is held high; 0 for a schedule that holds nothing."""
        return int(getattr(self.schedule, "hold", 0))

    def start(self) -> Iterate:
        """Return where a descent begins."""
        coordinates = self.objective.coordinates
        b = coordinates.start() if self.origin is None else coordinates.of_user(*self.origin)
        return Iterate(b, self.transform, self.rule.init(b), Average(b, 0.0), np.zeros_like(b), 0)

    def over(self, rows: Prepared, here: Iterate) -> tuple[Iterate, Array]:
        """Take the steps of some prepared rows.

        Parameters
        ----------
        rows : Prepared
            m of them: whole batches, but perhaps for the last.
        here : Iterate
            Where to start from; not changed.

        Returns
        -------
        Iterate
            Where that leads.
        (m, k) float64
            Residuals, each before the step it led to, in units of the targets' scale.
        """
        if self.objective.batch_rows == 1 and isinstance(self.rule, Plain) and not self.objective.ridge:
            return self._over_single_rows(rows, here)
        return self._over_batches(rows, here)

    def _over_batches(self, rows: Prepared, here: Iterate) -> tuple[Iterate, Array]:
        objective, size, gain = self.objective, self.objective.batch_rows, self.rule.gain
        b, transform, memory, average, gradients, step = here
        b, gradients, met = b.copy(), gradients.copy(), np.empty((len(rows), b.shape[1]))
        starts = range(0, len(rows), size)
        for start, alpha in zip(starts, self.schedule(np.arange(step, step + len(starts))), strict=True):
            batch = rows[start : start + size]
            gradient, met[start : start + size] = objective.gradient(batch, b)
            reduced, rate = gradient if transform is None else transform.T.dot(gradient), alpha
            if self.promised is not None:
                transform, reduced, best = self._best_rate(batch, gradient, reduced, transform)
                rate = np.minimum(alpha, best / gain)
            move, memory = self.rule.update(reduced, memory, rate)
            b += move if transform is None else transform.dot(move)
            gradients += reduced
            if self.average:
                average = average.of(b, len(batch))
        return Iterate(b, transform, memory, average, gradients, step + len(starts)), met

    def _best_rate(
        self, rows: Prepared, gradient: Array, reduced: Array, transform: Array | None
    ) -> tuple[Array | None, Array, Array]:
        r"""Return T, shortened if need be, g, and for each target the rate (k,) that goes down to the least cost of the batch.

        .. math:: \alpha = \frac{g'g}{(Tg)' \nabla^2 J_B (Tg)}, \quad g = T' \nabla J_B

        Where this batch alone curves the cost more than the sample promised of all rows, T is shortened along g to what the batch
        proves: once for each target, after which rounding, and other targets, can leave no more than a step that is too short.
        """
        assert self.promised is not None
        for left in range(gradient.shape[1], -1, -1):
            square = column_squares(reduced)
            kappa = self.objective.curvature(rows, reduced if transform is None else transform.dot(reduced))
            if transform is None or not left:
                break
            proven = self.objective.batch_rows / 2 * kappa / np.maximum(square, SMALLEST)
            if not SURPRISE * self.promised < proven.max() < np.inf:
                break
            j = int(proven.argmax())
            transform = shortened(transform, reduced[:, j] / np.sqrt(square[j]), self.promised / proven[j])
            reduced = transform.T.dot(gradient)
        return transform, reduced, square / np.maximum(kappa, SMALLEST)  # of a gradient of zero, 0: it leads nowhere

    def _over_single_rows(self, rows: Prepared, here: Iterate) -> tuple[Iterate, Array]:
        r"""Take plain steps of one row each, many at a time.

        Within a block of rows Z = AT with steps s_i = 2 alpha_i w_i, the residuals r that the steps meet satisfy

        .. math:: r_i + \sum_{j < i} z_i'(s_j z_j) r_j = y_i - a_i'b

        a triangular system; after them theta has grown by the sum of (s_j z_j) r_j. Rows of zeros, which move nothing, fill the
        last block.
        """
        from scipy.linalg.blas import dtrsm  # here, since it brings a second BLAS with it

        b, transform, _, average, gradients, step = here
        m, (d, k), w = len(rows), b.shape, rows.w
        height = block_rows(d)
        filled = m + -m % height
        z, met = np.empty((filled, d)), np.empty((filled, k))
        transform = self._reduce_rows(rows, transform, z[:m])
        np.subtract(rows.y, rows.times(b), out=met[:m])
        z[m:], met[m:] = 0.0, 0.0
        sizes = np.zeros((filled, 1))
        sizes[:m, 0] = 2 * self.schedule(np.arange(step, step + m))
        if w is not None:
            sizes[:m] *= w
        if self.promised is not None:
            square = np.einsum("ij,ij->i", z, z)[:, None]
            sizes = np.minimum(sizes, np.divide(1.0, square, out=np.full_like(square, np.inf), where=square > 0))
        moves = sizes * z
        blocks, across = z.reshape(-1, height, d), moves.reshape(-1, height, d).transpose(0, 2, 1)
        systems = (blocks @ across).transpose(0, 2, 1)  # dtrsm wants Fortran's order, in which they are upper triangles
        theta = np.zeros_like(b)  # its growth in these rows
        for block, back, system, residuals in zip(blocks, across, systems, met.reshape(-1, height, k), strict=True):
            residuals -= block.dot(theta)  # of so few rows, ndarray.dot costs half of what @ does
            residuals[:] = dtrsm(1.0, system, residuals, lower=0, trans_a=1, diag=1, overwrite_b=1)
            theta += back.dot(residuals)
        met = met[:m]
        gradients = gradients - 2 * z[:m].T.dot(met if w is None else w * met)
        if self.average:
            share = np.arange(m, 0, -1.0)[:, None] / m  # of the iterates, those that a row's step is in
            growth = moves[:m].T.dot(share * met)
            average = average.of(b + (growth if transform is None else transform @ growth), m)
        b = b + (theta if transform is None else transform @ theta)
        return Iterate(b, transform, here.memory, average, gradients, step + m), met

    def _reduce_rows(self, rows: Prepared, transform: Array | None, out: Array) -> Array | None:
        """Write AT into `out`, and return T, shortened where a row alone curves the cost more than the sample promised of all."""
        if transform is None:
            assert rows.units is None, "features stay as they are in large batches only"
            out[:, : rows.z.shape[1]], out[:, rows.z.shape[1] :] = rows.z, 1.0
            return None
        rows.times(transform, out)
        if self.promised is None:
            return transform
        squares = np.einsum("ij,ij->i", out, out) * (1.0 if rows.w is None else rows.w[:, 0])
        surprising = np.flatnonzero((squares > SURPRISE * self.promised) & (squares < np.inf))
        for i in surprising:
            row = rows[i : i + 1].times(transform)[0]
            square = float(row @ row)
            proven = square * (1.0 if rows.w is None else float(rows.w[i, 0]))
            if proven > SURPRISE * self.promised:
                transform = shortened(transform, row / np.sqrt(square), self.promised / proven)
        if len(surprising):
            rows.times(transform, out)
        return transform


def working_bytes(rows: int, width: int, batch_rows: int) -> int:
    """Return what the steps of so many rows need beside them: of single rows, Z, its multiples and the triangular systems."""
    return 8 * rows * (3 * width + 2 * block_rows(width)) if batch_rows == 1 else 8 * rows * 4


def block_rows(width: int) -> int:
    """Return how many single rows are solved together: fewer cost calls, more cost arithmetic."""
    return 64 if width <= 32 else 32 if width <= 200 else 16


def shortened(transform: Array, direction: Array, share: float) -> Array:
    r"""Return T (I - (1 - sqrt(share)) v v'): along the direction v, curvature is `share` of what it was.

    Examples
    --------
    >>> shortened(np.eye(2), np.array([1.0, 0.0]), 0.25)
    array([[0.5, 0. ],
           [0. , 1. ]])
    """
    return transform - np.outer(transform @ direction, (1 - np.sqrt(share)) * direction)
