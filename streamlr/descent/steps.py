"""Steps over prepared rows: batch by batch, or row by row at the speed of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamlr.descent.objective import Objective
from streamlr.descent.schedules import Schedule
from streamlr.descent.updates import Average, Plain, Update

Array = NDArray[np.float64]
BLOCK_ROWS = 64  # of single rows solved together: fewer cost calls, more cost arithmetic
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
    """

    objective: Objective
    transform: Array | None
    rule: Update
    schedule: Schedule
    promised: float | None
    average: bool

    @property
    def scale(self) -> str:
        """What the coordinates are called in the history."""
        if self.transform is not None:
            return "whiten"
        return "none" if (self.objective.coordinates.scale == 1).all() else "standard"

    def start(self) -> Iterate:
        """Return where a descent begins: coefficients of zero."""
        b = self.objective.coordinates.start()
        return Iterate(b, self.transform, self.rule.init(b), Average(b, 0.0), np.zeros_like(b), 0)

    def over(self, rows: Array, here: Iterate) -> tuple[Iterate, Array]:
        """Take the steps of some prepared rows.

        Parameters
        ----------
        rows : (m, width) float64
            Whole batches, but perhaps for the last.
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

    def _over_batches(self, rows: Array, here: Iterate) -> tuple[Iterate, Array]:
        objective, size = self.objective, self.objective.batch_rows
        b, transform, memory, average, gradients, step = here
        gradients = gradients.copy()
        residuals = np.empty((len(rows), b.shape[1]))
        count = -(-len(rows) // size)
        for number, alpha in enumerate(self.schedule(np.arange(step, step + count))):
            batch = rows[number * size : (number + 1) * size]
            gradient, residuals[number * size : number * size + len(batch)] = objective.gradient(batch, b)
            rate = alpha
            if self.promised is not None:
                transform, best = self._best_rate(batch, gradient, transform)
                rate = np.minimum(alpha, best / self.rule.gain)
            reduced = gradient if transform is None else transform.T @ gradient
            move, memory = self.rule.update(reduced, memory, rate)
            b = b + (move if transform is None else transform @ move)
            gradients += reduced
            if self.average:
                average = average.of(b, len(batch))
        return Iterate(b, transform, memory, average, gradients, step + count), residuals

    def _best_rate(self, batch: Array, gradient: Array, transform: Array | None) -> tuple[Array | None, Array]:
        r"""Return, for each target, the rate (k,) that goes down to the least cost of the batch, and T, shortened if need be.

        .. math:: \alpha = \frac{g'g}{(Tg)' \nabla^2 J_B (Tg)}, \quad g = T' \nabla J_B

        Where this batch alone curves the cost more than the sample promised of all rows, T is shortened along g to what the batch
        proves.
        """
        assert self.promised is not None
        while True:
            reduced = gradient if transform is None else transform.T @ gradient
            square = np.einsum("ij,ij->j", reduced, reduced)
            kappa = self.objective.curvature(batch, reduced if transform is None else transform @ reduced)
            rate = np.divide(square, kappa, out=np.full_like(square, np.inf), where=kappa > 0)
            proven = self.objective.batch_rows / 2 / rate
            j = int(np.argmax(proven))
            if transform is None or not SURPRISE * self.promised < proven[j] < np.inf:
                return transform, rate
            transform = shortened(transform, reduced[:, j] / np.sqrt(square[j]), self.promised / proven[j])

    def _over_single_rows(self, rows: Array, here: Iterate) -> tuple[Iterate, Array]:
        r"""Take plain steps of one row each, many at a time.

        Within a block of rows Z = AT with K = ZZ' and steps s_i = 2 alpha_i w_i, the residuals r that the steps meet satisfy

        .. math:: r_i + \sum_{j < i} K_{ij} s_j r_j = y_i - a_i'b

        a triangular system; after them theta has grown by Z'(s r), and the sum of the iterates follows as well.
        """
        from scipy.linalg.blas import dtrsm  # here, since it brings a second BLAS with it

        b, transform, _, average, gradients, step = here
        a, y, w = self.objective.coordinates.parts(rows)
        z, transform = self._reduced_rows(a, w, transform)
        k = b.shape[1]
        sizes = 2 * self.schedule(np.arange(step, step + len(rows)))[:, None]
        if w is not None:
            sizes = sizes * w
        residuals, apart = np.empty((len(rows), k)), y - a @ b
        theta, iterates, slopes = (
            np.zeros_like(b) for _ in range(3)
        )  # growth of theta, sums of it and of gradients, in these rows
        whole = len(rows) - len(rows) % BLOCK_ROWS
        for part, height in ((slice(0, whole), BLOCK_ROWS), (slice(whole, len(rows)), len(rows) - whole)):
            if part.start == part.stop:
                continue
            blocks, targets, met = (x[part].reshape(-1, height, x.shape[1]) for x in (z, apart, residuals))
            size = sizes[part].reshape(-1, height, 1)
            gram = blocks @ blocks.transpose(0, 2, 1)
            if self.promised is not None:
                square = np.diagonal(gram, axis1=1, axis2=2)[:, :, None]
                size = np.minimum(size, np.divide(1.0, square, out=np.full_like(square, np.inf), where=square > 0))
            gram *= size.transpose(0, 2, 1)  # of which the lower triangle counts
            weight = None if w is None else w[part].reshape(-1, height, 1)
            later = np.arange(height, 0, -1.0)[:, None]  # how many of a block's iterates a row's step is in
            moves = np.empty((height, 3 * k))
            for i, block in enumerate(blocks):
                # dtrsm wants Fortran's order: the transpose is an upper triangle there
                found = met[i] = dtrsm(1.0, gram[i].T, targets[i] - block @ theta, lower=0, trans_a=1, diag=1)
                np.multiply(size[i], found, out=moves[:, :k])
                np.multiply(later, moves[:, :k], out=moves[:, k : 2 * k])
                np.multiply(-2.0 if weight is None else -2 * weight[i], found, out=moves[:, 2 * k :])
                sums = block.T @ moves
                iterates += height * theta + sums[:, k : 2 * k]
                theta += sums[:, :k]
                slopes += sums[:, 2 * k :]
        if transform is not None:
            theta, iterates = transform @ theta, transform @ iterates
        if self.average:
            average = average.of(b + iterates / len(rows), len(rows))
        return Iterate(b + theta, transform, here.memory, average, gradients + slopes, step + len(rows)), residuals

    def _reduced_rows(self, a: Array, w: Array | None, transform: Array | None) -> tuple[Array, Array | None]:
        """Return AT, and T, shortened where a row alone curves the cost more than the sample promised of all."""
        if transform is None:
            return np.ascontiguousarray(a), None
        z = a @ transform
        if self.promised is None:
            return z, transform
        squares = np.einsum("ij,ij->i", z, z) * (1.0 if w is None else w[:, 0])
        surprising = np.flatnonzero((squares > SURPRISE * self.promised) & (squares < np.inf))
        for i in surprising:
            row = a[i] @ transform
            proven = float(row @ row) * (1.0 if w is None else float(w[i, 0]))
            if proven > SURPRISE * self.promised:
                transform = shortened(transform, row / np.sqrt(row @ row), self.promised / proven)
        return (a @ transform if len(surprising) else z), transform


def shortened(transform: Array, direction: Array, share: float) -> Array:
    r"""Return T (I - (1 - sqrt(share)) v v'): along the direction v, curvature is `share` of what it was.

    Examples
    --------
    >>> shortened(np.eye(2), np.array([1.0, 0.0]), 0.25)
    array([[0.5, 0. ],
           [0. , 1. ]])
    """
    return transform - np.outer(transform @ direction, (1 - np.sqrt(share)) * direction)
