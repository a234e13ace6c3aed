"""Moments: n, W, mean and scatter of [X y], centred and unnormalised; enough for the exact fit and the cost of any coefficients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from streamlr.aggregates.centred import EPS, STRIP, centred_product
from streamlr.aggregates.spread import NO_SCALE, SQUARES, Spread, exponents_of, meeting, overflowing, shift_between, units_of
from streamlr.dataset.blocks import Block
from streamlr.errors import UsageError

ROUNDINGS = 8  # eps, of a difference of sums, beside the sum of their sizes


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    r"""Weighted moments of rows z = [x y], a commutative monoid.

    .. math:: W = \sum w_i, \quad \bar z = \frac1W \sum w_i z_i, \quad S = \sum w_i (z_i - \bar z)(z_i - \bar z)'

    Two sets of rows are merged by the rule of Chan, Golub and LeVeque (1983, equation 2.1), in matrix form. It needs the distance
    of two means, which are far from zero and close together in a column such as a time in seconds: the mean is therefore kept to
    about twice the digits of float64, as a sum of two numbers.

    Attributes
    ----------
    n : int
        Rows.
    n_weighted : int
        Rows with a weight above zero: those that count in the degrees of freedom.
    weight_sum : float
        W.
    mean : (p + k,) float64
        Mean of each column, in units of 2**exponent.
    mean_rest : (p + k,) float64
        What the rounding of `mean` left out, in the same units.
    scatter : (p + k, p + k) float64
        S, in units of 2**(exponent_i + exponent_j).
    exponent : (p + k,) int32
        Power of two that each column is measured in: 0 unless its squares could leave 1e-150 to 1e150.
    feature_names, target_names : tuple of str
        Names of the p features and k targets.
    n_dropped : int
        Rows that were left out because a value was missing.
    precision : "double" or "single"
        In which the products of rows were made.

    Examples
    --------
    >>> import numpy as np
    >>> block = Block(0, 3, np.array([[1.0], [2.0], [3.0]]), np.array([[2.0], [4.0], [6.0]]))
    >>> m = MomentsOf(("x",), ("y",)).of(block)
    >>> m.n, m.mean.tolist(), m.scatter.tolist()
    (3, [2.0, 4.0], [[2.0, 4.0], [4.0, 8.0]])

    References
    ----------
    Chan, Golub and LeVeque (1983), Algorithms for computing the sample variance, The American Statistician 37(3).
    """

    n: int
    n_weighted: int
    weight_sum: float
    mean: NDArray[np.float64]
    mean_rest: NDArray[np.float64]
    scatter: NDArray[np.float64]
    exponent: NDArray[np.int32]
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]
    n_dropped: int = 0
    precision: str = "double"

    @property
    def n_features(self) -> int:
        """Number of features, p."""
        return len(self.feature_names)

    @property
    def n_targets(self) -> int:
        """Number of targets, k."""
        return len(self.target_names)

    @property
    def units(self) -> NDArray[np.int32]:
        """Exponents to compute with: 0 for a column that has shown nothing but zeros."""
        return units_of(self.exponent)

    @property
    def constant(self) -> NDArray[np.bool_]:
        """Which columns, (p + k,), do not vary beyond the rounding of their mean."""
        return self.spread.constant

    @property
    def spread(self) -> Spread:
        """How far each column, features first, lies from its mean."""
        squares = np.diagonal(self.scatter)
        return Spread(self.n, self.weight_sum, self.mean, self.mean_rest, squares, self.exponent)

    @property
    def spread_of_targets(self) -> Spread:
        """How far each target lies from its mean."""
        return self.spread.columns(self.n_features, len(self.mean))

    def __add__(self, other: Moments) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        return self._merged(other, np.empty_like(self.scatter))

    def absorb(self, other: Moments) -> Moments:
        """Return the sum, with the same bits, in the memory of this scatter unless there are no rows: use these no more."""
        return self._merged(other, self.scatter)

    def _merged(self, other: Moments, merged: NDArray[np.float64]) -> Moments:
        """Return the sum, with its scatter in `merged`, which may be this one's."""
        if (self.feature_names, self.target_names) != (other.feature_names, other.target_names):
            raise UsageError(
                f"moments of different columns cannot be added: {self.feature_names + self.target_names} "
                f"and {other.feature_names + other.target_names}"
            )
        n_dropped = self.n_dropped + other.n_dropped
        precision = "single" if "single" in (self.precision, other.precision) else "double"
        if self.n == 0 or other.n == 0:
            return replace((other if self.n == 0 else self).copy(), n_dropped=n_dropped, precision=precision)
        both = meeting(self.spread, other.spread)
        mine, others = (_shifted(side.scatter, shift_between(side.exponent, both.exponent)) for side in (self, other))
        with np.errstate(over="ignore"):
            for first in range(0, len(merged), STRIP):
                rows = slice(first, first + STRIP)
                np.add(mine[rows], others[rows], out=merged[rows])
                merged[rows] += both.step[rows, None] * both.step
        both.check(np.diagonal(merged))
        n, n_weighted = self.n + other.n, self.n_weighted + other.n_weighted
        names = self.feature_names, self.target_names
        at = both.weight_sum, both.mean, both.mean_rest
        return Moments(n, n_weighted, *at, merged, both.exponent, *names, n_dropped, precision)

    def cost_sums(self, coef: NDArray[np.float64], intercept: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        r"""Return the residual sum of squares of any coefficients, without reading rows.

        .. math:: \sum w_i (y_i - b_0 - x_i'b)^2 = v'Sv + W (\bar z'v - b_0)^2, \quad v = (-b, 1)

        Parameters
        ----------
        coef : (p, k) float64
            Coefficients, in the units of the columns.
        intercept : (k,) float64
            Intercepts.

        Returns
        -------
        (k,) float64
            In units of 4**exponent of each target, since the squares of a column such as 1e200 are beyond float64.
        (k,) bool
            Where the residuals are too small to be told from the rounding of S, and the sum is what that rounding may amount to: a
            bound, and never negative.
        """
        p, unit = self.n_features, self.units
        v = np.zeros((len(self.mean), self.n_targets))  # column j in units of target j
        v[:p] = -np.ldexp(coef, unit[:p, None] - unit[p:])
        np.fill_diagonal(v[p:], 1.0)
        offset = self.mean @ v - np.ldexp(intercept, -unit[p:])
        within = np.einsum("ij,ij->j", v, self.scatter @ v)
        size = np.abs(v)
        floor = ROUNDINGS * EPS[self.precision] * np.einsum("ij,ij->j", size, np.abs(self.scatter) @ size)
        squares: NDArray[np.float64] = np.maximum(within, floor) + self.weight_sum * offset**2
        return squares, within <= floor

    def copy(self) -> Moments:
        """Return moments that share no memory with these."""
        arrays = {name: getattr(self, name).copy() for name in ("mean", "mean_rest", "scatter", "exponent")}
        return replace(self, **arrays)


@dataclass(frozen=True, slots=True)
class MomentsOf:
    """The statistic whose values are `Moments` of the named columns."""

    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]
    precision: str = "double"

    @property
    def width(self) -> int:
        """Number of columns, p + k."""
        return len(self.feature_names) + len(self.target_names)

    @property
    def nbytes(self) -> int:
        """Bytes of one value."""
        return 8 * self.width * (self.width + 3)

    @property
    def row_bytes(self) -> int:
        """Rows are centred, and no more."""
        return 0

    @property
    def as_stored(self) -> bool:
        """Features come as float64."""
        return False

    def empty(self) -> Moments:
        """Return the moments of no rows."""
        q = self.width
        exponent = np.full(q, NO_SCALE, dtype=np.int32)
        names = self.feature_names, self.target_names
        return Moments(0, 0, 0.0, np.zeros(q), np.zeros(q), np.zeros((q, q)), exponent, *names, precision=self.precision)

    def of(self, block: Block) -> Moments:
        """Return the moments of the rows of `block`."""
        n, weights = len(block.x), block.weights
        n_weighted = n if weights is None else int(np.count_nonzero(weights != 0))  # of booleans it counts faster
        if n_weighted == 0:
            block.confirm()
            return replace(self.empty(), n=n)
        exponent = np.zeros(self.width, dtype=np.int32)
        small, large = SQUARES[self.precision]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            total = float(n) if weights is None else float(weights.sum())
            mean, rest, scatter = centred_product(block, total, self.precision)
            squares = np.diagonal(scatter)
            unusual = ~((squares > small) & (squares < large) & (mean * mean < large))
            if unusual.any():
                exponent[unusual] = exponents_of(_largest(block, np.flatnonzero(unusual)), self.precision)
                unit = units_of(exponent)
                if unit.any():
                    p = len(self.feature_names)
                    del scatter, squares  # their memory is planned for once
                    x, y = np.ldexp(block.x, -unit[:p]), np.ldexp(block.y, -unit[p:])
                    mean, rest, scatter = centred_product(Block(block.start, block.stop, x, y, weights), total, self.precision)
        if not np.isfinite(np.diagonal(scatter)).all():
            raise overflowing(block)
        names = self.feature_names, self.target_names
        return Moments(n, n_weighted, total, mean, rest, scatter, exponent, *names, precision=self.precision)


def _largest(block: Block, columns: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the largest magnitude in each of some columns."""
    p = block.x.shape[1]
    return np.array([np.abs(block.x[:, j] if j < p else block.y[:, j - p]).max() for j in columns])


def _shifted(scatter: NDArray[np.float64], shift: NDArray[np.int32] | None) -> NDArray[np.float64]:
    """Return a scatter in other units, itself where they are its own."""
    return scatter if shift is None else np.ldexp(scatter, shift[:, None] + shift)
