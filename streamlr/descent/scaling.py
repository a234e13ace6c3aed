"""The coordinates of prepared rows: columns centred and in units of their own; and the way back to the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import fsum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamlr.aggregates.centred import CONSTANT
from streamlr.dataset.blocks import Block
from streamlr.dataset.buffers import Buffer
from streamlr.errors import NumericalError

Array = NDArray[np.float64]
SMALLEST = float(np.finfo(np.float64).tiny)
LONG = 4096  # numbers: where NumPy walks along fewer at a time, it is slow
NEAR = 0.7  # of its scale: a mean no further from zero costs what is centred in sums, not in rows, one bit of that scale at most
MODERATE = 1e-100, 1e100  # scales with which products of columns as they are stay in the range of float64


class Units(NamedTuple):
    """How features that are left as they are differ from prepared ones, which are (z - mean) * share.

    Attributes
    ----------
    mean : (p,) float64
        Of each.
    share : (p, 1) float64
        One part in its scale.
    """

    mean: Array
    share: Array


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Rows in the coordinates of a descent, if only by their units; the column of ones of their design A is in its products alone.

    Attributes
    ----------
    z : (m, p) float64
        Features; as they are, where there are `units`.
    y : (m, k) float64
        Targets.
    w : (m, 1) float64 or None
        Weights.
    intercept : bool
        Whether A is [z 1], of d columns, or z.
    units : Units or None
        What coefficients and sums are changed by where features are not.
    doubt : callable or None
        As that of a `Block`: raises if what they were made of is NaN or infinite, where nobody has looked yet.
    """

    z: Array
    y: Array
    w: Array | None
    intercept: bool
    units: Units | None = None
    doubt: Callable[[], object] | None = None

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, part: slice) -> Prepared:
        w = None if self.w is None else self.w[part]
        return Prepared(self.z[part], self.y[part], w, self.intercept, self.units, self.doubt)

    @property
    def design(self) -> Array:
        """A, (m, d), in memory of its own where it is not z."""
        z = self.z if self.units is None else (self.z - self.units.mean) * self.units.share[:, 0]
        if not self.intercept:
            return z
        return np.concatenate((z, np.ones((len(z), 1))), axis=1, out=Buffer().array((len(z), z.shape[1] + 1)))

    def times(self, b: Array, out: Array | None = None) -> Array:
        """Return A b, (m, k), of coefficients (d, k), in `out` if that is given."""
        p, units = self.z.shape[1], self.units
        of_z = b[:p] if units is None else units.share * b[:p]
        product: Array = self.z.dot(of_z, out=out)
        if self.intercept:
            product += b[p] if units is None else b[p] - units.mean.dot(of_z)
        return product

    def transposed_times(self, r: Array) -> Array:
        """Return A' r, (d, k), of residuals (m, k)."""
        product: Array = self.z.T.dot(r)
        if self.units is None and not self.intercept:
            return product
        # a product: `sum` of a few columns takes several times as long
        sums = r.sum(axis=0, keepdims=True) if r.shape[1] == 1 else np.ones(len(r)).dot(r)[None]
        if self.units is not None:
            product -= self.units.mean[:, None] * sums
            product *= self.units.share
        return np.concatenate((product, sums)) if self.intercept else product


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
    name : "standard" or "none"
        What they are called in the history.
    """

    mean: Array
    scale: Array
    target_mean: Array
    target_scale: Array
    intercept: bool
    mean_weight: float
    name: str = "standard"

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
    def units(self) -> Units | None:
        """How features differ from prepared ones, where sums can make up for that at the cost of one bit at most; else None."""
        least, most = MODERATE
        near = (np.abs(self.mean) <= NEAR * self.scale) & (least < self.scale) & (self.scale < most)
        return Units(self.mean, 1 / self.scale[:, None]) if near.all() else None

    def prepare(self, rows: Block, units: Units | None = None) -> Prepared:
        """Return rows in these coordinates where they lie, in C order: their memory is written to, so it must be the caller's.

        Features stay as they are where their `units` are given.
        """
        return self._prepared(rows, rows, units)

    def prepared(self, rows: Block) -> Prepared:
        """Return rows in these coordinates, in memory of their own."""
        weights = None if rows.weights is None else np.empty_like(rows.weights)
        return self._prepared(rows, Block(rows.start, rows.stop, np.empty(rows.x.shape), np.empty(rows.y.shape), weights))

    def _prepared(self, rows: Block, out: Block, units: Units | None = None) -> Prepared:
        w = None
        with np.errstate(all="ignore"):  # what leaves the range of float64 shows in what is made of it
            if units is None:
                _standardise(rows.x, self.mean, self.scale, out.x)
            _standardise(rows.y, self.target_mean, self.target_scale, out.y)
            if rows.weights is not None and out.weights is not None:
                w = np.multiply(rows.weights, 1 / self.mean_weight, out=out.weights)[:, None]
        return Prepared(out.x, out.y, w, self.intercept, units, rows.doubt)

    def start(self) -> Array:
        """Return coefficients (d, k) of zero: each target's mean for every row, where there is an intercept."""
        return np.zeros((self.n_trained, self.n_targets))

    def to_user(self, b: Array) -> tuple[Array, Array]:
        """Return coefficients (p, k) and intercepts (k,) in the user's units.

        Raises
        ------
        NumericalError
            A coefficient is beyond the range of float64 there.
        """
        p = self.n_features
        with np.errstate(over="ignore", invalid="ignore"):
            coef = b[:p] / self.scale[:, None] * self.target_scale
            intercept = np.zeros(self.n_targets)
            if self.intercept:
                for j in range(self.n_targets):
                    parts = [self.target_mean[j], b[p, j] * self.target_scale[j], *(-self.mean * coef[:, j])]
                    intercept[j] = _total(parts)
        if not (np.isfinite(coef).all() and np.isfinite(intercept).all()):
            raise NumericalError(
                "a coefficient is beyond the range of float64; measure that column, or the target, in a larger unit"
            )
        return coef, intercept

    def of_user(self, coef: Array, intercept: Array) -> Array:
        """Return the coefficients (d, k) of a user's coefficients (p, k) and intercepts (k,)."""
        b = coef * self.scale[:, None] / self.target_scale
        if self.intercept:
            last = [_total([intercept[j], -self.target_mean[j], *(self.mean * coef[:, j])]) for j in range(self.n_targets)]
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
    if weights is None or not weights.any():
        share = np.full(len(columns), 1 / max(len(columns), 1))
    else:
        share = weights / weights.max()  # sums of which stay in range
        share /= share.sum()
    largest = np.maximum(columns.max(axis=0, initial=0.0), -columns.min(axis=0, initial=0.0))  # the sample is not copied
    exponent = np.where(largest > 0, np.frexp(largest)[1], 0)
    mean, spread = np.zeros(columns.shape[1]), np.zeros(columns.shape[1])
    for j in range(columns.shape[1]):  # a column at a time, for the same reason
        column = np.ldexp(columns[:, j], -exponent[j])
        centre = share @ column if intercept else 0.0
        centre += share @ (column - centre) if intercept else 0.0
        mean[j], spread[j] = centre, np.sqrt(share @ (column - centre) ** 2)
    constant = spread <= CONSTANT * np.abs(mean)
    unit = np.where(constant, np.where(mean != 0, np.abs(mean), 1.0), spread)
    with np.errstate(under="ignore"):
        mean, unit = np.ldexp(mean, exponent), np.maximum(np.ldexp(unit, exponent), SMALLEST)
    p = n_features
    return Coordinates(mean[:p], unit[:p], mean[p:], unit[p:], intercept, _mean_weight(weights))


def plain_coordinates(weights: Array | None, n_features: int, n_targets: int, *, intercept: bool) -> Coordinates:
    """Return the coordinates of the columns as they are."""
    zero, one = np.zeros(n_features), np.ones(n_features)
    zeros, ones = np.zeros(n_targets), np.ones(n_targets)
    return Coordinates(zero, one, zeros, ones, intercept, _mean_weight(weights), "none")


def _standardise(rows: Array, mean: Array, scale: Array, out: Array) -> None:
    """Write rows less their mean, in units of their scale, into `out`, in C order: as long rows, along which NumPy is quick."""
    if not rows.flags.c_contiguous:
        out[:] = rows
        rows = out
    share = 1 / scale  # a product takes a third of the time of a division
    together = 1 if len(mean) == 1 else max(LONG // max(len(mean), 1), 1)  # one column is a long row by itself
    together = min(1 << (together.bit_length() - 1), max(len(out), 1))  # of which whole pieces, powers of two, leave no rest
    whole = len(out) - len(out) % together
    for part, times in (slice(whole), together), (slice(whole, None), 1):
        if len(rows[part]):
            shape = -1, times * len(mean)
            long = out[part].reshape(shape)
            np.subtract(rows[part].reshape(shape), np.tile(mean, times), out=long)
            long *= np.tile(share, times)


def _mean_weight(weights: Array | None) -> float:
    """Return the mean of weights, by way of sums that stay in range; 1 where there is nothing to be had."""
    if weights is None or not weights.any():
        return 1.0
    largest = float(weights.max())
    return max(float((weights / largest).mean()) * largest, SMALLEST)


def _total(values: list[float]) -> float:
    """Return the sum, rounded once; infinite or NaN, and no error, where it leaves the range of float64."""
    try:
        return fsum(values)
    except (OverflowError, ValueError):
        with np.errstate(all="ignore"):
            return float(np.sum(values))
