"""The cost: mean squared error, the one place that defines it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlr.aggregates.centred import CONSTANT, ROUNDS, exact_sum, far_off, some_rows
from streamlr.aggregates.moments import Moments
from streamlr.aggregates.spread import SQUARES, Exponents, Spread, exponents_of, overflowing, units_of
from streamlr.dataset.blocks import Block, tile_rows
from streamlr.errors import NoRows

Array = NDArray[np.float64]
Number = float | Array
# writes residuals of some rows, whose targets are given, beside memory to work in; all in columns (k, h)
Making = Callable[[slice, Array, Array, Array], None]
PIECE_ROWS = 8192  # at most, whose residuals are made at once
PIECE_BYTES = 2**19  # of them: with the targets, and what is made on the way, a core's cache holds them
LONG_ROW = 10  # features from which on `einsum` promotes rows faster than they are copied into float64
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
    spread : Spread
        Of [r y]: of the residuals about zero, of the targets about their mean.
    """

    magnitudes: Array
    spread: Spread

    @classmethod
    def empty(cls, n_targets: int, n: int = 0) -> Residuals:
        """Return the sums over no rows, or over `n` without weight."""
        return cls(np.zeros(n_targets), Spread.empty(2 * n_targets, n))

    def __add__(self, other: Residuals) -> Residuals:
        return Residuals(self.magnitudes + other.magnitudes, self.spread + other.spread)

    absorb = __add__  # there is hardly any memory to save

    def cost(self) -> Cost:
        """Return the cost that these sums amount to."""
        k = len(self.magnitudes)
        targets, units = self.spread.columns(k, 2 * k), self.spread.units
        with np.errstate(over="ignore"):
            squares = np.ldexp(self.spread.squares[:k], 2 * (units[:k] - units[k:]))
        return make_cost(squares, self.magnitudes, targets)


@dataclass(frozen=True, slots=True, eq=False)
class ResidualsOf:
    """The statistic whose values are the `Residuals` of given coefficients.

    Attributes
    ----------
    coef : (p, k) float64
        Coefficients.
    intercept : (k,) float64
        Intercepts.
    """

    coef: Array
    intercept: Array

    @property
    def nbytes(self) -> int:
        """Bytes of one value."""
        return 8 * 8 * len(self.intercept)

    @property
    def row_bytes(self) -> int:
        """Residuals are made piece by piece."""
        return 0

    @property
    def as_stored(self) -> bool:
        """Whether rows are promoted on the way into one target's predictions, for which the memory of a tile is too slow."""
        p, k = self.coef.shape
        return bool(k == 1 and p >= LONG_ROW)

    def empty(self) -> Residuals:
        """Return the sums over no rows."""
        return Residuals.empty(len(self.intercept))

    def of(self, block: Block) -> Residuals:
        """Return the sums over the rows of `block`."""
        if not self.coef.all():  # there may be a BLAS that skips what is multiplied by zero
            block.confirm()

        def residuals(here: slice, targets: Array, out: Array, room: Array) -> None:
            # a product may round rows by their neighbours, but those of a tile always have the same: `predictions` is slower
            x = block.x[here]
            if x.dtype == np.float64:
                self.coef.T.dot(x.T, out=out)
            else:
                np.einsum("ij,j->i", x, np.ascontiguousarray(self.coef[:, 0]), out=out[0])
            np.subtract(np.subtract(targets, self.intercept[:, None], out=room), out, out=out)

        return _sums(block, residuals)


def residual_sums(rows: Block) -> Residuals:
    """Return the sums over rows that have residuals (m, k) in the place of features."""

    def residuals(here: slice, _targets: Array, out: Array, _room: Array) -> None:
        out[:] = rows.x[here].T

    return _sums(rows, residuals)


def _sums(rows: Block, residuals: Making) -> Residuals:
    """Return the sums over rows whose residuals are made piece by piece."""
    m, k = rows.y.shape
    total = float(m) if rows.weights is None else float(rows.weights.sum())
    if total == 0:
        rows.confirm()
        return Residuals.empty(k, m)
    small, large = SQUARES["double"]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # what is not finite is found in the sums
        magnitudes, spread = _sums_in(None, rows, residuals, total)
        # most often these are few numbers, of which Python makes less ado than NumPy
        usual = [small < s < large and c * c < large for s, c in zip(spread.squares.tolist(), spread.mean.tolist(), strict=True)]
        if not all(usual):
            unusual = ~np.array(usual)
            largest = np.concatenate([np.zeros(k), np.abs(rows.y).max(axis=0)])
            if unusual[:k].any():
                as_they_are = _pieces(rows, residuals, np.zeros(k), None)
                largest[:k] = np.max([np.abs(columns[:k]).max(axis=1) for columns, _ in as_they_are], axis=0)
            exponent = spread.exponent.copy()
            exponent[unusual] = exponents_of(largest[unusual])
            unit = units_of(exponent)
            if unit.any():
                magnitudes, spread = _sums_in(unit, rows, residuals, total)
            spread = replace(spread, exponent=exponent)
            if not np.isfinite(spread.squares).all():
                raise overflowing(rows)
    return Residuals(magnitudes, spread)


def _sums_in(unit: Exponents | None, rows: Block, residuals: Making, total: float) -> tuple[Array, Spread]:
    """Return magnitudes of residuals, and the spread of [r y], in given units or as they are.

    Targets are centred near their mean, and the squares corrected, as it is done in `centred_product`.
    """
    m, k = rows.y.shape
    targets = rows.y if unit is None else np.ldexp(rows.y, -unit[k:])
    centre, (some, weights_of_some) = np.zeros(2 * k), some_rows(rows)
    centre[k:] = weights_of_some.dot(np.ascontiguousarray(targets[some])) / weights_of_some.sum()  # strides would show in bits
    for left in reversed(range(ROUNDS + 1)):
        sums, squares = np.zeros((2, 2 * k))
        for columns, weights in _pieces(rows, residuals, centre[k:], unit):
            weighted = columns if weights is None else columns * weights
            squares += [z.dot(w) for z, w in zip(columns, weighted, strict=True)]  # `einsum` adds up long columns to fewer digits
            np.abs(weighted[:k], out=weighted[:k])
            sums += weighted.sum(axis=1)
        offset = sums / total
        offset[:k] = 0.0
        if not left or not far_off(offset, centre, total, squares):
            break
        centre = centre + offset
    squares = np.maximum(squares - (offset * np.sqrt(total)) ** 2, 0.0)
    exponent = np.zeros(2 * k, dtype=np.int32) if unit is None else unit
    spread = Spread(m, total, *exact_sum(centre, offset), squares, exponent)
    return sums[:k].copy() if unit is None else np.ldexp(sums[:k], unit[:k]), spread


def _pieces(rows: Block, residuals: Making, centre: Array, unit: Exponents | None) -> Iterator[tuple[Array, Array | None]]:
    """Yield columns [r, y - centre], (2 k, h), of rows in units, and their weights, while a core's cache holds them.

    The units are powers of two, or None for rows as they are; the centre (k,) is in units already.
    """
    m, k = rows.y.shape
    height = min(PIECE_ROWS, tile_rows(k, 0, PIECE_BYTES), m)
    room = rows.workspace(2 * k * height)
    for first in range(0, m, height):
        here = slice(first, min(first + height, m))
        columns = room[: 2 * k * (here.stop - first)].reshape(2 * k, -1)
        targets = np.ascontiguousarray(rows.y[here].T)
        residuals(here, targets, columns[:k], columns[k:])
        if unit is not None:
            columns[:k], targets = np.ldexp(columns[:k], -unit[:k, None]), np.ldexp(targets, -unit[k:, None])
        np.subtract(targets, centre[:, None], out=columns[k:])
        yield columns, None if rows.weights is None else rows.weights[here]


def predictions(x: Array, coef: Array, intercept: Array) -> Array:
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


def cost_of_moments(moments: Moments, coef: Array, intercept: Array) -> Cost:
    """Return the cost of any coefficients, (p, k), and intercepts, (k,), from moments of the rows: no row is read.

    Residuals that are too small to be told from the rounding of the moments give a bound; see `Moments.cost_sums`.
    """
    return make_cost(moments.cost_sums(coef, intercept)[0], None, moments.spread_of_targets)


def make_cost(squares: Array, magnitudes: Array | None, targets: Spread) -> Cost:
    """Return the cost from residual sums and the spread of the targets about their mean.

    `squares` are in units of 4**exponent of each target, `magnitudes` in the target's.

    Raises
    ------
    NoRows
        No row has a weight above zero.
    """
    total = targets.weight_sum
    if total == 0:
        raise NoRows("no row with a weight above zero is left; check the weights, missing= and the split")
    met = squares <= total * (CONSTANT * targets.mean) ** 2
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        r2 = np.where(targets.constant, np.where(met, 1.0, 0.0), 1 - squares / targets.squares)
        mse = np.ldexp(squares / total, 2 * targets.units)
    mae = None if magnitudes is None else _scalar(magnitudes / total)
    return Cost(_scalar(mse), _scalar(r2), targets.n, mae, total)


def number_or_array(value: Any, absent: float | None = None) -> Any:
    """Return a number, or an array of a list of numbers, read from JSON, with `absent` in the place of null."""
    if not isinstance(value, list):
        return absent if value is None else float(value)
    array = np.array(value, dtype=np.float64)
    return array if absent is None else np.where(np.isnan(array), absent, array)


def _scalar(values: Array) -> Number:
    return float(values[0]) if len(values) == 1 else values


def _shown(value: Number) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "[" + ", ".join(f"{number:.6g}" for number in np.atleast_1d(value)) + "]"
