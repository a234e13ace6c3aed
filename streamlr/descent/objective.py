"""The cost of a batch of prepared rows: its gradient, and its curvature along a direction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamlr.descent.scaling import Coordinates

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Objective:
    r"""The penalised cost of a batch B, in squared units of the targets' scale.

    .. math:: J_B(b) = \frac1m \sum_{i \in B} w_i (y_i - a_i'b)^2 + \lambda |b_{user}|^2

    The sum is divided by the nominal size m of a batch and w measured in its mean, so that every row counts alike, also those of a
    last batch that is shorter.

    Attributes
    ----------
    coordinates : Coordinates
        What rows were prepared with.
    batch_rows : int
        m.
    ridge : float
        lambda, on the coefficients in the user's units.
    """

    coordinates: Coordinates
    batch_rows: int
    ridge: float

    def gradient(self, rows: Array, measure: Array) -> tuple[Array, Array]:
        r"""Return the gradient (d, k), and the residuals y - a'b (m', k) met on the way.

        .. math:: \nabla J_B = \frac2m A'W(Ab - y) + 2 \lambda D^{-2} b

        Parameters
        ----------
        rows : (m', width) float64
            Prepared rows; m' is m, or fewer in a last batch.
        measure : (width, k) float64
            What `Coordinates.measure` makes of the coefficients b.
        """
        d, w = self.coordinates.n_trained, self._weights(rows)
        if measure.shape[1] == 1:  # whole rows are neighbours in memory, which is twice as fast
            residuals = rows.dot(measure)
        else:  # but a target that is infinite must not reach another
            a, y, _ = self.coordinates.parts(rows)
            residuals = y + a @ measure[:d]
        gradient = rows.T.dot(residuals if w is None else w * residuals)[:d]
        gradient *= -2 / self.batch_rows
        if self.ridge:
            gradient -= self._penalty(len(rows), measure[:d])
        return gradient, residuals

    def curvature(self, rows: Array, direction: Array) -> Array:
        r"""Return, for each target, the curvature (k,) of the batch along a direction.

        .. math:: \kappa = v' \nabla^2 J_B v

        Parameters
        ----------
        rows : (m', width) float64
            Prepared rows.
        direction : (d, k) float64
            v.
        """
        if direction.shape[1] == 1:  # as for residuals: a target that is infinite spoils those too
            whole = np.zeros((rows.shape[1], 1))
            whole[: len(direction)] = direction
            ahead = rows.dot(whole)
        else:
            ahead = rows[:, : len(direction)] @ direction
        kappa = column_squares(ahead, self._weights(rows)) * (2 / self.batch_rows)
        if self.ridge:
            kappa += np.einsum("ij,ij->j", direction, self._penalty(len(rows), direction))
        return kappa

    def _weights(self, rows: Array) -> Array | None:
        return rows[:, -1:] if self.coordinates.weighted else None

    def _penalty(self, n_rows: int, b: Array) -> Array:
        return self.coordinates.penalty(b, self.ridge) * (n_rows / self.batch_rows)


def column_squares(values: Array, weights: Array | None = None) -> Array:
    """Return the sum of squares (k,) of each column of values (m, k), of weights (m, 1) or None."""
    weighted = values if weights is None else weights * values
    if values.shape[1] == 1:  # a product: `einsum` takes three times as long to begin
        of_one: Array = values.T.dot(weighted)[0]
        return of_one
    return np.asarray(np.einsum("ij,ij->j", values, weighted))
