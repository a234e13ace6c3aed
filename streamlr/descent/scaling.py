"""The coordinates of prepared rows: columns centred and in units of their own; and the way back to the user's."""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum

import numpy as np
from numpy.typing import NDArray

from streamlr.aggregates.moments import CONSTANT

Array = NDArray[np.float64]
SMALLEST = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, slots=True, eq=False)
class Coordinates:
    r"""A linear change of variables between a user's coefficients and those of prepared rows.

    .. math:: z = (x - \mu) / s, \quad \hat y = \mu_y + s_y (z, 1) b

    Attributes
    ----------
    mean, scale : (p,) float64
        mu and s, in units of the features.
    target_mean, target_scale : (k,) float64
        mu_y and s_y, in units of the targets.
    intercept : bool
        Whether the last of the d coefficients belongs to a column of ones.
    mean_weight : float
        Mean of the weights of a sample: gradients are measured in it.
    weighted : bool
        Whether rows have weights.
    """

    mean: Array
    scale: Array
    target_mean: Array
    target_scale: Array
    intercept: bool
    mean_weight: float
    weighted: bool

    @property
    def n_features(self) -> int:
        """Number of features, p."""
        return len(self.mean)

    @property
    def n_trained(self) -> int:
        """Number of coefficients for each target, d."""
        return len(self.mean) + self.intercept

    @property
    def n_targets(self) -> int:
        """Number of targets, k."""
        return len(self.target_mean)

    @property
    def width(self) -> int:
        """Numbers of a prepared row: d columns, k targets and perhaps a weight."""
        return self.n_trained + self.n_targets + self.weighted

    def prepare(self, columns: Array, weights: Array | None, out: Array) -> None:
        """Write rows [x y] (m, p + k), with their weights (m,) or None, as [z 1 y' w] into `out` (m, width)."""
        p, d, k = self.n_features, self.n_trained, self.n_targets
        np.subtract(columns[:, :p], self.mean, out=out[:, :p])
        out[:, :p] /= self.scale
        if self.intercept:
            out[:, p] = 1.0
        np.subtract(columns[:, p:], self.target_mean, out=out[:, d : d + k])
        out[:, d : d + k] /= self.target_scale
        if weights is not None:
            np.divide(weights, self.mean_weight, out=out[:, d + k])

    def parts(self, rows: Array) -> tuple[Array, Array, Array | None]:
        """Return design (m, d), targets (m, k) and weights (m, 1) or None of prepared rows: views."""
        d, k = self.n_trained, self.n_targets
        return rows[:, :d], rows[:, d : d + k], rows[:, d + k :] if self.weighted else None

    def start(self) -> Array:
        """Return coefficients (d, k) of zero: each target's mean for every row, where there is an intercept."""
        return np.zeros((self.n_trained, self.n_targets))

    def to_user(self, b: Array) -> tuple[Array, Array]:
        """Return coefficients (p, k) and intercepts (k,) in the user's units."""
        p = self.n_features
        coef = b[:p] / self.scale[:, None] * self.target_scale
        intercept = np.zeros(self.n_targets)
        if self.intercept:
            for j in range(self.n_targets):
                intercept[j] = fsum([self.target_mean[j], b[p, j] * self.target_scale[j], *(-self.mean * coef[:, j])])
        return coef, intercept

    def of_user(self, coef: Array, intercept: Array) -> Array:
        """Return the coefficients (d, k) of a user's coefficients (p, k) and intercepts (k,)."""
        b = coef * self.scale[:, None] / self.target_scale
        if self.intercept:
            last = [fsum([intercept[j], -self.target_mean[j], *(self.mean * coef[:, j])]) for j in range(self.n_targets)]
            return np.vstack([b, np.array(last) / self.target_scale])
        return b

    def penalty(self, b: Array, ridge: float) -> Array:
        """Return the gradient (d, k) of ridge times the squares of the user's coefficients, in squared units of the targets."""
        gradient = np.zeros_like(b)
        gradient[: self.n_features] = 2 * ridge * b[: self.n_features] / self.scale[:, None] / self.scale[:, None]
        return gradient


def standard_coordinates(columns: Array, weights: Array | None, n_features: int, *, intercept: bool) -> Coordinates:
    """Return coordinates that centre and scale the columns as a sample of rows has them; without an intercept, scale alone.

    A column that is constant in the sample, by the rule of `Moments.constant`, is measured in units of its size, or as it is where
    that is zero: no rounding becomes a signal, and rows that the sample did not meet still count.

    Parameters
    ----------
    columns : (m, p + k) float64
        Rows of features and targets.
    weights : (m,) float64 or None
        Their weights.
    n_features : int
        p.
    intercept : bool
        Whether an intercept is fitted.
    """
    share = np.full(len(columns), 1 / max(len(columns), 1)) if weights is None else weights / max(float(weights.sum()), SMALLEST)
    largest = np.abs(columns).max(axis=0, initial=0.0)
    exponent = np.where(largest > 0, np.frexp(largest)[1], 0)
    mean, spread = np.zeros(columns.shape[1]), np.zeros(columns.shape[1])
    for j in range(columns.shape[1]):  # a column at a time: the sample is not copied
        column = np.ldexp(columns[:, j], -exponent[j])
        centre = share @ column if intercept else 0.0
        centre += share @ (column - centre) if intercept else 0.0
        mean[j], spread[j] = centre, np.sqrt(share @ (column - centre) ** 2)
    constant = spread <= CONSTANT * np.abs(mean)
    unit = np.where(constant, np.where(mean != 0, np.abs(mean), 1.0), spread)
    with np.errstate(under="ignore"):
        mean, unit = np.ldexp(mean, exponent), np.maximum(np.ldexp(unit, exponent), SMALLEST)
    p = n_features
    mean_weight = 1.0 if weights is None or not weights.any() else float(weights.mean())
    return Coordinates(mean[:p], unit[:p], mean[p:], unit[p:], intercept, mean_weight, weights is not None)


def plain_coordinates(weights: Array | None, n_features: int, n_targets: int, *, intercept: bool) -> Coordinates:
    """Return the coordinates of the columns as they are."""
    mean_weight = 1.0 if weights is None or not weights.any() else float(weights.mean())
    zero, one = np.zeros(n_features), np.ones(n_features)
    zeros, ones = np.zeros(n_targets), np.ones(n_targets)
    return Coordinates(zero, one, zeros, ones, intercept, mean_weight, weights is not None)
