"""What the tests of the numbers share: rows with awkward offsets and scales, ways to cut them, and exact oracles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamlr.aggregates.moments import Moments, MomentsOf
from streamlr.dataset.blocks import Block
from streamlr.dataset.dataset import default_names

Array = NDArray[np.float64]
EPS = float(np.finfo(np.float64).eps)

# The same examples on every run: a test that fails only sometimes is a test that nobody believes.
settings.register_profile("steady", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("steady")


@st.composite
def matrices(
    draw: st.DrawFn, min_rows: int = 0, max_rows: int = 30, min_columns: int = 1, max_columns: int = 4, awkward: bool = True
) -> Array:
    """Columns of ordinary numbers, each perhaps far from zero, in a large or small unit, constant, or nearly all zeros."""
    n, q = draw(st.integers(min_rows, max_rows)), draw(st.integers(min_columns, max_columns))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    columns = rng.standard_normal((n, q))
    for j in range(q):
        kind = draw(st.sampled_from(["plain", "integers", "constant", "mostly zero", "zero"])) if awkward else "plain"
        if kind == "integers":
            columns[:, j] = np.round(4 * columns[:, j])
        elif kind == "constant":
            columns[:, j] = 0.1
        elif kind == "mostly zero":
            columns[: n // 2, j] = 0.0
        elif kind == "zero":
            columns[:, j] = 0.0
        columns[:, j] += draw(st.sampled_from([0.0, 1.0, -1e3, 1e6]))
        columns[:, j] *= draw(st.sampled_from([1.0, 1.0, 1e-8, 1e8, 1e-150, 1e150, 1e-200, 1e200])) if awkward else 1.0
    return columns


@st.composite
def row_weights(draw: st.DrawFn, n: int) -> Array | None:
    """No weights, or some that may be zero, of one order of magnitude or of many."""
    kind = draw(st.sampled_from(["none", "ordinary", "some zero", "all zero", "wide"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "none":
        return None
    weights = rng.uniform(0.1, 3.0, n)
    if kind == "some zero":
        weights[rng.random(n) < 0.4] = 0.0
    elif kind == "all zero":
        weights[:] = 0.0
    elif kind == "wide":
        weights *= 10.0 ** rng.integers(-12, 12, n)
    return weights


@st.composite
def cuts(draw: st.DrawFn, n: int) -> list[int]:
    """Where n rows are cut: 0, some places between, n."""
    inner = draw(st.sets(st.integers(1, n - 1), max_size=8)) if n > 1 else set()
    return [0, *sorted(inner), n]


def block_of(columns: Array, weights: Array | None = None, start: int = 0, n_targets: int = 1) -> Block:
    """A block of all these rows."""
    p = columns.shape[1] - n_targets
    return Block(start, start + len(columns), np.ascontiguousarray(columns[:, :p]), np.ascontiguousarray(columns[:, p:]), weights)


def moments_of(columns: Array, weights: Array | None = None, n_targets: int = 1) -> Moments:
    """Moments of all these rows, in one tile."""
    p = columns.shape[1] - n_targets
    return MomentsOf(default_names("x", p), default_names("y", n_targets)).of(block_of(columns, weights, n_targets=n_targets))


def same_bits(a: Any, b: Any) -> bool:
    """Whether two values with slots hold the same bits."""
    for name in a.__slots__:
        one, other = getattr(a, name), getattr(b, name)
        if hasattr(one, "__slots__"):
            if not same_bits(one, other):
                return False
        elif np.asarray(one).tobytes() != np.asarray(other).tobytes():
            return False
    return True


def fractions_of(values: Any) -> Any:
    """The exact values of floats, nested as they are."""
    return [fractions_of(value) for value in values] if np.ndim(values) else Fraction(float(values))


def exact_moments(columns: Array, weights: Array | None = None) -> tuple[list[Fraction], list[list[Fraction]]]:
    """Mean and scatter in exact rational arithmetic."""
    rows, q = fractions_of(columns), columns.shape[1]
    w = [Fraction(1)] * len(rows) if weights is None else fractions_of(weights)
    total = sum(w)
    mean = [sum((wi * row[j] for wi, row in zip(w, rows, strict=True)), Fraction(0)) / total for j in range(q)]
    centred = [[row[j] - mean[j] for j in range(q)] for row in rows]
    scatter = [[sum((wi * z[i] * z[j] for wi, z in zip(w, centred, strict=True)), Fraction(0)) for j in range(q)] for i in range(q)]
    return mean, scatter


def exact_solve(matrix: Sequence[Sequence[Fraction]], right: Sequence[Sequence[Fraction]]) -> list[list[Fraction]]:
    """Solve a regular system exactly, by Gauss and Jordan."""
    n = len(matrix)
    rows = [[*matrix[i], *right[i]] for i in range(n)]
    for i in range(n):
        pivot = next(j for j in range(i, n) if rows[j][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for j in range(n):
            if j != i and rows[j][i]:
                factor = rows[j][i]
                rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    return [row[n:] for row in rows]


class ExactFit:
    """Least squares of full rank in exact rational arithmetic, from the definition: the oracle of the exact fit."""

    def __init__(
        self, x: Array, y: Array, weights: Array | None = None, *, fit_intercept: bool = True, ridge: Fraction = Fraction(0)
    ) -> None:
        n, p = x.shape
        y = y.reshape(n, -1)
        one = int(fit_intercept)
        rows = [[Fraction(1)] * one + row for row in fractions_of(x)]
        targets = fractions_of(y)
        w = [Fraction(1)] * n if weights is None else fractions_of(weights)
        q, k = p + one, y.shape[1]
        total = sum(w)
        gram = [[sum((w[m] * rows[m][i] * rows[m][j] for m in range(n)), Fraction(0)) for j in range(q)] for i in range(q)]
        for i in range(one, q):
            gram[i][i] += ridge * total
        right = [[sum((w[m] * rows[m][i] * targets[m][j] for m in range(n)), Fraction(0)) for j in range(k)] for i in range(q)]
        identity = [[Fraction(int(i == j)) for j in range(q)] for i in range(q)]
        solved = exact_solve(gram, [r + e for r, e in zip(right, identity, strict=True)])
        beta = [row[:k] for row in solved]
        self.intercept = beta[0] if one else [Fraction(0)] * k
        self.coef = beta[one:]
        residuals = [[targets[m][j] - sum(rows[m][i] * beta[i][j] for i in range(q)) for j in range(k)] for m in range(n)]
        self.rss = [sum((w[m] * residuals[m][j] ** 2 for m in range(n)), Fraction(0)) for j in range(k)]
        self.df = sum(1 for value in w if value) - q
        self.inverse_diagonal = [solved[i][k + i] for i in range(q)]
        self.one = one

    def std_err(self) -> Array:
        """Standard errors of the coefficients, (p, k)."""
        return np.array(
            [[math.sqrt(rss / self.df * d) for rss in self.rss] for d in self.inverse_diagonal[self.one :]], dtype=np.float64
        )

    def intercept_std_err(self) -> Array:
        """Standard errors of the intercepts, (k,)."""
        return np.array([math.sqrt(rss / self.df * self.inverse_diagonal[0]) for rss in self.rss])


def digits_of(got: Any, exact: Any) -> float:
    """Correct decimal digits: the least log relative error over all entries, 17 where they are equal (NIST's measure)."""
    least = 17.0
    for one, truth in zip(np.ravel(np.asarray(got, dtype=object)), np.ravel(np.asarray(exact, dtype=object)), strict=True):
        if not math.isfinite(one):
            return -math.inf
        error = abs(Fraction(float(one)) - Fraction(truth))
        if error:
            size = abs(Fraction(truth)) or Fraction(1)
            ratio = error / size
            least = min(least, -(math.log10(ratio.numerator) - math.log10(ratio.denominator)))
    return least
