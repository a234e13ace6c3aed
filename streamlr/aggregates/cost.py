"""The cost: mean squared error, the one place that defines it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlr.aggregates.centred import CONSTANT
from streamlr.aggregates.moments import Moments, MomentsOf
from streamlr.dataset.blocks import Block
from streamlr.errors import NoRows

Number = float | NDArray[np.float64]
PIECE_ROWS = 8192  # whose predictions are made at once: columns of so many numbers stay in a core's cache
BUFFER = 4096  # NumPy's iterator cuts longer rows where its buffer of 8,192 numbers ends, which depends on the rows before


@dataclass(frozen=True, slots=True, eq=False)
class Cost:
    r"""How good coefficients are on some rows.

    .. math:: J(b) = \frac1W \sum w_i (y_i - b_0 - x_i'b)^2, \quad R^2 = 1 - J / \frac1W \sum w_i (y_i - \bar y)^2

    Attributes
    ----------
    mse : float or (k,) float64
        J, in squared units of the target; one per target where there are several. Infinite where that is beyond float64.
    r2 : float or (k,) float64
        Share of the variance about the weighted mean that is explained, with an intercept or without. For a constant target it is 1
        when every row is met, to rounding, else 0, as in scikit-learn.
    n : int
        Rows.
    mae : float, (k,) float64 or None
        Weighted mean of absolute residuals; None when no pass saw the residuals.
    weight_sum : float
        W.
    n_dropped : int
        Rows that were left out because a value was missing.
    chunks_missing : int
        Absent chunks that were read as fill values because the caller allowed it.
    """

    mse: Number
    r2: Number
    n: int
    mae: Number | None
    weight_sum: float
    n_dropped: int = 0
    chunks_missing: int = 0

    @property
    def rmse(self) -> Number:
        """Square root of the mean squared error, in units of the target."""
        root = np.sqrt(self.mse)
        return float(root) if np.ndim(root) == 0 else np.asarray(root)

    def to_dict(self) -> dict[str, Any]:
        """Return the cost as JSON values."""
        facts = {"mse": self.mse, "rmse": self.rmse, "r2": self.r2, "mae": self.mae}
        counts = {"n": self.n, "weight_sum": self.weight_sum, "n_dropped": self.n_dropped, "chunks_missing": self.chunks_missing}
        return {**counts, **{name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in facts.items()}}

    @classmethod
    def of_dict(cls, facts: Mapping[str, Any]) -> Cost:
        """Return the cost that `to_dict` described, read back from JSON, in which what is not finite is null."""
        values = {name: number_or_array(facts[name], absent) for name, absent in (("mse", np.inf), ("r2", -np.inf), ("mae", None))}
        counts = {name: facts[name] for name in ("n", "weight_sum", "n_dropped", "chunks_missing")}
        return cls(**values, **counts)

    def __str__(self) -> str:
        facts = {"mse": self.mse, "rmse": self.rmse, "mae": self.mae, "r2": self.r2}
        shown = "  ".join(f"{name} {_shown(value)}" for name, value in facts.items() if value is not None)
        dropped = f", {self.n_dropped:,} rows with missing values left out" if self.n_dropped else ""
        absent = f", {self.chunks_missing:,} absent chunks read as fill values" if self.chunks_missing else ""
        return f"{shown}  (n = {self.n:,}{dropped}{absent})"


@dataclass(frozen=True, slots=True, eq=False)
class Residuals:
    """Sums over rows from which a `Cost` follows; a commutative monoid.

    Attributes
    ----------
    magnitudes : (k,) float64
        sum w_i |r_i| of the residuals r_i = y_i - b0 - x_i'b.
    moments : Moments
        Of [r y], for the squares of both, whose range float64 may not hold.
    """

    magnitudes: NDArray[np.float64]
    moments: Moments

    def __add__(self, other: Residuals) -> Residuals:
        return Residuals(self.magnitudes + other.magnitudes, self.moments + other.moments)

    def absorb(self, other: Residuals) -> Residuals:
        """Return the sum in the memory of these moments: use these sums no more."""
        return Residuals(self.magnitudes + other.magnitudes, self.moments.absorb(other.moments))

    def cost(self) -> Cost:
        """Return the cost that these sums amount to."""
        moments, k = self.moments, self.moments.n_targets
        squares = np.diagonal(moments.scatter)[:k] + moments.weight_sum * moments.mean[:k] ** 2
        with np.errstate(over="ignore"):
            squares = np.ldexp(squares, 2 * (moments.units[:k] - moments.units[k:]))
        return make_cost(squares, self.magnitudes, moments)


@dataclass(frozen=True, slots=True, eq=False)
class ResidualsOf:
    """The statistic whose values are the `Residuals` of given coefficients.

    Attributes
    ----------
    coef : (p, k) float64
        Coefficients.
    intercept : (k,) float64
        Intercepts.
    target_names : tuple of str
        Names of the k targets.
    """

    coef: NDArray[np.float64]
    intercept: NDArray[np.float64]
    target_names: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one value."""
        return self._columns.nbytes + 8 * len(self.target_names)

    def empty(self) -> Residuals:
        """Return the sums over no rows."""
        return Residuals(np.zeros(len(self.target_names)), self._columns.empty())

    def of(self, block: Block) -> Residuals:
        """Return the sums over the rows of `block`."""
        if not self.coef.all():  # there may be a BLAS that skips what is multiplied by zero
            block.confirm()
        m, k = block.y.shape
        residuals, magnitudes = block.workspace(k * m).reshape(k, m), np.zeros(k)
        # a product is free to round rows by their neighbours, but a tile's rows always have the same: `predictions` is slower
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found in the sums
            for first in range(0, m, PIECE_ROWS):
                here = slice(first, first + PIECE_ROWS)
                columns = np.subtract(block.y[here].T, self.intercept[:, None], out=residuals[:, here])
                columns -= self.coef.T.dot(block.x[here].T)
                magnitudes += _magnitudes(columns, None if block.weights is None else block.weights[here])
        room = None if block.room is None else block.room.another
        rows = Block(block.start, block.stop, residuals.T, block.y, block.weights, room, block.doubt)
        return Residuals(magnitudes, self._columns.of(rows))

    @property
    def _columns(self) -> MomentsOf:
        return MomentsOf(self.target_names, self.target_names)


def residual_sums(rows: Block, target_names: tuple[str, ...]) -> Residuals:
    """Return the sums over rows that have residuals (m, k) in the place of features."""
    with np.errstate(over="ignore", invalid="ignore"):
        magnitudes = _magnitudes(rows.x.T, rows.weights)
    return Residuals(magnitudes, MomentsOf(target_names, target_names).of(rows))


def _magnitudes(residuals: NDArray[np.float64], weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Return the weighted sums of absolute residuals (k, m)."""
    sizes = np.abs(residuals)
    sums: NDArray[np.float64] = sizes.sum(axis=1) if weights is None else sizes.dot(weights)
    return sums


def predictions(x: NDArray[np.float64], coef: NDArray[np.float64], intercept: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return b0 + x b, row by row, so that a row's prediction does not depend on the rows beside it.

    A matrix product is free to take other paths for other heights and so to round differently. `einsum` walks along each row as
    long as a row's numbers are neighbours in memory and fit into its buffer.

    Parameters
    ----------
    x : (m, p) float64
        Features.
    coef : (p, k) float64
        Coefficients.
    intercept : (k,) float64
        Intercepts.

    Returns
    -------
    (m, k) float64

    Examples
    --------
    >>> predictions(np.array([[1.0, 2.0]]), np.array([[10.0], [1.0]]), np.array([0.5]))
    array([[12.5]])
    """
    if x.strides[1] != x.itemsize:
        x = np.ascontiguousarray(x)
    out = np.zeros((len(x), coef.shape[1]))
    for j in range(coef.shape[1]):
        of_target = np.ascontiguousarray(coef[:, j])
        for at in range(0, len(coef), BUFFER):
            out[:, j] += np.einsum("ij,j->i", x[:, at : at + BUFFER], of_target[at : at + BUFFER])
    out += intercept
    return out


def cost_of_moments(moments: Moments, coef: NDArray[np.float64], intercept: NDArray[np.float64]) -> Cost:
    """Return the cost of any coefficients, (p, k), and intercepts, (k,), from moments of the rows: no row is read.

    Residuals that are too small to be told from the rounding of the moments give a bound; see `Moments.cost_sums`.
    """
    return make_cost(moments.cost_sums(coef, intercept)[0], None, moments)


def make_cost(squares: NDArray[np.float64], magnitudes: NDArray[np.float64] | None, moments: Moments) -> Cost:
    """Return the cost from residual sums and the moments of the targets.

    `squares` are in units of 4**exponent of each target, `magnitudes` in the target's.

    Raises
    ------
    NoRows
        No row has a weight above zero.
    """
    total = moments.weight_sum
    if total == 0:
        raise NoRows("no row with a weight above zero is left; check the weights, missing= and the split")
    p = moments.n_features
    spread, constant = np.diagonal(moments.scatter)[p:], moments.constant[p:]
    met = squares <= total * (CONSTANT * moments.mean[p:]) ** 2
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        r2 = np.where(constant, np.where(met, 1.0, 0.0), 1 - squares / spread)
        mse = np.ldexp(squares / total, 2 * moments.units[p:])
    mae = None if magnitudes is None else _scalar(magnitudes / total)
    return Cost(_scalar(mse), _scalar(r2), moments.n, mae, total)


def number_or_array(value: Any, absent: float | None = None) -> Any:
    """Return a number, or an array of a list of numbers, read from JSON, with `absent` in the place of null."""
    if not isinstance(value, list):
        return absent if value is None else float(value)
    array = np.array(value, dtype=np.float64)
    return array if absent is None else np.where(np.isnan(array), absent, array)


def _scalar(values: NDArray[np.float64]) -> Number:
    return float(values[0]) if len(values) == 1 else values


def _shown(value: Number) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "[" + ", ".join(f"{number:.6g}" for number in np.atleast_1d(value)) + "]"
