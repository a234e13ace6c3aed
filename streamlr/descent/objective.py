"""The cost of a batch of prepared rows: its gradient, and its curvature along a direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import Block
from streamlr.descent.scaling import Coordinates, Prepared

Array = NDArray[np.float64]
TALL, LARGE = 16, 8192  # rows and numbers of a batch from which on changing coefficients and sums costs less than changing rows


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

    def preparation(self) -> Callable[[Block], Prepared]:
        """Return what prepares rows for batches of this size where they lie: in these coordinates, or with features as they are."""
        large = self.batch_rows >= TALL and self.batch_rows * self.coordinates.n_features >= LARGE
        return partial(self.coordinates.prepare, units=self.coordinates.units if large else None)

    def gradient(self, rows: Prepared, b: Array) -> tuple[Array, Array]:
        r"""Return the gradient (d, k), and the residuals y - a'b (m', k) met on the way.

        .. math:: \nabla J_B = \frac2m A'W(Ab - y) + 2 \lambda D^{-2} b

        Parameters
        ----------
        rows : Prepared
            m' rows; m, or fewer in a last batch.
        b : (d, k) float64
            Coefficients.
        """
        residuals = rows.times(b)
        np.subtract(rows.y, residuals, out=residuals)
        gradient = rows.transposed_times(residuals if rows.w is None else rows.w * residuals)
        gradient *= -2 / self.batch_rows
        if self.ridge:
            gradient += self._penalty(len(rows), b)
        return gradient, residuals

    def curvature(self, rows: Prepared, direction: Array) -> Array:
        r"""Return, for each target, the curvature (k,) of the batch along a direction.

        .. math:: \kappa = v' \nabla^2 J_B v

        Parameters
        ----------
        rows : Prepared
            A batch.
        direction : (d, k) float64
            v.
        """
        kappa = column_squares(rows.times(direction), rows.w) * (2 / self.batch_rows)
        if self.ridge:
            kappa += np.einsum("ij,ij->j", direction, self._penalty(len(rows), direction))
        return kappa

    def _penalty(self, n_rows: int, b: Array) -> Array:
        return self.coordinates.penalty(b, self.ridge) * (n_rows / self.batch_rows)


def column_squares(values: Array, weights: Array | None = None) -> Array:
    """Return the sum of squares (k,) of each column of values (m, k), of weights (m, 1) or None."""
    weighted = values if weights is None else weights * values
    if values.shape[1] == 1:  # a product: `einsum` takes three times as long to begin
        of_one: Array = values.T.dot(weighted)[0]
        return of_one
    return np.asarray(np.einsum("ij,ij->j", values, weighted))
