"""What the steps of an epoch meet: residuals before the steps they led to, and so the cost on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamlr.aggregates.cost import Cost, make_cost
from streamlr.aggregates.spread import Spread
from streamlr.descent.objective import column_squares
from streamlr.descent.scaling import Coordinates

Array = NDArray[np.float64]


class Seen(NamedTuple):
    """What the steps of the running epoch met, in units of the targets' scale and of the mean weight.

    Attributes
    ----------
    rows, steps : int
        Rows and steps of this epoch.
    weight : float
        Sum of the weights.
    centre : (k,) float64
        Mean of the first targets: squares of distances from it are not lost in those of a mean far from zero.
    sums : (4, k) float64
        Weighted sums: of sizes and squares of the residuals, of the targets' distances from the centre and of their squares.
    """

    rows: int
    steps: int
    weight: float
    centre: Array
    sums: Array

    @classmethod
    def nothing(cls, n_targets: int) -> Seen:
        """Return what is met before the first step."""
        return cls(0, 0, 0.0, np.zeros(n_targets), np.zeros((4, n_targets)))

    def of(self, residuals: Array, targets: Array, weights: Array | None, steps: int) -> Seen:
        """Return what was met with the residuals and targets (m, k) of some more rows, of weights (m, 1) or None."""
        w = np.ones(len(targets)) if weights is None else weights[:, 0]
        total = float(w.sum())
        centre = self.centre if self.weight or not total else w.dot(targets) / total  # rows of no weight have no say
        away = targets - centre
        sums = [w.dot(np.abs(residuals)), column_squares(residuals, weights), w.dot(away), column_squares(away, weights)]
        return Seen(self.rows + len(targets), self.steps + steps, self.weight + total, centre, self.sums + sums)

    def joined(self, other: Seen) -> Seen:
        """Return what was met here and elsewhere."""
        if not (self.weight and other.weight):
            kept, rest = (self, other) if self.weight else (other, self)
            return kept._replace(rows=kept.rows + rest.rows, steps=kept.steps + rest.steps)
        sizes, squares, away, spread = other.sums
        shift = other.centre - self.centre
        moved = np.array([sizes, squares, away + other.weight * shift, spread + shift * (2 * away + other.weight * shift)])
        weight = self.weight + other.weight
        return Seen(self.rows + other.rows, self.steps + other.steps, weight, self.centre, self.sums + moved)

    @property
    def squares(self) -> tuple[float, float]:
        """Sums of squares of the residuals, and of what they were at the start."""
        _, squares, away, spread = self.sums
        with np.errstate(all="ignore"):
            return float(squares.sum()), float((spread + self.centre * (2 * away + self.centre * self.weight)).sum())

    def cost(self, coordinates: Coordinates) -> Cost:
        """Return the cost that was met, in the user's units."""
        sizes, squares, away, spread = self.sums
        scale, exponent = np.frexp(coordinates.target_scale)
        with np.errstate(all="ignore"):  # without weight, there is an error for it
            mean = np.ldexp(coordinates.target_mean, -exponent) + (self.centre + away / self.weight) * scale
            around = np.maximum(spread - away * (away / self.weight), 0.0) * scale**2
            targets = Spread(self.rows, self.weight, mean, np.zeros_like(mean), around, exponent.astype(np.int32))
            cost = make_cost(squares * scale**2, sizes * coordinates.target_scale, targets)
        return replace(cost, weight_sum=self.weight * coordinates.mean_weight)
