"""Spread: how far the numbers of each of some columns lie from their centre, column by column."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamlr.aggregates.centred import CONSTANT, exact_sum
from streamlr.dataset.blocks import Block
from streamlr.errors import NumericalError

# A column keeps its own unit while its squares stay well inside the range of the numbers that are multiplied, so that sums do too.
SQUARES = {"double": (1e-150, 1e150), "single": (1e-25, 1e25)}
NO_SCALE = -4096  # the exponent of a column that has shown nothing but zeros: below every other, so that any other wins

Array = NDArray[np.float64]
Exponents = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    r"""Weighted sums of squares of each column about its centre, a commutative monoid.

    .. math:: W = \sum w_i, \quad s_j = \sum w_i (z_{ij} - c_j)^2

    The centre c is the mean of the rows, or for all rows the same. Two sets are merged as moments are, by the rule of Chan, Golub
    and LeVeque (1983, equation 2.1), which of one centre only adds the squares.

    Attributes
    ----------
    n : int
        Rows.
    weight_sum : float
        W.
    mean : (q,) float64
        Centre of each column, in units of 2**exponent.
    mean_rest : (q,) float64
        What the rounding of `mean` left out, in the same units.
    squares : (q,) float64
        s, in units of 4**exponent.
    exponent : (q,) int32
        Power of two that each column is measured in: 0 unless its squares could leave 1e-150 to 1e150.
    """

    n: int
    weight_sum: float
    mean: Array
    mean_rest: Array
    squares: Array
    exponent: Exponents

    @classmethod
    def empty(cls, n_columns: int, n: int = 0) -> Spread:
        """Return the spread of no rows, or of `n` without weight."""
        mean, rest, squares = np.zeros((3, n_columns))
        return cls(n, 0.0, mean, rest, squares, np.full(n_columns, NO_SCALE, dtype=np.int32))

    @property
    def units(self) -> Exponents:
        """Exponents to compute with: 0 for a column that has shown nothing but zeros."""
        return units_of(self.exponent)

    @property
    def constant(self) -> NDArray[np.bool_]:
        """Which columns do not vary beyond the rounding of their mean."""
        flat: NDArray[np.bool_] = self.squares <= self.weight_sum * (CONSTANT * self.mean) ** 2
        return flat

    def columns(self, first: int, last: int) -> Spread:
        """Return the spread of some of the columns."""
        here = slice(first, last)
        return Spread(self.n, self.weight_sum, self.mean[here], self.mean_rest[here], self.squares[here], self.exponent[here])

    def copy(self) -> Spread:
        """Return a spread that shares no memory with this one."""
        arrays = {name: getattr(self, name).copy() for name in ("mean", "mean_rest", "squares", "exponent")}
        return replace(self, **arrays)

    def in_units(self, exponent: Exponents) -> Spread:
        """Return this spread in units that are as large or larger: itself where they are its own."""
        shift = shift_between(self.exponent, exponent)
        if shift is None:
            return self
        mean, rest, squares = np.ldexp(self.mean, shift), np.ldexp(self.mean_rest, shift), np.ldexp(self.squares, 2 * shift)
        return Spread(self.n, self.weight_sum, mean, rest, squares, exponent)

    def __add__(self, other: Spread) -> Spread:
        if self.n == 0 or other.n == 0:
            return (other if self.n == 0 else self).copy()
        both = meeting(self, other)
        mine, others = (side.in_units(both.exponent).squares for side in (self, other))
        with np.errstate(over="ignore"):
            squares = mine + others + both.step**2
        both.check(squares)
        return Spread(self.n + other.n, both.weight_sum, both.mean, both.mean_rest, squares, both.exponent)


class Meeting(NamedTuple):
    """Where two sets of rows meet.

    Attributes
    ----------
    weight_sum : float
        Of both.
    mean, mean_rest : (q,) float64
        Their common mean, and what its rounding left out.
    step : (q,) float64
        Whose square, beside their scatters, is the scatter of both.
    exponent : (q,) int32
        Units of all that.
    """

    weight_sum: float
    mean: Array
    mean_rest: Array
    step: Array
    exponent: Exponents

    def check(self, squares: Array) -> None:
        """Raise `NumericalError` where the weights, or sums of squares (q,), are more than a float64 holds."""
        if not (np.isfinite(self.weight_sum) and np.isfinite(squares).all()):
            raise NumericalError(
                "the sum of the weights, or of squares times weights, overflows; divide the weights by their largest"
            )


def meeting(one: Spread, other: Spread) -> Meeting:
    """Return where two sets of rows meet (Chan, Golub and LeVeque 1983, equation 2.1)."""
    exponent = np.maximum(one.exponent, other.exponent)
    sides = one.in_units(exponent), other.in_units(exponent)
    # the mean starts from the heavier side, so that rows of little or no weight hardly move it
    heavy, light = sides if one.weight_sum >= other.weight_sum else reversed(sides)
    total = one.weight_sum + other.weight_sum
    share = light.weight_sum / total if total else 0.0
    step = (light.mean - heavy.mean) + (light.mean_rest - heavy.mean_rest)
    mean, left = exact_sum(heavy.mean, step * share)
    mean, rest = exact_sum(mean, left + heavy.mean_rest)
    step *= np.sqrt(heavy.weight_sum) * np.sqrt(share)
    return Meeting(total, mean, rest, step, exponent)


def shift_between(exponent: Exponents, larger: Exponents) -> Exponents | None:
    """Return the powers of two that take columns to larger units, None where these are theirs already.

    They are exact, but for what vanishes beside columns so much larger.
    """
    return None if exponent.tobytes() == larger.tobytes() else np.maximum(exponent - larger, NO_SCALE)


def exponents_of(largest: Array, precision: str = "double") -> Exponents:
    """Return the power of two nearest above each of some largest magnitudes, 0 for those of ordinary size."""
    small, large = SQUARES[precision]
    exponent = np.frexp(largest)[1].astype(np.int32)
    exponent[(largest > np.sqrt(small)) & (largest < np.sqrt(large))] = 0
    exponent[largest == 0] = NO_SCALE
    return np.asarray(exponent)


def units_of(exponent: Exponents) -> Exponents:
    """Return exponents to compute with: 0 for a column that has shown nothing but zeros."""
    units: Exponents = np.where(exponent == NO_SCALE, np.int32(0), exponent)
    return units


def overflowing(block: Block) -> NumericalError:
    """Return the error for rows whose squares overflow, if there is none in their values."""
    block.confirm()
    return NumericalError(
        f"the squares of rows {block.start:,} to {block.stop - 1:,} overflow although every value is finite; "
        "are there weights near 1e300? divide them by their largest"
    )
