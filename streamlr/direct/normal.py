"""The normal equations: from moments to coefficients.

With an intercept the columns are centred, X'WX is the scatter itself and the intercept is mean(y) - mean(x)'b, so it costs the
other coefficients no digits; without one the means are added back. The equations are equilibrated, C = D^-1 (X'WX + ridge W I) D^-1
with D the root of the diagonal, which brings the condition number within a factor p of the best that any scaling of the columns can
do (van der Sluis 1969, theorem 4.1), and makes the rank a property of the columns and not of their units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum, log10
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlr.aggregates.centred import EPS
from streamlr.aggregates.moments import Moments
from streamlr.direct.routes import Direct, Solution
from streamlr.errors import NoRows, NumericalError, RankDeficient, UsageError

Matrix = NDArray[np.float64]
# of the largest eigenvalue of a matrix of products; as measured, those of float32 numbers are off by 4 eps
ROUNDING = {"double": EPS["double"], "single": 64 * EPS["single"]}
BLOCK = 64  # rows and columns
CANCELLED = 1e-10  # in a null vector, at least what eigenvectors leave of a column that is no part of the dependence


@dataclass(frozen=True, slots=True)
class Equations:
    """Normal equations of the columns that vary, each in units of its own.

    Attributes
    ----------
    varies : (p,) bool
        False for constant columns (with an intercept) or zero ones (without).
    matrix : (r, r) float64
        C = D^-1 (X'WX + ridge W I) D^-1 of the r columns that vary.
    right : (r, k) float64
        D^-1 X'Wy.
    scale : (r,) float64
        The diagonal of D, in units of 2**exponent.
    """

    varies: NDArray[np.bool_]
    matrix: Matrix
    right: Matrix
    scale: NDArray[np.float64]

    def scaled(self, by: NDArray[np.float64]) -> Equations:
        """Return the same equations in units of `by`, (r,)."""
        return Equations(self.varies, self.matrix / by[:, None] / by, self.right / by[:, None], self.scale * by)

    def equilibrated(self) -> Equations:
        """Return the same equations with a unit diagonal."""
        equations = self.scaled(np.sqrt(np.diagonal(self.matrix)))
        np.fill_diagonal(equations.matrix, 1.0)
        return equations


def solve_normal(moments: Moments, direct: Direct, *, fit_intercept: bool, ridge: float) -> Solution:
    r"""Minimise J(b) + ridge |b|^2 from moments of the rows.

    .. math:: (X'WX + \lambda W I) b = X'Wy

    Where C has an eigenvalue below 8 p eps times its largest (1e-5 times, for moments in single precision), the rank is short: the
    solution is then found from the other eigenvectors, and is the one among all minimisers that has the least |b| in the user's
    units.

    Parameters
    ----------
    moments : Moments
        Of [X y].
    direct : Direct
        The options.
    fit_intercept : bool
        Whether b0 is fitted; it is never penalised.
    ridge : float
        The penalty; scikit-learn's alpha divided by W.

    Raises
    ------
    NoRows
        No row with a weight above zero.
    RankDeficient
        The rank is short and `direct.rank` is "error".
    NumericalError
        A coefficient is too large for float64.

    References
    ----------
    van der Sluis (1969), Condition numbers and equilibration of matrices, Numerische Mathematik 14.
    """
    _check(moments)
    ridge = check_penalty(ridge)
    p, unit = moments.n_features, moments.units
    equations = _equations(moments, fit_intercept=fit_intercept, ridge=ridge)
    equilibrated = equations.equilibrated()
    varies = equations.varies
    eigenvalues = np.linalg.eigvalsh(equilibrated.matrix)
    rounding = ROUNDING[moments.precision]
    cutoff = max(rounding, 8 * EPS["double"] * len(eigenvalues)) * eigenvalues.max(initial=0.0)
    short = int((eigenvalues <= cutoff).sum())
    rank = len(eigenvalues) - short
    aliased: dict[str, Mapping[str, float]] = {}
    if ridge == 0:  # the penalty leaves no choice: the coefficient of a constant is 0
        aliased = {moments.feature_names[j]: {} for j in np.flatnonzero(~varies)}
    mean = moments.mean[:p][varies]
    if short == 0:
        route = "cholesky"
        solved, inverse, mean_leverage = _by_cholesky(equations, mean / equations.scale)
    else:
        route, equations = "eigen", equilibrated
        units = np.ldexp(equations.scale, np.maximum(unit[:p][varies] - unit[:p][varies].max(), -1000))
        solved, inverse, mean_leverage, combinations = _by_eigenvectors(
            equations, mean / equations.scale, cutoff, units, drop=direct.rank == "drop"
        )
        names = [moments.feature_names[j] for j in np.flatnonzero(varies)]
        for j, weights in combinations.items():
            aliased[names[j]] = {names[i]: float(weights[i] * units[j] / units[i]) for i in np.flatnonzero(weights)}
    if aliased and direct.rank == "error":
        raise RankDeficient(f"{describe_aliases(aliased)}; leave them out, or choose rank='min_norm' or rank='drop'")
    coef, intercept, inverse_root = np.zeros((p, moments.n_targets)), np.zeros(moments.n_targets), np.full(p, np.nan)
    if fit_intercept:
        at = np.append(np.flatnonzero(varies), p)
        for j in range(moments.n_targets):
            at[-1] = p + j
            terms = np.append(-solved[:, j] / equations.scale, 1.0)
            intercept[j] = fsum([*(moments.mean[at] * terms), *(moments.mean_rest[at] * terms)])
    with np.errstate(over="ignore", under="ignore"):
        coef[varies] = np.ldexp(solved, unit[p:] - unit[:p][varies, None]) / equations.scale[:, None]
        intercept = np.ldexp(intercept, unit[p:])
        inverse_root[varies] = np.ldexp(np.sqrt(inverse) / equations.scale, -unit[:p][varies])
    if ridge > 0:
        inverse_root[:], mean_leverage = np.nan, np.nan
    if not (np.isfinite(coef).all() and np.isfinite(intercept).all()):
        raise NumericalError("a coefficient is beyond the range of float64; measure that column, or the target, in a larger unit")
    condition = float(np.sqrt(eigenvalues[-1] / eigenvalues[short])) if rank else 1.0
    digits = max(-log10(rounding) - 2 * log10(condition), 0.0)
    if ridge > 0:
        rank += int((~varies).sum())
    return Solution(coef, intercept, rank, condition, digits, route, aliased, inverse_root, mean_leverage)


def solve_bytes(n_features: int, n_targets: int) -> int:
    """Return the bytes that `solve_normal` needs beside the moments: C, its eigenvectors, what is made of them, and workspace."""
    return 8 * (11 * n_features**2 + 8 * n_features * (n_targets + 4))


def describe_aliases(aliased: Mapping[str, Mapping[str, float]]) -> str:
    """Say which columns depend on which others.

    Examples
    --------
    >>> describe_aliases({"c": {"a": 1.0, "b": 2.0}, "one": {}})
    '2 columns depend on others: c = 1 a + 2 b, one is constant'
    """
    shown = []
    for name, combination in list(aliased.items())[:5]:
        terms = " + ".join(f"{weight:.6g} {other}" for other, weight in list(combination.items())[:5])
        shown.append(f"{name} = {terms}{' + ...' if len(combination) > 5 else ''}" if combination else f"{name} is constant")
    more = f" and {len(aliased) - 5} more" if len(aliased) > 5 else ""
    return f"{len(aliased)} column{'s depend' if len(aliased) > 1 else ' depends'} on others: {', '.join(shown)}{more}"


def check_penalty(value: Any, name: str = "ridge") -> float:
    """Return a penalty as a float, or raise `UsageError` unless it is a finite number from 0 on."""
    if not isinstance(value, int | float | np.number) or not 0 <= float(value) < np.inf:
        raise UsageError(f"{name} is {value!r}; allowed are finite numbers from 0 on")
    return float(value)


def _check(moments: Moments) -> None:
    if moments.n_targets == 0:
        raise UsageError("there is no target to fit: name one with target= (--target), or give y")
    if moments.n_weighted == 0:
        raise NoRows("no row with a weight above zero is left to fit; check weights, missing= and the split")


def _equations(moments: Moments, *, fit_intercept: bool, ridge: float) -> Equations:
    p, total = moments.n_features, moments.weight_sum
    gram = moments.scatter if fit_intercept else moments.scatter + total * np.outer(moments.mean, moments.mean)
    varies = ~moments.constant[:p] if fit_intercept else np.diagonal(gram)[:p] > 0
    matrix = gram[:p, :p][np.ix_(varies, varies)]
    right = gram[:p, p:][varies]
    # the penalty is on coefficients in the user's units, of which one unit of the scaled column has 2**exponent
    penalty_root = np.ldexp(np.sqrt(ridge) * np.sqrt(total), -moments.units[:p][varies])
    size = np.hypot(np.sqrt(np.diagonal(matrix)), penalty_root)
    scale = np.ldexp(1.0, np.frexp(size)[1])  # powers of two: this scaling rounds nothing
    equations = Equations(varies, matrix, right, np.ones_like(scale)).scaled(scale)
    equations.matrix[np.diag_indices_from(matrix)] += (penalty_root / scale) ** 2
    return equations


def _by_cholesky(equations: Equations, mean: NDArray[np.float64]) -> tuple[Matrix, NDArray[np.float64], float]:
    """Return the solution of C z = right, the diagonal of C^-1, and mean'C^-1 mean."""
    factor = np.linalg.cholesky(equations.matrix)
    transposed = factor.T[::-1, ::-1]  # read from the end, it is lower triangular too
    right = np.column_stack([equations.right, mean])

    def solve(right: Matrix) -> Matrix:
        return _substituted(transposed, _substituted(factor, right)[::-1])[::-1]

    solved = solve(right)
    # one refinement, in the same precision, makes the error small for each equation by itself; where moments are exact, answers are
    # (Skeel 1980, Iterative refinement implies numerical stability for Gaussian elimination)
    solved += solve(right - equations.matrix @ solved)
    inverse = _substituted(factor, np.eye(len(factor)))
    return solved[:, :-1], np.einsum("ij,ij->j", inverse, inverse), float(mean @ solved[:, -1])


def _substituted(lower: NDArray[np.floating[Any]], right: Matrix) -> Matrix:
    """Solve a lower triangular system by substitution, a block of rows at a time: NumPy's own solvers factorise it again."""
    solved = np.empty_like(right)
    for start in range(0, len(lower), BLOCK):
        block = slice(start, start + BLOCK)
        solved[block] = np.linalg.solve(lower[block, block], right[block] - lower[block, :start] @ solved[:start])
    return solved


def _by_eigenvectors(
    equations: Equations, mean: NDArray[np.float64], cutoff: float, units: NDArray[np.float64], *, drop: bool
) -> tuple[Matrix, NDArray[np.float64], float, dict[int, NDArray[np.float64]]]:
    """Return a minimiser, as `_by_cholesky` does, and which column is which combination of others (equilibrated).

    The minimisers are z + N t, with N a basis of the null space of C. A later column of each dependence is expressed by earlier
    ones: from the last column up, the first independent rows of N are made an identity. With R = V L^-1/2 of the other
    eigenvectors, R R' right is a minimiser and R R' its covariance; R - N R[later] is that of the one without the later columns.
    """
    eigenvalues, vectors = np.linalg.eigh(equations.matrix)
    kept = eigenvalues > cutoff
    null = vectors[:, ~kept]
    later = _independent_rows_from_below(null)
    null = np.linalg.solve(null[later].T, null.T).T
    gap = eigenvalues[kept][0] / eigenvalues[-1]
    null[np.abs(null) < min(max(CANCELLED, 64 * EPS["double"] / gap), 1e-3)] = 0.0  # eigenvectors are off by eps / gap
    combinations = {}
    for column, j in enumerate(later):
        combinations[j] = -null[:, column]
        combinations[j][j] = 0.0
    root = vectors[:, kept]
    projected = root.T @ equations.right / np.sqrt(eigenvalues[kept])[:, None]
    root /= np.sqrt(eigenvalues[kept])
    root -= null @ root[later]
    root[later] = 0.0
    z, inverse = root @ projected, np.einsum("ij,ij->i", root, root)
    leverage = float(((mean @ root) ** 2).sum())
    inverse[later] = np.nan
    if not drop:
        involved = null.any(axis=1)
        inverse[involved], leverage = np.nan, np.nan
        z[involved] = _least_norm(z, null, later, units)[involved]
    return z, inverse, leverage, combinations


def _least_norm(z: Matrix, null: Matrix, later: list[int], units: NDArray[np.float64]) -> Matrix:
    """Return D b with the least |b| among the minimisers z + N t, where D is `units` and z is 0 for the later columns.

    The later columns are X A of the earlier ones X, in the user's units. Such a b is a combination of the rows of [I A], and
    [I A] b = c for the coefficients c of X alone: with [I A]' = Q R, b = Q R^-T c. Rows in the order of their size and pivoted
    columns keep small units accurate beside large ones (Cox and Higham 1998, Stability of Householder QR factorization for
    weighted least squares problems).
    """
    import scipy.linalg  # here, since it brings a second BLAS and 100 MB with it, which few fits need

    earlier = np.setdiff1d(np.flatnonzero(null.any(axis=1)), later)
    combination = -null[earlier] * units[later] / units[earlier, None]
    basis = np.vstack([np.eye(len(earlier)), combination.T])
    rows = np.argsort(-np.abs(basis).max(axis=1), kind="stable")
    q, r, order = scipy.linalg.qr(basis[rows], mode="economic", pivoting=True)
    c = z[earlier] / units[earlier, None]
    b = np.zeros_like(z)
    b[np.append(earlier, later)[rows]] = q @ scipy.linalg.solve_triangular(r, c[order], trans="T")
    return units[:, None] * b


def _independent_rows_from_below(null: Matrix) -> list[int]:
    """Return the last rows of a null basis that are independent, as many as it has columns."""
    remaining = null.copy()
    found: list[int] = []
    threshold = 1e-3
    while len(found) < null.shape[1]:
        for j in range(len(remaining) - 1, -1, -1):
            if len(found) == null.shape[1]:
                break
            size = float(np.linalg.norm(remaining[j]))
            if j not in found and size > threshold:
                direction = remaining[j] / size
                remaining -= np.outer(remaining @ direction, direction)
                found.append(j)
        threshold /= 100
    return sorted(found)
